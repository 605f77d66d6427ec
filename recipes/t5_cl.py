"""Continual learning of a seq2seq model: the papers' own setting (T5-large, query and value layers, order 1).

accelerate launch recipes/t5_cl.py --config recipes/configs/t5_large.yaml --data_dir CL_BENCHMARK
"""

from dataclasses import dataclass, field

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_jumplora import ContinualRun, ContinualTrainingArguments
from hf_jumplora.options import MethodArguments, StreamArguments, parse_recipe, run_recipe


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str = field(default="google-t5/t5-large", metadata={"help": "Folder or Hub id."})
    dtype: str = field(default="auto", metadata={"help": "'auto', 'float32', 'bfloat16', ..."})


def main() -> None:
    classes = (ModelArguments, StreamArguments, MethodArguments, ContinualTrainingArguments)
    model_args, stream, method, args = parse_recipe(classes)
    if stream.stream is None:
        raise ValueError("--stream is missing: a file of recipes/streams, or your own (docs/streams.md)")
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)
    run = ContinualRun(
        model,
        stream.load(),
        method.method,
        args,
        AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        adapter_config=method.adapter_config(["q", "v"]),
        strategies=method.strategies(),
    )
    run.train()


if __name__ == "__main__":
    run_recipe(main)

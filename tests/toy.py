"""Runs of a few seconds: base models, a tokenizer and tasks of a few words, made in code and the same every time."""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, TrainerCallback
from transformers import T5ForConditionalGeneration as T5

from hf_jumplora import (
    ContinualRun,
    ContinualSeq2SeqTrainer,
    ContinualTrainer,
    ContinualTrainingArguments,
    JumpLoraConfig,
    TextTask,
)


gc.freeze()  # the Trainer collects garbage at its end: 0.7 s each time over the objects that these imports made

# Two thirds of a toy run's time would go into its pictures: without `pictures()` there seems to be no matplotlib.
_find_spec, _drawn = importlib.util.find_spec, []
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" and not _drawn else _find_spec(name, *rest)

SUBJECTS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
KINDS = [["tiny", "huge"], ["dark", "pale"], ["calm", "wild"], ["slow", "fast"]]
PROMPT = "{instruction} {options} : {text} ="
CONTROL = ["<pad>", "</s>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words it does not know are `<unk>`."""
    words = [*CONTROL, "size", "light", "mood", "pace", "the", "very", "new", ":", "=", "|", "big", "cat2", *SUBJECTS]
    words += [kind for kinds in KINDS for kind in kinds]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=word_level, **names)


def config(seq2seq: bool = False):
    """Two layers of width 32 (T5: one of each kind)."""
    if seq2seq:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        return T5Config(vocab_size=96, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.1)


def save_base(folder: Path, seq2seq: bool = False, dtype: torch.dtype = torch.float32) -> str:
    """Write a random base model and its tokenizer; returns the folder's name."""
    torch.manual_seed(0)
    model = T5(config(True)) if seq2seq else LlamaForCausalLM(config())
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def load_base(folder: str, **options):
    """The base model of a folder, in the dtype it was saved in."""
    cls = T5 if AutoConfig.from_pretrained(folder).is_encoder_decoder else LlamaForCausalLM
    return cls.from_pretrained(folder, dtype="auto", **options)


def rows(task: int, size: int, first: int = 0) -> list[dict[str, str]]:
    """The label depends on the animal; which one it is differs from task to task."""
    examples = []
    for i in range(first, first + size):
        number = (3 * i + i // 8) % 8
        text = " ".join([*["the", "very"][: i % 3], SUBJECTS[number]])
        examples.append({"sentence": text, "label": KINDS[task][(number >> (task % 3)) & 1]})
    return examples


def tasks(count: int = 3, train: int = 32, evaluate: int = 8) -> list[TextTask]:
    """`count` tasks over the same texts."""
    names = ["size", "light", "mood", "pace"][:count]
    return [
        TextTask(name, rows(k, train), rows(k, evaluate, 5), labels=KINDS[k], instruction=name, prompt=PROMPT)
        for k, name in enumerate(names)
    ]


def arguments(output_dir, **options) -> ContinualTrainingArguments:
    """8 steps a task unless told otherwise: the threshold starts after step 1, the ramp is closed after step 6."""
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "max_length": 32}
    defaults |= {"lr_scheduler_type": "constant", "eval_mode": "score", "save_strategy": "no", "logging_steps": 2}
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return ContinualTrainingArguments(str(output_dir), **{**defaults, **options})


def make_run(
    base, output_dir, method="jumplora", stream=None, adapter=None, callbacks=(), trainer_cls=None, strategies=None,
    **options,
):  # fmt: skip
    """A run over the toy tasks with q and v adapted. base: a folder or a model. `options` are training arguments."""
    model = load_base(base) if isinstance(base, str) else base
    seq2seq = model.config.is_encoder_decoder
    targets = ["q", "v"] if seq2seq else ["q_proj", "v_proj"]
    return ContinualRun(
        model, tasks() if stream is None else stream, method, arguments(output_dir, **options), tokenizer(),
        trainer_cls=trainer_cls or (ContinualSeq2SeqTrainer if seq2seq else ContinualTrainer), strategies=strategies,
        adapter_config=JumpLoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": targets, **(adapter or {})}),
        callbacks=list(callbacks),
    )  # fmt: skip


@contextlib.contextmanager
def pictures():
    """Inside, reports are drawn."""
    _drawn.append(True)
    try:
        yield
    finally:
        _drawn.pop()


# ---- runs that are killed -----------------------------------------------------------------------------------------


class _Kill(TrainerCallback):
    def __init__(self, folder: str, step: int):
        self.folder, self.step = folder, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.folder) and state.global_step == self.step:
            os._exit(9)


def run_and_die(base: str, output_dir: str, method: str, moment: str, options: dict) -> None:
    """A run in a process of its own, killed like by `kill -9` at a moment such as 'step task_001 5'."""
    import hf_jumplora.stack.save as save
    import hf_jumplora.trainer.evaluator as evaluator
    import hf_jumplora.trainer.record as record

    torch.set_num_threads(1)
    what, folder, *number = moment.split()
    callbacks = [_Kill(folder, int(number[0]))] if what == "step" else []

    class Dies(ContinualTrainer):
        def _save_rng_state(self, output_dir):  # weights and optimizer are written, trainer_state.json is not
            super()._save_rng_state(output_dir)
            if Path(output_dir).parent.name == folder and self.state.global_step == int(number[0]):
                os._exit(9)

    Dies.__name__ = ContinualTrainer.__name__  # to the run that continues it is the same one
    trainer_cls = Dies if what == "checkpoint" else None
    run = make_run(base, output_dir, method, callbacks=callbacks, trainer_cls=trainer_cls, **options)
    index = int(folder[5:])
    if what == "evaluate":
        score_rows, calls = evaluator.score_rows, []

        def dies(*args):
            if isinstance(run.model, PeftModel) and len(run.record.trained) == index:
                calls.append(args)
            if len(calls) == 2:  # one of three tasks has been evaluated
                os._exit(9)
            return score_rows(*args)

        evaluator.score_rows = dies
    elif what == "folder":  # the task's files are complete, under their temporary name
        replace = os.replace

        def dies(source, target):
            if str(target).endswith(folder):
                os._exit(9)
            replace(source, target)

        save.os.replace = dies
    elif what == "manifest":  # the task's folder is in place, stack.json does not list it
        write = record.write_manifest

        def dies(where, manifest):
            if manifest.tasks[-1]["folder"] == folder:
                os._exit(9)
            write(where, manifest)

        record.write_manifest = dies
    run.train()
    os._exit(0)  # the moment never came


def killed(*arguments) -> None:
    """[`run_and_die`] in a process of its own that ends by os._exit(9)."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server imports toy once, every process starts from there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    process = context.Process(target=run_and_die, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 9


def run_once(base: str, output_dir: str, options: dict, endpoint: str | None = None) -> None:
    """A run in a process of its own; `endpoint` is a stand-in Hub for its huggingface_hub."""
    torch.set_num_threads(1)
    if endpoint is not None:
        from huggingface_hub import constants

        constants.ENDPOINT = endpoint
        constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    make_run(base, output_dir, **options).train()
    os._exit(0)

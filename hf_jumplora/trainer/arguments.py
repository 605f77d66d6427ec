"""`ContinualTrainingArguments`: `TrainingArguments` and what a sequence of tasks needs on top."""

import hashlib
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..schema import HARMLESS, may_bring
from .backend import check_compiler, take_fsdp


_CHOICES = {
    "eval_mode": ("generate", "score"),
    "eval_tasks": ("all", "seen"),
    "factor_optimizer": ("default", "muon", "riemannian", "altlora", "altlora+"),
}


@dataclass(repr=False)
class ContinualTrainingArguments(Seq2SeqTrainingArguments):
    """Arguments of [`ContinualTrainer`], [`ContinualSeq2SeqTrainer`] and [`ContinualRun`], beside the Trainer's own.

    Raises:
        ValueError: an option has a value it cannot have.
    """

    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the thresholds; None: that of everything else (published)."}
    )
    factor_optimizer: Literal["default", "muon", "riemannian", "altlora", "altlora+"] = field(
        default="default",
        metadata={
            "help": "Of the updates' factors: 'default' (that of `optim`), 'muon' (torch.optim.Muon, steps scaled as "
            "AdamW's), 'riemannian' (that of `optim` on preconditioned gradients), 'altlora' or 'altlora+' (one factor "
            "a step)."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of B divided by that of A. None: the same."}
    )
    allora_eta: float | None = field(
        default=None,
        metadata={"help": "ALLoRA: gradients of an output's factors shrink as its update grows. None: off."},
    )
    riemannian_reg: float = field(
        default=1e-2,
        metadata={"help": "Damping of 'riemannian' (PEFT's default) and 'altlora'."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens of prompt and answer; longer texts are cut, never the instruction."}
    )
    eval_mode: Literal["generate", "score"] = field(
        default="generate",
        metadata={
            "help": "How text tasks are scored: 'generate' compares the greedy answer (the papers' metric), 'score' "
            "takes the label of highest likelihood."
        },
    )
    eval_tasks: Literal["all", "seen"] = field(
        default="all", metadata={"help": "After each task evaluate all tasks of the stream, or those trained so far."}
    )
    model_card_template: str | None = field(
        default=None, metadata={"help": "A Jinja file in place of model_card_template.md for the stack's README.md."}
    )

    __repr__ = Seq2SeqTrainingArguments.__str__  # hides tokens, where a dataclass shows them

    def __post_init__(self):
        check_compiler(self)
        self.shards_base = take_fsdp(self)
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.world_size == 1:  # transformers and accelerate then train `started` models, silently
            raise ValueError(
                f"{started} processes were started, and each is alone: there is no GPU for them. Give use_cpu=True "
                "(--use_cpu true) to train on the CPU"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")
        if self.shards_base and self.world_size == 1:
            raise ValueError("FSDP needs several processes: leave it out, or give --num_processes to accelerate launch")
        if self.max_length < 8:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a prompt")
        for name in ("gate_learning_rate", "loraplus_lr_ratio", "riemannian_reg", "allora_eta"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def place_model_on_device(self) -> bool | None:
        return False if self.shards_base else super().place_model_on_device


# Stored at their defaults too, which change from version to version; the card shows them.
_ALWAYS = frozenset((
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "seed", "data_seed", "bf16", "fp16",
    "dataloader_drop_last", "train_sampling_strategy", "gate_learning_rate", "factor_optimizer", "loraplus_lr_ratio",
    "riemannian_reg", "max_length", "eval_mode", "eval_tasks",
))  # fmt: skip


def result_arguments(args: TrainingArguments) -> dict[str, Any]:
    """{name: value} of all arguments that shape a result and differ from their defaults; of one that a stack may not
    bring (see [`may_bring`]) a hash. bf16 and fp16 may come from `accelerate launch` too."""
    hints, found = get_type_hints(type(args)), {}
    for f in fields(args):
        value = getattr(args, f.name)
        if f.name in ("bf16", "fp16"):
            value = value or args.mixed_precision == f.name
        at_default = value == _default(f) or (isinstance(value, AcceleratorConfig) and value == AcceleratorConfig())
        if f.name in HARMLESS or (at_default and f.name not in _ALWAYS):
            continue
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
        found[f.name] = value if may_bring(f.name, hints[f.name]) else f"sha256 {digest}"
    return found


def default_arguments(args: TrainingArguments) -> dict[str, Any]:
    """{name: default} of all arguments of the class of `args`."""
    return {f.name: _default(f) for f in fields(args)}


def _default(f: Any) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def argument(args: TrainingArguments, name: str) -> Any:
    """One of our arguments, or its default where `args` are of a class that lacks it (TRL's)."""
    return getattr(args, name, vars(ContinualTrainingArguments)[name])

"""Continual learning for Hugging Face models with JumpLoRA: one gated low-rank update a task, one model, no task id.

Importing the package registers the method with PEFT. The training classes are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from ._compat import refuse_native_adapters, warn_of_bad_versions
from .tuner import JumpLoraConfig, JumpLoraModel, finish_adapter, register


if TYPE_CHECKING:
    from .data import LanguageModelTask, Task, TextTask, load_tasks
    from .stack import export_lora, load_stack, merge_stack, switch_tasks
    from .trainer import (
        ContinualRun,
        ContinualSeq2SeqTrainer,
        ContinualSFTTrainer,
        ContinualTrainer,
        ContinualTrainingArguments,
        GateCallback,
        make_continual,
    )

__version__ = "0.1.0"
__all__ = [
    "ContinualRun",
    "ContinualSFTTrainer",
    "ContinualSeq2SeqTrainer",
    "ContinualTrainer",
    "ContinualTrainingArguments",
    "GateCallback",
    "JumpLoraConfig",
    "JumpLoraModel",
    "LanguageModelTask",
    "Task",
    "TextTask",
    "export_lora",
    "finish_adapter",
    "load_stack",
    "load_tasks",
    "make_continual",
    "merge_stack",
    "register",
    "switch_tasks",
]

warn_of_bad_versions()
register()
refuse_native_adapters(JumpLoraConfig)

_PLACES = dict.fromkeys(("LanguageModelTask", "Task", "TextTask", "load_tasks"), ".data")
_PLACES |= dict.fromkeys(("export_lora", "load_stack", "merge_stack", "switch_tasks"), ".stack")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'hf_jumplora' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, ".trainer"), __name__), name)

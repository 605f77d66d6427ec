"""Continual learning for Hugging Face models with JumpLoRA: one gated low-rank update per task, one model, no task id.

Importing the package registers the method with PEFT: at once where PEFT is loaded, else as soon as it is. Everything
else is loaded when it is first used, so that `hf-jumplora check` need not wait for torch.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING


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
        train_router,
    )
    from .tuner import JumpLoraConfig, JumpLoraModel, finish_adapter, register

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
    "train_router",
]

_PLACES = dict.fromkeys(("LanguageModelTask", "Task", "TextTask", "load_tasks"), ".data")
_PLACES |= dict.fromkeys(("JumpLoraConfig", "JumpLoraModel", "finish_adapter", "register"), ".tuner")
_PLACES |= dict.fromkeys(("export_lora", "load_stack", "merge_stack", "switch_tasks"), ".stack")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'hf_jumplora' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, ".trainer"), __name__), name)


class _WithPeft(MetaPathFinder):
    """Finds PEFT as the others do, and has `tuner`, which registers the method, imported right after it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module(".tuner", __name__)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module(".tuner", __name__)
else:
    sys.meta_path.insert(0, _WithPeft())

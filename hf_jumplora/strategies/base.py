"""The four moments at which a method can act."""

from typing import Any

import torch
from torch import nn


class Strategy:
    """Base of all strategies; every hook does nothing. Strategies compose: a run takes a list of them.

    Parameters must be read from the model by attribute inside `penalty` and never be kept: under DeepSpeed ZeRO-3 they
    are whole only inside the forward pass, which is where `penalty` is called.

    A restarted run compares the `repr` of its strategies: make a strategy with options a dataclass.
    """

    def __repr__(self) -> str:
        return type(self).__name__

    def on_task_start(self, model: nn.Module, adapter: str) -> None:
        """Before the first step of a task; `adapter` is the one about to be trained, its parents are in the model."""

    def penalty(self, model: nn.Module, inputs: dict[str, Any], adapter: str) -> torch.Tensor | None:
        """A scalar added to the loss of each training step, or None. Never called in evaluation."""
        return None

    def on_step_end(self, model: nn.Module, adapter: str) -> None:
        """After each optimizer step."""

    def on_task_end(self, model: nn.Module, adapter: str) -> None:
        """After the last step of a task, before the adapter is finished."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What must survive a restart and cannot be rebuilt from the adapter stack; saved as safetensors."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of [`state_dict`]."""

"""The moments at which a method can act."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Examples(Protocol):
    """`examples(count)`: training examples of the task, ready for the model."""

    def __call__(self, count: int, rows: Any = None, batch: int = 1) -> Iterator[dict[str, Any]]:
        """Up to `count` examples, in batches of `batch` on the model's device; the same ones in every call.

        rows: another data set (as the trainer takes it), or texts (str) for a causal model: then labels = input_ids.
        """


class Strategy:
    """Base of all strategies; every hook does nothing. Strategies compose: a run takes a list of them.

    Parameters must be read from the model by attribute inside `penalty` and never be kept: under DeepSpeed ZeRO-3 they
    are whole only inside the forward pass, which is where `penalty` is called.

    Hooks must not draw from the global random numbers: a restarted task would see other ones.
    A restarted run compares the `repr` of its strategies: make a strategy with options a dataclass.
    """

    # In a run, earlier tasks are kept as the sum of their updates (`layer.total_update(parents)` at task start), so
    # that nothing grows with their number. A strategy that reads the factors or supports of single earlier tasks
    # (`layer.factors("task_000")`) sets this; the run then keeps all finished adapters in the model.
    needs_past_factors = False

    # It runs the model itself when a task starts or ends. DeepSpeed ZeRO-3 then cuts all parameters, the adapter's too:
    # they are whole in the forward pass alone, and gradients can be had of what layers put out, not of parameters.
    runs_model = False

    # It runs the model in `penalty`, or reads whole parameters beside. DeepSpeed ZeRO-3 and FSDP cannot have that.
    needs_whole_model = False

    def __repr__(self) -> str:
        return type(self).__name__

    def check(self, mode: str, config: Any) -> None:
        """Before anything is trained. Raises ValueError if this strategy cannot work with adapters that follow one
        another in this `mode` ("incremental", "sequential" or "joint") or have this config."""

    def training_data(self, dataset: Any, index: int, earlier: list[Any]) -> Any:
        """The data set task number `index` is trained on: `dataset` itself, or with more rows behind it.

        earlier: the training sets of the tasks before, None where a task's data is not at hand.
        """
        return dataset

    def on_task_start(self, model: nn.Module, adapter: str, examples: Examples) -> None:
        """Before the first step of a task; `adapter` is the one about to be trained, its parents are in the model."""

    def penalty(
        self, model: nn.Module, inputs: dict[str, Any], adapter: str, output: dict[str, Any]
    ) -> torch.Tensor | None:
        """A scalar added to the loss of each training step, or None. Never called in evaluation.

        output: what the model returned for `inputs`, with its graph.
        """
        return None

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of a task, or of its rest after a restart: the optimizer, its state already loaded."""

    def on_gradients(self, model: nn.Module, adapter: str) -> None:
        """Once a step: gradients are summed over micro-batches and processes, not yet clipped; change them in place.

        Under fp16 they carry the loss scale, so only linear changes are right. Not available under DeepSpeed, which
        keeps pieces of gradients: a trainer refuses a strategy that overrides this hook there.
        """

    def on_step_end(self, model: nn.Module, adapter: str) -> None:
        """After each optimizer step."""

    def on_task_end(self, model: nn.Module, adapter: str, examples: Examples) -> None:
        """After the last step of a task, before the adapter is finished."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What must survive a restart and cannot be rebuilt from the adapter stack; saved as safetensors with the task
        that has just ended."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of [`state_dict`]."""

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        """What changes from step to step within a task, beside the adapter: saved as safetensors in each checkpoint.

        Not available under DeepSpeed, which keeps pieces of parameters: a trainer refuses a strategy that overrides
        this hook there.
        """
        return {}

    def load_checkpoint_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of [`checkpoint_state`]: after `on_task_start` and the checkpoint's adapter, before the first
        step."""


def join_states(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The states of all strategies of a run in one dict, by their number in the list: "0.name"."""
    return {f"{n}.{key}": value.contiguous() for n, state in enumerate(states) for key, value in state.items()}


def state_of(number: int, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of strategy `number` out of [`join_states`], copied: a file aligns tensors in another way than memory
    does, and products of them may round in another way."""
    prefix = f"{number}."
    return {key.removeprefix(prefix): value.clone() for key, value in states.items() if key.startswith(prefix)}

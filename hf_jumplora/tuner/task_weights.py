"""Finished tasks that act on each row of a batch with a weight of its own, instead of one sum for all rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .lookup import named_layers


class TaskWeights:
    """The weight of each finished adapter for each row of the batch: one object, which all layers of a model share.

    A layer adds weight * update of a task to the rows for which the weight is not 0, and computes it for those alone.
    """

    def __init__(self, adapters: Sequence[str]):
        self.adapters, self.rows = list(adapters), 0
        self.acting: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def set(self, weights: torch.Tensor) -> None:
        """From now on: weights [rows, tasks], in the order of `adapters`."""
        self.rows = len(weights)
        found = [(name, weights[:, t].nonzero().view(-1), weights[:, t]) for t, name in enumerate(self.adapters)]
        self.acting = [(name, index, column[index]) for name, index, column in found if index.numel()]

    def of(self, x: torch.Tensor, layer: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(adapter, rows [n] of a layer's input x [rows, ..., in] on which it acts, their weights [n, 1, ...]).

        A search with several beams has several rows, one behind the other, for each that was weighted.

        Raises:
            ValueError: the rows of x are not those that were weighted.
        """
        copies, rest = divmod(len(x), self.rows) if self.rows else (0, 1)
        if rest or (copies != 1 and x.ndim < 3):
            raise ValueError(
                f"layer {layer} gets {len(x)} rows, and the tasks were weighted for {self.rows} prompts: where tokens "
                "of different prompts are mixed (experts), tasks cannot be routed; load the stack without route="
            )
        for name, index, weight in self.acting:
            index = (index[:, None] * copies + torch.arange(copies, device=index.device)).view(-1).to(x.device)
            shape = (-1, *(1,) * (x.ndim - 1))
            yield name, index, weight.repeat_interleave(copies).to(x.device).view(shape)


def weight_tasks(model: nn.Module, adapters: Sequence[str]) -> TaskWeights:
    """Make the finished adapters of a model, none of them merged, act by [`TaskWeights`]; none does until it is set."""
    weights = TaskWeights(adapters)
    for _, layer in named_layers(model):
        layer.task_weights = weights
    return weights

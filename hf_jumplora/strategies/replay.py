"""Replay: examples of the earlier tasks mixed into a new task's stream."""

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch.utils.data import ConcatDataset, Subset

from .base import Strategy


@dataclass
class Replay(Strategy):
    """Adds to a task's training set a memory of earlier tasks' examples, drawn with `seed`; the trainer shuffles.

    fraction: of each earlier task's training set, the same examples in all later tasks; at least one.
    reservoir: instead, a memory of so many examples in all, by reservoir sampling over the earlier tasks' examples.
    The memory is a function of the seed and the tasks' sizes: no state. It refers to rows of the earlier training sets,
    so these must be at hand. A task gets longer by its memory: with `max_steps` it does not.
    """

    tuning = ("fraction", (0.02, 0.1, 0.01, 0.2, 0.05))

    fraction: float = 0.02
    reservoir: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if self.reservoir is not None and self.reservoir < 1:
            raise ValueError(f"reservoir is a number of examples, got {self.reservoir}")

    def check(self, mode, config):
        if mode in ("joint", "separate"):
            raise ValueError(f"mode {mode!r} has no earlier tasks to replay: use a sequential or an incremental method")

    def memory(self, sizes: list[int]) -> list[list[int]]:
        """Which rows of each earlier training set are replayed, in order."""
        if self.reservoir is None:
            return [
                sorted(random.Random(f"{self.seed} {k}").sample(range(size), max(1, round(self.fraction * size))))
                for k, size in enumerate(sizes)
            ]
        rows = [(k, i) for k, size in enumerate(sizes) for i in range(size)]
        draw, kept = random.Random(self.seed), rows[: self.reservoir]
        for seen, row in enumerate(rows[self.reservoir :], self.reservoir + 1):  # algorithm R
            place = draw.randrange(seen)
            if place < self.reservoir:
                kept[place] = row
        return [sorted(i for task, i in kept if task == k) for k in range(len(sizes))]

    def replayed(self, earlier: list[Any]) -> list[Any]:
        """The rows of each earlier training set that are in the memory. Raises ValueError if one is not at hand."""
        missing = [k for k, rows in enumerate(earlier) if rows is None]
        if missing:
            raise ValueError(
                f"replay needs the training data of all earlier tasks, and that of task number {missing[0]} is not at "
                "hand: give the earlier tasks with their data, or use a method without replay"
            )
        kept = zip(earlier, self.memory([len(rows) for rows in earlier]), strict=True)
        return [some_rows(rows, chosen) for rows, chosen in kept]

    def training_data(self, dataset: Any, index: int, earlier: list[Any]) -> Any:
        return joined([dataset, *self.replayed(earlier)])


def some_rows(rows: Any, chosen: list[int]) -> Any:
    """The rows of a data set with these numbers."""
    return rows.select(chosen) if isinstance(rows, Dataset) else Subset(rows, chosen)


def joined(parts: list[Any]) -> Any:
    """Data sets one behind the other."""
    if all(isinstance(rows, Dataset) for rows in parts):
        return concatenate_datasets(parts)
    return ConcatDataset(parts) if len(parts) > 1 else parts[0]

"""A task that makes the model forget, and can be removed again (after GS-LoRA, arXiv 2403.11530)."""

import hashlib
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tuner import JumpLoraLayer, named_layers
from .base import Strategy
from .moments import evaluation
from .replay import some_rows


@dataclass(repr=False)
class Unlearn(Strategy):
    """For one task alone, whose training set is what must not be forgotten:
    `Task("forget-x", kept rows, strategies=[Unlearn(rows to forget)])`. Its loss is

        loss(kept rows) + weight * max(0, bound - loss(rows to forget)),

    the second of a batch as large as the step's own, drawn by seed and step, without dropout. After each step the
    factors theta = (A [r, in], B [out, r]) of every layer become max(0, 1 - lr * group_weight / ||theta||_F) theta, the
    proximal step of group_weight * sum over layers of ||theta||_F: layers that are not needed end at 0 exactly.

    forget: rows as the trainer takes them, with labels. bound: of their mean loss; None: log of the number of answers
    (classes, or tokens of the vocabulary), the loss of a uniform guess. The released code adds the norms to the loss
    under AdamW instead, with which no layer gets to 0; its weight 0.03 and bound 110 are those of another loss.
    """

    requires = frozenset({"whole_model"})

    forget: Any
    weight: float = 1.0
    bound: float | None = None
    group_weight: float = 0.0
    layers: list[tuple[JumpLoraLayer, str]] = field(default_factory=list, init=False)
    examples: Any = field(default=None, init=False)
    drawn: tuple[int, int] = field(default=(0, 0), init=False)  # (step, batches drawn in it)

    def __post_init__(self):
        if not len(self.forget):
            raise ValueError("Unlearn has no rows to forget")
        if not self.weight > 0 or self.group_weight < 0 or (self.bound is not None and not self.bound > 0):
            raise ValueError(
                f"Unlearn needs weight > 0, bound > 0 and group_weight >= 0, got weight={self.weight}, "
                f"bound={self.bound}, group_weight={self.group_weight}"
            )

    def __repr__(self):  # a restarted run knows the rows by their digest
        rows = sorted(_contents(self.forget, sorted(self.forget[0])))
        digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
        options = f"weight={self.weight}, bound={self.bound}, group_weight={self.group_weight}"
        return f"Unlearn({len(self.forget)} rows {digest}, {options})"

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                f"Unlearn is a task on top of the others that can be removed again, and mode {mode!r} has no such "
                "tasks: use an incremental method"
            )

    def check_run(self, others, args, sharding):
        if self.group_weight and sharding.startswith("zero"):
            raise ValueError(
                "Unlearn's group_weight acts after each step of the optimizer, which DeepSpeed replaces: set it to 0, "
                "or train with DDP"
            )

    def training_data(self, dataset, index, earlier):
        keys = sorted(dataset[0].keys() & self.forget[0].keys() - {"attention_mask"})
        if not keys:
            raise ValueError(
                f"the rows to forget have {sorted(self.forget[0])}, those of the task {sorted(dataset[0])}: give rows "
                "as the trainer takes them (of a text task: `Encoder.train_rows`)"
            )
        if both := _contents(dataset, keys) & _contents(self.forget, keys):
            raise ValueError(
                f"{len(both)} of the rows to forget are training rows of the same task too (a replayed one, if there "
                f"is Replay), the first with {min(both)[:80]}: leave them out of one of the two"
            )
        return dataset

    def on_task_start(self, model, adapter, examples):
        self.layers, self.examples = [(layer, adapter) for _, layer in named_layers(model, adapter)], examples
        self.drawn = (0, 0)

    def on_optimizer(self, optimizer):
        if self.group_weight:  # right after the step, never after one that fp16 skips
            optimizer.register_step_post_hook(self._shrink)

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for layer, adapter in self.layers:
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            norm = torch.hypot(A.norm(), B.norm()).clamp_min(1e-30)
            keep = (1 - rate_of[id(A)] * self.group_weight / norm).clamp_min(0)
            A.mul_(keep)
            B.mul_(keep)

    def penalty(self, model, inputs, adapter, output):
        size = next(len(v) for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim)
        with evaluation(model):
            forgotten = model.base_model(**self._draw(size))  # past the hook that has called this
        loss, bound = forgotten.get("loss"), self.bound
        if loss is None:
            raise ValueError("Unlearn raises the model's own loss on the rows to forget, and it has none: give labels")
        if bound is None:
            bound = math.log(forgotten["logits"].shape[-1])
        return self.weight * (bound - loss.float()).clamp_min(0)

    def _draw(self, size: int) -> dict[str, Any]:
        """A batch of rows to forget: a function of seed, step and the batches drawn in it before."""
        before = self.drawn[1] if self.drawn[0] == self.step else 0
        self.drawn = (self.step, before + 1)
        count = min(size, len(self.forget))
        chosen = random.Random(f"{self.seed} {self.step} {before}").sample(range(len(self.forget)), count)
        return next(self.examples(count, some_rows(self.forget, chosen), count))

    def on_task_end(self, model, adapter, examples):
        self.layers, self.examples = [], None


def _contents(rows: Any, keys: list[str]) -> set[str]:
    """What each row holds under these keys, as text."""
    return {json.dumps([row[key] for key in keys], default=lambda tensor: tensor.tolist()) for row in rows}

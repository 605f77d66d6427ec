"""Gates on ranks: SoRA (arXiv 2311.11696) and CoDyRA (arXiv 2412.01004) close them, DyLoRA (arXiv 2210.07558) draws."""

import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tuner import JumpLoraLayer, named_layers
from .base import Strategy, check_alone, refuse_options


def soft_threshold(g: torch.Tensor, width: float) -> torch.Tensor:
    """sign(g) max(|g| - width, 0), of any shape."""
    return g.sign() * (g.abs() - width).clamp_(min=0)


@dataclass
class RankGates(Strategy):
    """The update is s B diag(g) A with a trained g [r] of each layer, and g <- T_w(g), the soft threshold of width w,
    after each optimizer step. What is 0 in the end is gone from the finished adapter, which is an ordinary one.

    g starts at N(0, 1), drawn by `seed` and the layer's name. It has no weight decay, and is trained at the factors'
    learning rate by the optimizer of all else.

    The operator is that of both papers. Both released codes close |g| up to 2 w instead, and SoRA's adds its L1 term to
    the loss as well.
    """

    layers: list[tuple[JumpLoraLayer, str]] = field(default_factory=list, init=False, repr=False)

    def width(self, rate: float) -> float:
        """Of the soft threshold after step number `self.step` + 1, at this learning rate of g."""
        raise NotImplementedError

    def check(self, mode, config):
        if mode == "sequential":
            raise ValueError(
                f"{type(self).__name__} starts each task with gates of its own, and mode 'sequential' goes on with "
                "the adapter before: use an incremental method"
            )

    def check_run(self, others, args, sharding):
        if sharding.startswith("zero"):
            raise ValueError(
                f"{type(self).__name__} changes its gates after each step of the optimizer, which DeepSpeed replaces: "
                "train it with DDP or FSDP2"
            )
        for other in others:
            if {"penalty", "on_gradients"} & other.hooks:
                raise ValueError(
                    f"{type(self).__name__} puts a gate between A and B, and {other!r} may read or change them as if "
                    "there were none: leave one of the two out"
                )

    def on_task_start(self, model, adapter, examples):
        self.layers = []
        for name, layer in named_layers(model, adapter):
            generator = torch.Generator().manual_seed((self.seed << 32) + zlib.crc32(name.encode()))
            r = len(layer.jumplora_A[adapter])
            layer.gate_ranks(adapter, torch.randn(r, generator=generator, dtype=torch.float32))
            self.layers.append((layer, adapter))

    def on_optimizer(self, optimizer):
        # Right after the step, before the schedule has changed the learning rate; never after a step that fp16 skips.
        optimizer.register_step_post_hook(self._close)

    @torch.no_grad()
    def _close(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for layer, adapter in self.layers:
            g = layer.jumplora_g[adapter]
            g.copy_(soft_threshold(g, self.width(rate_of[id(g)])))

    def on_task_end(self, model, adapter, examples):
        self.layers = []

    def memory_bytes(self, layers, tasks):
        return sum(4 * layer.r for layer in layers)


@dataclass
class SoRA(RankGates):
    """SoRA: width = learning rate * weight (arXiv 2311.11696, eq. 6: the proximal step of weight * |g|_1).

    The released code has a constant width of 3e-4 to 1e-3 at learning rate 8e-4: weight 0.4 to 1.25.
    """

    weight: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"SoRA needs weight >= 0, got {self.weight}")

    def width(self, rate):
        return rate * self.weight


@dataclass
class CoDyRA(RankGates):
    """CoDyRA: width 0 for the first half of a task, then 50 equal stairs from 0 to `largest`, whatever the learning
    rate (arXiv 2412.01004; published: 5e-3)."""

    requires = frozenset({"all_steps"})
    tuning = ("largest", (5e-3, 5e-2, 5e-4, 5e-1))

    largest: float = 5e-3

    def __post_init__(self):
        if self.largest < 0:
            raise ValueError(f"CoDyRA needs largest >= 0, got {self.largest}")

    def width(self, rate):
        done, half = self.step + 1, self.steps / 2
        if done <= half:
            return 0.0
        return self.largest * min(math.floor(50 * (done - half) / (self.steps - half)), 49) / 49


@dataclass
class DyLora(Strategy):
    """A step trains the first b ranks alone: the update is (r / b) s sum over i <= b of b_i a_i, with b drawn from
    1, ..., r by seed and step, one for all layers (a share of r, where layers differ in r). So the first b ranks of the
    finished adapter are an adapter of rank b at alpha / b: `hf-jumplora squeeze --rank b --prefix`.

    frozen: the ranks before b act, but rank b alone gets gradients. AdamW's momentum moves ranks that were not drawn,
    as in the released code.
    """

    frozen: bool = False

    def check(self, mode, config):
        if config.gate or mode == "sequential":
            raise ValueError(
                "DyLora trains nested ranks of one task, which neither a gate on entries nor the adapter of the task "
                "before leaves nested: use it through method='dylora'"
            )

    def check_run(self, others, args, sharding):
        because = "they take all ranks for the update"
        check_alone("DyLora", others, sharding, "sets before each step which ranks of whole factors act", because)
        refuse_options(args, ("factor_optimizer",), "takes all ranks of a factor at once, and DyLora trains some")

    def on_task_start(self, model, adapter, examples):
        for _, layer in named_layers(model, adapter):
            layer.gate_ranks(adapter, torch.ones(len(layer.jumplora_A[adapter])))
            layer.jumplora_g[adapter].requires_grad_(False)

    def drawn(self, step: int, r: int) -> int:
        """b of a step of the task, from 1 to r."""
        return 1 + int(r * random.Random(f"{self.seed} {step}").random())

    @torch.no_grad()
    def on_step_begin(self, model, adapter):
        for _, layer in named_layers(model, adapter):
            g = layer.jumplora_g[adapter]
            b = self.drawn(self.step, len(g))
            g.zero_()[:b] = len(g) / b

    @torch.no_grad()
    def on_step_end(self, model, adapter):  # an evaluation between the steps is of all ranks
        for _, layer in named_layers(model, adapter):
            layer.jumplora_g[adapter].fill_(1.0)

    def on_gradients(self, model, adapter):
        for _, layer in named_layers(model, adapter) if self.frozen else ():
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            b = self.drawn(self.step, len(A))
            for grads in (A.grad, B.grad.T if B.grad is not None else None):
                if grads is not None:
                    grads[: b - 1] = 0

    def memory_bytes(self, layers, tasks):
        return sum(4 * layer.r for layer in layers)

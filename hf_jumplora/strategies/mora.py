"""The ranks of all tasks compete for each token: MoRA (arXiv 2506.21035), SMoRA (arXiv 2501.15103)."""

import math
import zlib
from dataclasses import dataclass, field

import torch
from accelerate.utils import reduce
from torch import nn

from ..tuner import named_layers
from .base import Strategy, check_alone, refuse_options


class Competition(Strategy):
    """The new adapter's ranks and those of the earlier tasks, which are frozen, compete for each token."""

    requires = frozenset({"past_factors"})

    def routing(self) -> dict[str, float]:
        """`rank_routing` of the adapters' configs."""
        raise NotImplementedError

    def check(self, mode, config):
        if config.gate or mode != "incremental":
            name = type(self).__name__
            raise ValueError(
                f"{name} chooses among the ranks of a new adapter and of the frozen ones before it, without a gate on "
                f"entries: use it through method={name.lower()!r}"
            )

    def check_run(self, others, args, sharding):
        name = type(self).__name__
        check_alone(name, others, sharding, "keeps the factors of all tasks", "they take s B A for the update")
        refuse_options(args, ("factor_optimizer", "allora_eta"), f"takes s B A for the update, which {name} has not")

    def on_task_start(self, model, adapter, examples):
        routing = self.routing()
        for name, layer in named_layers(model, adapter):
            for parent in layer.configs[adapter].parent_adapters:
                if layer.configs[parent].rank_routing != routing:
                    raise ValueError(
                        f"layer {name}: {type(self).__name__} with {routing} on top of {parent!r} with "
                        f"{layer.configs[parent].rank_routing}: all tasks of a stack need the same"
                    )
            layer.configs[adapter].rank_routing = routing

    def memory_bytes(self, layers, tasks):
        """The factors of the earlier tasks."""
        return sum(4 * tasks * layer.r * (layer.out_features + layer.in_features) for layer in layers)


@dataclass
class Mora(Competition):
    """y = W x + s sum_i w_i b_i z_i over the ranks of all tasks, those of earlier tasks frozen: z_i = a_i x, and the k
    ranks (at least 2) with the largest z_i / ||z|| share the weights w = softmax of it / tau. When the model is
    evaluated, ranks below delta act no more.

    Defaults of the released code for language models (TRACE). It scales a task's ranks by 2 while they are trained and
    by 1 after it, and keeps a block of ranks that nobody trained; here s is one number and there is no such block.
    """

    tuning = ("tau", (0.03, 0.1, 0.3, 1.0, 0.01))

    k: int = 8
    tau: float = 0.03
    delta: float = 0.2

    def __post_init__(self):
        if self.k < 1 or not self.tau > 0 or not 0 <= self.delta < 1:
            raise ValueError(
                f"Mora needs k >= 1, tau > 0 and 0 <= delta < 1, got k={self.k}, tau={self.tau}, delta={self.delta}"
            )

    def routing(self):
        return {"k": self.k, "tau": self.tau, "delta": self.delta}


@dataclass
class SMoRA(Competition):
    """y = W x + (alpha / k) B (g * A x): a trained router W_r [R, in] gives p = sigmoid(W_r x), the k ranks with the
    largest p_i + b_i act, and g_i = k p_i / (sum of p over these k), 0 for all others.

    b [R] has no gradient. After each step b_i <- b_i + rate sign(mean n - n_i), where n_i counts the tokens that chose
    rank i, padding included, over the step's micro-batches and processes: so ranks are chosen equally often without a
    loss for it. The released code takes p + b for p in g too, and moves b in each forward pass.

    The paper trains several tasks at once. One after the other is ours: R is the ranks of all tasks, of which the rows
    of W_r, A, B and b of earlier tasks are frozen.
    """

    tuning = ("k", (8, 4, 2, 16, 1))

    k: int = 8
    rate: float = 1e-5
    counts: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)  # layer -> n [R], int64

    def __post_init__(self):
        if self.k < 1 or not 0 <= self.rate < math.inf:
            raise ValueError(f"SMoRA needs k >= 1 and a finite rate >= 0, got k={self.k}, rate={self.rate}")

    def routing(self):
        return {"k": self.k}

    def on_task_start(self, model, adapter, examples):
        super().on_task_start(model, adapter, examples)
        self.counts = {}
        for name, layer in named_layers(model, adapter):
            layer.route_ranks(adapter)
            bank = layer.closure([adapter])
            generator = torch.Generator().manual_seed((self.seed << 32) + zlib.crc32(f"{name} {len(bank)}".encode()))
            router = torch.empty(layer.jumplora_router[adapter].shape)
            nn.init.kaiming_uniform_(router, a=math.sqrt(5), generator=generator)  # as that of nn.Linear
            layer.jumplora_router[adapter].data.copy_(router)
            ranks = sum(len(layer.jumplora_A[member]) for member in bank)
            self.counts[name] = torch.zeros(ranks, dtype=torch.int64, device=layer.jumplora_A[adapter].device)

    def penalty(self, model, inputs, adapter, output):
        """None: only counts. It comes once for each micro-batch, after its forward pass, and never in evaluation; a
        layer that checkpointing computes again has counted the same tokens again, and nobody reads it."""
        for name, layer in named_layers(model, adapter):
            if layer.rank_counts is not None:
                self.counts[name] += layer.rank_counts
                layer.rank_counts = None

    @torch.no_grad()
    def on_step_end(self, model, adapter):
        counts = list(self.counts.values())
        total = reduce(torch.cat([n.to(counts[0].device) for n in counts]), "sum")
        for (_, layer), n in zip(named_layers(model, adapter), total.split([len(n) for n in counts]), strict=True):
            b = layer.jumplora_router_b[adapter]
            b += self.rate * (n.sum() - len(n) * n[-len(b) :]).sign().to(b.device)
        for n in counts:
            n.zero_()

    def on_task_end(self, model, adapter, examples):
        self.counts = {}

    def memory_bytes(self, layers, tasks):
        """The factors and routers of the earlier tasks; the task's own router, its gradient and AdamW's moments."""
        routers = sum(4 * (tasks + 4) * layer.r * layer.in_features for layer in layers)
        return super().memory_bytes(layers, tasks) + routers

"""MoRA (arXiv 2506.21035): the ranks of all tasks compete for each token."""

from dataclasses import dataclass

from ..tuner import named_layers
from .base import Strategy, check_alone, refuse_options


@dataclass
class Mora(Strategy):
    """y = W x + s sum_i w_i b_i z_i over the ranks of all tasks, those of earlier tasks frozen: z_i = a_i x, and the k
    ranks with the largest z_i / ||z|| share the weights w = softmax of it / tau. When the model is evaluated, ranks
    below delta act no more.

    Defaults of the released code for language models (TRACE). It scales a task's ranks by 2 while they are trained and
    by 1 after it, and keeps a block of ranks that nobody trained; here s is one number and there is no such block.
    """

    requires = frozenset({"past_factors"})
    tuning = ("tau", (0.03, 0.1, 0.3, 1.0, 0.01))

    k: int = 8
    tau: float = 0.03
    delta: float = 0.2

    def __post_init__(self):
        if self.k < 1 or not self.tau > 0 or not 0 <= self.delta < 1:
            raise ValueError(
                f"MoRA needs k >= 1, tau > 0 and 0 <= delta < 1, got k={self.k}, tau={self.tau}, delta={self.delta}"
            )

    def check(self, mode, config):
        if config.gate or mode != "incremental":
            raise ValueError(
                "MoRA chooses among the ranks of a new adapter and of the frozen ones before it, without a gate on "
                "entries: use it through method='mora'"
            )

    def check_run(self, others, args, sharding):
        check_alone("MoRA", others, sharding, "keeps the factors of all tasks", "they take s B A for the update")
        refuse_options(args, ("factor_optimizer", "allora_eta"), "takes s B A for the update, which MoRA has not")

    def on_task_start(self, model, adapter, examples):
        routing = {"k": self.k, "tau": self.tau, "delta": self.delta}
        for name, layer in named_layers(model, adapter):
            for parent in layer.configs[adapter].parent_adapters:
                if layer.configs[parent].rank_routing != routing:
                    raise ValueError(
                        f"layer {name}: MoRA with {routing} on top of {parent!r} with "
                        f"{layer.configs[parent].rank_routing}: all tasks of a stack need the same"
                    )
            layer.configs[adapter].rank_routing = routing

    def memory_bytes(self, layers, tasks):
        """The factors of the earlier tasks."""
        return sum(4 * tasks * layer.r * (layer.out_features + layer.in_features) for layer in layers)

"""L2: stay near the adapter of the task before."""

from dataclasses import dataclass, field

import torch

from ..tuner import named_layers
from .base import Strategy


@dataclass
class L2(Strategy):
    """weight / 2 * || theta - theta_before ||^2, theta = A [r, in] and B [out, r] of all layers of the one adapter that
    is trained sequentially, theta_before their values at the start of the task. Nothing in the first task.

    State: none (the values are those of the adapter in the stack), but for the number of tasks.
    """

    weight: float = 1.0
    tasks: int = field(default=0, init=False, repr=False)
    before: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"the weight of {type(self).__name__}'s penalty must not be negative, got {self.weight}")

    def check(self, mode, config):
        if config.gate or mode != "sequential":
            raise ValueError(
                f"{type(self).__name__} holds the parameters of one adapter that is trained on: a new adapter for each "
                "task starts at nothing, and a gate changes what they mean from task to task. Use method 'l2' or "
                "'ewc', or seqlora with this strategy"
            )

    @staticmethod
    def parameters(model, adapter):
        """(name, parameter) of each of the adapter's factors, as the model has them now."""
        for name, layer in named_layers(model, adapter):
            yield f"{name}.A", layer.jumplora_A[adapter]
            yield f"{name}.B", layer.jumplora_B[adapter]

    def on_task_start(self, model, adapter, examples):
        self.before = {name: p.detach().clone() for name, p in self.parameters(model, adapter)} if self.tasks else {}

    def importance(self, name: str) -> torch.Tensor | float:
        return 1.0

    def penalty(self, model, inputs, adapter, output):
        if not self.before:
            return None
        terms = [
            (self.importance(name) * (p - self.before[name]).square()).sum()
            for name, p in self.parameters(model, adapter)
        ]
        return self.weight / 2 * torch.stack(terms).sum()

    def on_task_end(self, model, adapter, examples):
        self.tasks += 1

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks)}

    def load_state_dict(self, state):
        self.tasks = int(state["tasks"])

"""Drift: keep the layers' outputs on the earlier tasks' texts as they are."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..tuner import named_layers
from .base import Strategy
from .moments import check_examples, input_moments, layer_penalty


@dataclass
class Drift(Strategy):
    """weight * sum over layers of tr(dW C dW^T) = the expected squared change of the layer's output by the new update.

    C [in, in] is the second moment of the layer's inputs: mean over tokens of x x^T, over `examples` training examples
    of each earlier task, averaged over these tasks. dW is the scaled update as it acts now (with a gate: the
    interpolated one, whose threshold gets no gradient). No published method: kfac without its output factor. State: C
    of each layer, whatever the number of tasks.

    general: texts (causal models), or rows as the trainer takes them, of no task: the zeroth task, which keeps what the
    base model does there. True: the run's own general text. Give the same ones when a run is restarted.
    """

    requires = frozenset({"forward"})

    weight: float = 1.0
    examples: int = 512
    general: Any = field(default=None, repr=False)
    tasks: int = field(default=0, init=False, repr=False)
    C: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"the weight of the drift penalty must not be negative, got {self.weight}")
        check_examples(self.examples, self.general)

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                "drift penalises a new task's own adapter: use it with an incremental method, such as drift"
            )

    def on_task_start(self, model, adapter, examples):
        if self.general is not None and not self.tasks:
            self._remember(model, adapter, examples(self.examples, self.general))
        for name, layer in named_layers(model, adapter):
            if name in self.C:
                self.C[name] = self.C[name].to(layer.jumplora_A[adapter].device)

    def penalty(self, model, inputs, adapter, output):
        if not self.tasks:
            return None
        layers = named_layers(model, adapter)
        return self.weight * sum(
            layer_penalty(layer, adapter, [(None, self.C[name])]) for name, layer in layers if name in self.C
        )

    def on_task_end(self, model, adapter, examples):
        self._remember(model, adapter, examples(self.examples))

    def _remember(self, model, adapter, examples) -> None:
        for name, C in input_moments(model, adapter, examples).items():
            self.C[name] = torch.lerp(self.C.get(name, torch.zeros_like(C)), C, 1 / (self.tasks + 1))
        self.tasks += 1

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks), **self.C}

    def load_state_dict(self, state):
        self.C = dict(state)
        self.tasks = int(self.C.pop("tasks"))

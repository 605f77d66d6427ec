"""O-LoRA (arXiv 2310.14152): the new update reads directions that the earlier ones do not read."""

from dataclasses import dataclass, field

import torch

from ..tuner import named_layers
from .base import Strategy


@dataclass
class OLora(Strategy):
    """lambda1 * sum over layers of sum |A_past A^T| + lambda2 * sum over layers of (||A||_2 + ||B||_2).

    A_past [earlier ranks, in] holds the A of all earlier tasks, A [r, in] and B [out, r] are the new ones. As in the
    released code: absolute values (the paper squares them), norms that are not squared. Defaults are those of orders
    1 to 3. With a gate the factors are kept apart as without; the gated updates need not be. State: A_past of each
    layer, r * in floats more per task.
    """

    tuning = ("lambda1", (0.5, 5.0, 0.05, 50.0, 0.005))

    lambda1: float = 0.5
    lambda2: float = 0.0
    past: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.lambda1 < 0 or self.lambda2 < 0:
            raise ValueError(f"O-LoRA's lambda1 and lambda2 must not be negative, got {self.lambda1}, {self.lambda2}")

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                "O-LoRA needs a new adapter for each task: use it with an incremental method, such as olora"
            )

    def on_task_start(self, model, adapter, examples):
        for name, layer in named_layers(model, adapter):
            if name in self.past:
                self.past[name] = self.past[name].to(layer.jumplora_A[adapter].device)

    def penalty(self, model, inputs, adapter, output):
        if not (self.past or self.lambda2):
            return None
        total = 0.0
        for name, layer in named_layers(model, adapter):
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            term = self.lambda2 * (torch.linalg.vector_norm(A) + torch.linalg.vector_norm(B))
            if name in self.past:
                with torch.autocast(A.device.type, enabled=False):
                    term = term + self.lambda1 * (self.past[name] @ A.T).abs().sum()
            total = total + term
        return total

    def on_task_end(self, model, adapter, examples):
        for name, layer in named_layers(model, adapter):
            A = layer.jumplora_A[adapter].detach().clone()
            self.past[name] = torch.cat([self.past[name], A]) if name in self.past else A

    def state_dict(self):
        return dict(self.past)

    def load_state_dict(self, state):
        self.past = dict(state)

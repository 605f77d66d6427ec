"""LwF (arXiv 1606.09282): answer the new task's inputs much as the model before it did."""

from dataclasses import dataclass

import torch

from ..tuner import can_continue, named_layers, without_adapter
from .base import Strategy


@dataclass
class Lwf(Strategy):
    """weight * temperature^2 * mean KL(p_before || p), p = softmax(logits / temperature), on the task's own inputs.

    The mean is over examples, or over the answer tokens (labels other than -100). p_before is the stack without the new
    adapter: no second model, one more forward pass a step. Nothing in the first task. No state. The temperature 2 is
    the paper's; its weight is 1.
    """

    requires = frozenset({"whole_model"})

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self):
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(
                f"LwF needs weight >= 0 and temperature > 0, got weight={self.weight}, temperature={self.temperature}"
            )

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                "LwF's teacher is the stack without the new adapter: use an incremental method, such as lwf"
            )

    def penalty(self, model, inputs, adapter, output):
        if not any(layer.configs[adapter].parent_adapters for _, layer in named_layers(model, adapter)):
            return None
        with without_adapter(model, adapter):
            before = model(**inputs)["logits"]
        before, now = before.float(), output["logits"].float()
        if now.ndim == 3:
            labels = inputs["labels"]
            if can_continue(model):
                before, now, labels = before[:, :-1], now[:, :-1], labels[:, 1:]
            before, now = before[labels != -100], now[labels != -100]
        before, now = ((t / self.temperature).log_softmax(-1) for t in (before, now))
        possible = before > -torch.inf  # answers that the model itself has closed
        divergence = before.exp() * (before - now).masked_fill(~possible, 0.0)
        return self.weight * self.temperature**2 * divergence.sum() / len(now)

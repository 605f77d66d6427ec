"""N-LoRA (arXiv 2410.10179): updates with few large entries seldom collide."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..ops.penalty import l1_penalty
from ..tuner import named_layers
from .base import Strategy


@dataclass
class NLora(Strategy):
    """weight * sum over layers of ||dW||_1, in every task; dW = B A [out, in], not scaled by alpha / r.

    l1: "delta" is the paper's penalty, on the entries of the update (with a gate: the interpolated one, whose threshold
    gets no gradient). "released" is what the published code computes: the L1 norm of the product A B [r, r], which
    exists for square layers only. weight: published 0.4 for orders 1 to 3, other values for each other order.
    """

    weight: float = 0.4
    l1: Literal["delta", "released"] = "delta"

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"the weight of N-LoRA's penalty must not be negative, got {self.weight}")
        if self.l1 not in ("delta", "released"):
            raise ValueError(f"l1 is 'delta' (the paper) or 'released' (its code), got {self.l1!r}")

    def check(self, mode, config):
        if self.l1 == "released" and config.gate:
            raise ValueError(
                "l1='released' looks at the factors and not at the gated update: use l1='delta' with a gate"
            )

    def on_task_start(self, model, adapter, examples):
        if self.l1 == "delta":
            return
        for name, layer in named_layers(model, adapter):
            if layer.in_features != layer.out_features:
                raise ValueError(
                    f"l1='released' multiplies A and B the wrong way round, which layer {name} "
                    f"({layer.out_features} x {layer.in_features}, not square) does not allow: use l1='delta', or "
                    "adapt square layers only"
                )

    def penalty(self, model, inputs, adapter, output):
        total = 0.0
        for _, layer in named_layers(model, adapter):
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            if self.l1 == "released":
                with torch.autocast(A.device.type, enabled=False):
                    term = (A @ B).abs().sum()
            else:
                log_tau, mix = None, 0.0
                if adapter in layer.jumplora_gate:
                    log_tau, mix = layer.gate(adapter).log_tau.detach(), layer.gate(adapter).mix
                term = l1_penalty(A, B, log_tau, mix=mix, free=layer.free(adapter))
            total = total + term
        return self.weight * total

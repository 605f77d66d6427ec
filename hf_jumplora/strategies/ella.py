"""ELLA (arXiv 2601.02232): keep a new update away from the entries where the sum of the old ones is large."""

from dataclasses import dataclass, field

import torch

from ..ops.penalty import SparsePast, overlap_penalty, sparse_past
from ..tuner import named_layers
from .base import Strategy


SPARSE_PAST = 0.12  # fraction of non-zero entries up to which the penalty goes over them alone (docs/performance.md)


@dataclass
class Ella(Strategy):
    """weight * mean over layers of || dW * W_past ||_F^2, W_past = sum of the earlier tasks' scaled updates.

    dW is the update as it acts now (with a gate: the interpolated one). As in the code published with JumpLoRA
    (arXiv 2604.16171) the threshold gets no gradient from the penalty. W_past [out, in] float32 per layer, or
    its non-zero entries where they are few, is rebuilt from the adapter stack at the start of each task, so there is no
    state to save.
    """

    weight: float = 3e4
    past: dict[str, torch.Tensor | SparsePast] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"the weight of ELLA's penalty must not be negative, got {self.weight}")

    def on_task_start(self, model, adapter, examples):
        self.past = {}
        for name, layer in named_layers(model, adapter):
            parents = layer.closure(layer.configs[adapter].parent_adapters)
            if parents:
                past = layer.total_update(parents)
                # Entries that hard isolation closes are no part of dW.
                if (free := layer.free_mask(adapter)) is not None:
                    past *= free
                few = past.count_nonzero() <= SPARSE_PAST * past.numel()
                self.past[name] = sparse_past(past) if few else past

    def memory_bytes(self, layers, tasks):
        """W_past (16 bytes per non-zero entry where these are few, else dense float32), and the factors' gradients."""
        if not tasks:
            return 0
        past = factors = 0.0
        for layer in layers:
            entries = layer.out_features * layer.in_features
            past += 16 * layer.changed * entries if layer.changed <= SPARSE_PAST else 4 * entries
            factors += layer.r * (layer.out_features + layer.in_features)
        return round(past + 4 * factors)

    def penalty(self, model, inputs, adapter, output):
        if not self.past:
            return None
        total: torch.Tensor | float = 0.0
        for name, layer in named_layers(model, adapter):
            A, B, config = layer.jumplora_A[adapter], layer.jumplora_B[adapter], layer.configs[adapter]
            log_tau, mix = None, 0.0
            if config.gate:
                log_tau, mix = layer.jumplora_gate[adapter].log_tau.detach(), layer.jumplora_gate[adapter].mix
            total = total + overlap_penalty(
                A, B, log_tau, self.past[name].to(A.device), scaling=layer.scaling[adapter], mix=mix
            )
        return self.weight * total / len(self.past)

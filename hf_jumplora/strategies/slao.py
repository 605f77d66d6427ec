"""SLAO (arXiv 2512.23017): one LoRA, started orthogonally and merged task by task."""

from dataclasses import dataclass, field

import torch

from ..tuner import named_layers
from .base import Strategy


@dataclass
class Slao(Strategy):
    """Task i >= 2 starts from A = Q^T, Q R = QR(A_{i-1}^T), and B = B_{i-1}, both as they were trained; after it

        A_merged = A_i,    B_merged += (B_i - B_merged) / sqrt(i),

    and the merged pair is the model. Q has the signs that make R's diagonal positive, so that the QR decomposition is
    unique. For a run that trains one adapter sequentially (method `slao`) without a gate: B of two gated updates is not
    that of a third. State: B_i [out, r] of the last task for each layer, the same size whatever the number of tasks.
    """

    tasks: int = field(default=0, init=False, repr=False)
    trained: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    merged: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def check(self, mode, config):
        if config.gate or mode != "sequential":
            raise ValueError("SLAO trains one LoRA without a gate sequentially; use it through method='slao'")

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        for name, layer in named_layers(model, adapter):
            if self.tasks:
                A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
                self.merged[name] = B.detach().clone()
                Q, R = torch.linalg.qr(A.T)
                A.copy_((Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T)
                B.copy_(self.trained[name])

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        self.tasks += 1
        for name, layer in named_layers(model, adapter):
            B = layer.jumplora_B[adapter]
            self.trained[name] = B.detach().cpu().clone()
            if self.tasks > 1:
                B.copy_(torch.lerp(self.merged[name], B, self.tasks**-0.5))

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks), **self.trained}

    def load_state_dict(self, state):
        self.trained = dict(state)
        self.tasks = int(self.trained.pop("tasks"))

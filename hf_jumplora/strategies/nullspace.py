"""Null-space projection (Brainstacks, arXiv 2604.01152): a new update writes where the old ones do not."""

from dataclasses import dataclass, field

import torch

from ..tuner import named_layers
from .base import Strategy


def output_directions(update: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal [out, k <= count]: the first left singular vectors of an update [out, in], by randomized SVD.

    Two power iterations and eight vectors more than asked for (arXiv 0909.4061, algorithm 4.4); the random start is
    always the same. Directions of singular values below 1e-6 of the largest are left out.
    """
    width = min(count + 8, *update.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(update.shape[1], width, generator=generator, dtype=torch.float32).to(update)
    Q = torch.linalg.qr(update @ start).Q
    for _ in range(2):
        Q = torch.linalg.qr(update @ torch.linalg.qr(update.T @ Q).Q).Q
    U, sigma, _ = torch.linalg.svd(Q.T @ update, full_matrices=False)
    kept = min(count, int((sigma > 1e-6 * sigma[0]).sum()))
    return Q @ U[:, :kept]


@dataclass
class NullSpace(Strategy):
    """B' = (I - V V^T) B after every step, and the same for its gradient: the outputs of the new update have no part
    along V [out, k], the first `directions` output directions of the earlier tasks' summed update.

    The paper takes V from outputs of the frozen stacks; here it comes from the update itself, so no text is needed, and
    what is stored needs no projection any more. Dense updates only: a gate acts on entries, and the kept entries of a
    projected update are not orthogonal to V. V is rebuilt from the adapter stack: no state.

    directions: published value not known to us.
    """

    requires = frozenset({"whole_model"})
    tuning = ("directions", (64, 16, 128, 8, 256))

    directions: int = 64
    bases: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.directions < 1:
            raise ValueError(f"the null-space projection needs directions >= 1, got {self.directions}")

    def check(self, mode, config):
        if config.gate or mode != "incremental":
            raise ValueError(
                "the null-space projection is exact for dense updates on top of earlier ones only: use it with methods "
                "that train one adapter per task without a gate ('nullspace', 'inclora')"
            )

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        self.bases = {}
        for name, layer in named_layers(model, adapter):
            parents = layer.closure(layer.configs[adapter].parent_adapters)
            if not parents:
                continue
            V = output_directions(layer.total_update(parents), self.directions)
            if V.shape[1] == layer.out_features:
                raise ValueError(
                    f"the earlier tasks' updates of layer {name} fill all of its {layer.out_features} output "
                    "dimensions: lower `directions`, or r"
                )
            self.bases[name] = V

    def on_gradients(self, model, adapter):
        for name, layer in named_layers(model, adapter):
            if name in self.bases and layer.jumplora_B[adapter].grad is not None:
                self._project(name, layer.jumplora_B[adapter].grad)

    @torch.no_grad()
    def on_step_end(self, model, adapter):
        for name, layer in named_layers(model, adapter):
            if name in self.bases:
                self._project(name, layer.jumplora_B[adapter])

    def _project(self, name: str, matrix: torch.Tensor) -> None:
        V = self.bases[name] = self.bases[name].to(matrix.device)
        matrix -= V @ (V.T @ matrix)

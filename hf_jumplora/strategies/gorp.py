"""GORP (arXiv 2507.02503): gradients keep off the space of the earlier tasks' first moments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..tuner import named_layers
from ..tuner.lookup import adapter_config
from .base import Strategy


@dataclass
class Gorp(Strategy):
    """G' = G - S S^T G, S the space of what the earlier tasks' gradients were, for everything that is trained.

    S is orthonormal: [in, k] for A (whose gradient is taken as [in, r]), [out, k] for B [out, r]. After a task Adam's
    first moment M is freed of what S holds, R = M - S S^T M = U Sigma V^T, and the first columns of U are appended
    until ||M||^2 - ||R||^2 + sum of their Sigma^2 >= energy * ||M||^2. The gradient and Adam's first moment keep off S;
    the step itself, which Adam scales entry by entry, does so only nearly.

    energy: published value not known to us.
    full: last parts of the names of adapted layers that are trained in full rank instead, as the paper does with some
    weights (T5: the cross-attention, LLaMA: the MLP's gate). Their adapter is dW [out, in] itself, started at 0, and an
    identity, with scaling 1; G [out, in] is projected on its smaller side.

    Memory grows by at most r * (in + out) values per layer and task, for a layer in full up to min(out, in)^2 in all.
    """

    tuning = ("energy", (0.95, 0.8, 0.99, 0.5, 0.999))

    energy: float = 0.95
    full: Sequence[str] = ()
    spaces: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if not 0 < self.energy <= 1:
            raise ValueError(f"GORP's energy is a fraction in (0, 1], got {self.energy}")
        self.full = (self.full,) if isinstance(self.full, str) else tuple(self.full)

    def check(self, mode, config):
        if self.full and (config.gate or mode != "incremental"):
            raise ValueError("GORP trains layers in full (gorp.full) as dense updates, one per task: use method='gorp'")

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        layers = [(name, layer) for name, layer in named_layers(model, adapter) if name.split(".")[-1] in self.full]
        if missing := set(self.full) - {name.split(".")[-1] for name, _ in layers}:
            raise ValueError(f"gorp.full names {sorted(missing)}, which are no adapted layers: add to target_modules")
        config = adapter_config(model, adapter)
        for name, layer in layers:
            rank = min(layer.out_features, layer.in_features)
            alpha = math.sqrt(rank) if config.use_rslora else rank
            config.rank_pattern = {name: rank, **config.rank_pattern}  # the first that fits counts
            config.alpha_pattern = {name: alpha, **config.alpha_pattern}
            layer.update_layer(adapter, config, rank, alpha, None)
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            nn.init.eye_(B if len(A) == len(B) else A).requires_grad_(False)
            nn.init.zeros_(A if len(A) == len(B) else B)

    def on_optimizer(self, optimizer):
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise ValueError(
                f"GORP reads Adam's first moment, and this optimizer is {type(optimizer).__name__}: use "
                "optim='adamw_torch' and no other optimizer for the factors"
            )
        self.optimizer = optimizer

    def on_gradients(self, model, adapter):
        for key, factor, columns in self._factors(model, adapter):
            if key in self.spaces and factor.grad is not None:
                grad = columns(factor.grad)
                S = self.spaces[key].to(grad.device)
                grad -= (S @ (S.T @ grad.to(S.dtype))).to(grad.dtype)

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        assert self.optimizer is not None
        for key, factor, columns in self._factors(model, adapter):
            if factor not in self.optimizer.state:  # its layer was never called
                continue
            moment = columns(self.optimizer.state[factor]["exp_avg"]).float()
            rest, known = moment, moment.new_zeros(len(moment), 0)
            if key in self.spaces:
                known = self.spaces[key].to(moment.device)
                rest = moment - known @ (known.T @ moment)
            U, sigma, _ = torch.linalg.svd(rest, full_matrices=False)
            missing = self.energy * moment.square().sum() - (moment.square().sum() - rest.square().sum())
            # As many as are needed, none of numerical noise, and no more than there are dimensions.
            count = int((sigma.square().cumsum(0) - sigma.square() < missing).sum())
            count = min(count, int((sigma > 1e-6 * moment.norm()).sum()), len(moment) - known.shape[1])
            space = torch.linalg.qr(torch.cat([known, U[:, :count]], 1)).Q
            self.spaces[key] = space.cpu().contiguous()  # as it is after a restart: another layout rounds differently
        self.optimizer = None

    def _factors(self, model, adapter):
        """(key, parameter, view that puts its input or output side first) of everything that is trained."""
        for name, layer in named_layers(model, adapter):
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            if name.split(".")[-1] in self.full:
                wide = len(A) == len(B)  # then A is dW, else B
                yield f"{name}.W", A if wide else B, torch.Tensor.detach if wide else torch.t
            else:
                yield f"{name}.A", A, torch.t
                yield f"{name}.B", B, torch.Tensor.detach

    def state_dict(self):
        return dict(self.spaces)

    def load_state_dict(self, state):
        self.spaces = dict(state)

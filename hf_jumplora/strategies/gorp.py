"""GORP's LoRA part (arXiv 2507.02503): gradients keep off the space of the earlier tasks' first moments."""

from dataclasses import dataclass, field

import torch

from ..tuner import named_layers
from .base import Strategy


@dataclass
class Gorp(Strategy):
    """G' = G - S S^T G, S the space of what the earlier tasks' gradients were, for each factor of each layer.

    S is orthonormal: [in, k] for A (whose gradient is taken as [in, r]), [out, k] for B [out, r]. After a task Adam's
    first moment M is freed of what S holds, R = M - S S^T M = U Sigma V^T, and the first columns of U are appended
    until ||M||^2 - ||R||^2 + sum of their Sigma^2 >= energy * ||M||^2. The gradient and Adam's first moment keep off S;
    the step itself, which Adam scales entry by entry, does so only nearly.

    energy: published value not known to us. The paper trains full-rank weights too; those are no part of this
    strategy. Memory grows by at most r * (in + out) values a layer and task.
    """

    energy: float = 0.95
    spaces: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if not 0 < self.energy <= 1:
            raise ValueError(f"GORP's energy is a fraction in (0, 1], got {self.energy}")

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

    @staticmethod
    def _factors(model, adapter):
        """(key, parameter, view that puts its input or output side first) of every factor."""
        for name, layer in named_layers(model, adapter):
            yield f"{name}.A", layer.jumplora_A[adapter], torch.t
            yield f"{name}.B", layer.jumplora_B[adapter], torch.Tensor.detach

    def state_dict(self):
        return dict(self.spaces)

    def load_state_dict(self, state):
        self.spaces = dict(state)

"""AltLoRA and AltLoRA+ (arXiv 2505.12455): one factor a step, its gradient projected by the other one."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class AltLora(Optimizer):
    """Alternating, projected steps of factors A [r, in] and B [out, r] whose update is s B A.

    Odd steps move B, even ones A (at the start B = 0, and a step of A would change nothing). With P = B^T B + damping I
    a step of A is, by the paper's Algorithm 1,

        g = P^-1 g_A / s^2,  M <- beta1 P^-1 B^T B' M + (1 - beta1) g,  A <- A - lr (M + weight_decay A)

    where B' is the B of A's last step: momentum is carried to where B is now. B mirrors it. AltLoRA+ (`adaptive`) has
    V <- beta2 V + (1 - beta2) g^2 and steps by M / (sqrt(V) + eps). Neither corrects the moments' bias, as published.

    Args:
        groups: parameter groups with `lr` and `weight_decay`, together those of `pairs`.
        pairs: (A, B, s) of each layer. The gradient of the factor whose turn it is not is left alone.
    """

    def __init__(
        self, groups: list[dict[str, Any]], pairs: list[tuple[nn.Parameter, nn.Parameter, float]], *,
        betas: tuple[float, float], eps: float, damping: float, adaptive: bool,
    ):  # fmt: skip
        super().__init__(groups, {})
        self.pairs, self.betas, self.eps, self.damping, self.adaptive = pairs, betas, eps, damping, adaptive

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]  # torch overloads it for closures
        """One step of every pair that has gradients. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("AltLoRA's steps take no closure")
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for A, B, scaling in self.pairs:
            if A.grad is None or B.grad is None:
                continue
            steps = self.state[B].get("step", 0)
            self.state[B]["step"] = steps + 1
            if steps % 2 == 0:
                self._move(B.mT, B.grad.mT, A.mT, scaling, self.state[B], group_of[id(B)])
            else:
                self._move(A, A.grad, B, scaling, self.state[A], group_of[id(A)])

    def _move(
        self, P: torch.Tensor, grad: torch.Tensor, other: torch.Tensor, scaling: float, state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:  # fmt: skip
        """P [r, n] is A, or B turned over; other [m, r] the other factor."""
        beta1, beta2 = self.betas
        gram = other.T @ other
        gram.diagonal().add_(self.damping)
        if "momentum" not in state:
            state["momentum"], state["other"] = torch.zeros_like(P), other.clone()
        carried = other.T @ state["other"] @ state["momentum"]
        # Without a check of the result, which waits for the device; the damping keeps the matrix positive definite.
        solved = torch.linalg.solve_ex(gram, torch.cat([carried, grad / scaling**2], 1)).result
        momentum, g = solved[:, : P.shape[1]] * beta1, solved[:, P.shape[1] :]
        momentum += (1 - beta1) * g
        state["momentum"], state["other"] = momentum, other.clone()
        move = momentum
        if self.adaptive:
            state["square"] = beta2 * state.get("square", torch.zeros_like(P)) + (1 - beta2) * g.square()
            move = momentum / (state["square"].sqrt() + self.eps)
        P.sub_(move + group["weight_decay"] * P, alpha=group["lr"])

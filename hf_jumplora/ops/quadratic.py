"""Quadratic penalties tr(G E C E^T) on one layer's update; of size [out, in] nothing is kept for the backward pass."""

import torch

from .dispatch import choose_backend


class _GatedPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, B, tau, mix, free, terms, roots):
        with torch.autocast(A.device.type, enabled=False):
            D = B @ A
            slope = 1 - mix * (D.abs() <= tau).to(D.dtype)  # dE/dD: 1 above the threshold, 1 - f below
            if free is not None:
                slope *= free
            E = D.mul_(slope)
            total = sum(_sandwich(E, G, C, roots) for G, C in terms)
            value = (E * total).sum()
            grad_D = total.mul_(slope).mul_(2)
            ctx.save_for_backward(B.T @ grad_D, grad_D @ A.T)
        return value

    @staticmethod
    def backward(ctx, grad):
        grad_A, grad_B = ctx.saved_tensors
        return grad_A * grad, grad_B * grad, None, None, None, None, None


def _sandwich(E, G, C, roots):
    """G E C; with roots G stands for G G^T and C for C C^T. G = None is the identity."""
    if not roots:
        right = E @ C
        return right if G is None else G @ right
    right = (E @ C) if G is None else G.T @ E @ C
    return (right if G is None else G @ right) @ C.T


def quadratic_penalty(A, B, terms, *, scaling, log_tau=None, mix=0.0, free=None, roots=False) -> torch.Tensor:
    """scaling^2 * sum over (G, C) of tr(G E C E^T), a scalar; E as in [`gated_linear`]. Differentiable in A and B.

    A: [r, in]. B: [out, r]. terms: pairs of G [out, out] (None: the identity) and C [in, in], symmetric. With
    `roots=True` they are G [out, k] and C [in, k], which stand for G G^T and C C^T.
    log_tau [1], mix, free (bool [out, in] or None): of a gated update; the threshold gets no gradient.
    Without a gate nothing of size [out, in] is built: tr(G B A C A^T B^T) = sum((B^T G B) * (A C A^T)).
    """
    if log_tau is not None:
        return scaling**2 * _GatedPenalty.apply(A, B, log_tau.detach().exp(), float(mix), free, terms, roots)
    total = A.new_zeros(())
    with torch.autocast(A.device.type, enabled=False):
        for G, C in terms:
            if roots:
                right, left = (A @ C) @ (A @ C).T, B.T @ B if G is None else (B.T @ G) @ (B.T @ G).T
            else:
                right, left = A @ C @ A.T, B.T @ B if G is None else B.T @ G @ B
            total = total + (left * right).sum()
    return scaling**2 * total


class _StackedPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, B, tau, mix, G, C):
        with torch.autocast(A.device.type, enabled=False):
            if _kernels_can_run(A, G):
                from jumplora_kernels import penalty

                value, grad_A, grad_B = penalty(A, B, tau, mix, G, C)
            else:
                value, grad_A, grad_B = _penalty_by_layer(A, B, tau, mix, G, C)
        ctx.save_for_backward(grad_A, grad_B)
        return value

    @staticmethod
    def backward(ctx, grad):
        grad_A, grad_B = ctx.saved_tensors
        return grad_A * grad, grad_B * grad, None, None, None, None


def _kernels_can_run(A: torch.Tensor, G: torch.Tensor) -> bool:
    backend = choose_backend(None, A.device, (A.dtype, G.dtype))
    return backend.startswith("triton") and G.shape[-1] <= 128  # more columns do not fit into registers


def _penalty_by_layer(A, B, tau, mix, G, C):
    """As `jumplora_kernels.penalty`: one [out, in] at a time."""
    grad_A, grad_B, products = torch.empty_like(A), torch.empty_like(B), []
    for layer in range(len(A)):
        D = B[layer] @ A[layer]
        slope = 1 - mix[layer] * (D.abs() <= tau[layer]).to(D.dtype)  # dE/dD: 1 above the threshold, 1 - f below
        E = D.mul_(slope)
        products.append(G[layer].T @ (E @ C[layer]))
        grad_D = torch.mm(G[layer] @ products[-1], C[layer].T, out=E).mul_(slope)
        torch.mm(B[layer].T, grad_D, out=grad_A[layer])
        torch.mm(grad_D, A[layer].T, out=grad_B[layer])
    return torch.stack(products).square().sum(), grad_A.mul_(2), grad_B.mul_(2)


def stacked_penalty(A, B, G, C, *, scaling, log_tau=None, mix=None) -> torch.Tensor:
    """scaling^2 * sum over layers of ||G^T E C||^2, a scalar: [`quadratic_penalty`] with roots, of many layers at once.

    A: [layers, r, in]. B: [layers, out, r]. G: [layers, out, k]. C: [layers, in, k]. log_tau, mix: [layers], of gated
    updates (the threshold gets no gradient). Differentiable in A and B. Nothing of size [out, in] is kept for the
    backward pass, and on a GPU with the Triton kernels nothing of that size is made. Nothing waits for the device.
    """
    if log_tau is not None:
        return scaling**2 * _StackedPenalty.apply(A, B, log_tau.detach().exp(), mix, G, C)
    with torch.autocast(A.device.type, enabled=False):
        return scaling**2 * ((G.mT @ B) @ (A @ C)).square().sum()

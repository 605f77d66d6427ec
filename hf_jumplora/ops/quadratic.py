"""Quadratic penalties tr(G E C E^T) on one layer's update; of size [out, in] nothing is kept for the backward pass."""

import torch


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

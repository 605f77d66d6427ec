"""The specification of the gated linear layer: eager, dense, any dtype. Everything else is compared with this file.

Shapes: weight W [out, in], A [r, in], B [out, r], x [..., in], log_tau [1], free [out, in] or None.
Source: JumpLoRA (arXiv 2604.16171); the gradient of the threshold is the one of the published code.
"""

import torch
import torch.nn.functional as F


class JumpGate(torch.autograd.Function):
    """J = D * 1[|D| > tau], with a rectangle of width `bandwidth` around +-tau as the pseudo-derivative for tau."""

    @staticmethod
    def forward(ctx, D, tau, bandwidth, mean):
        ctx.save_for_backward(D, tau)
        ctx.bandwidth, ctx.mean = bandwidth, mean
        return torch.where(D.abs() > tau, D, torch.zeros_like(D))

    @staticmethod
    def backward(ctx, grad_J):
        D, tau = ctx.saved_tensors
        half = ctx.bandwidth / 2
        # The published gate is jumprelu(D) - jumprelu(-D): where both rectangles cover an entry they cancel.
        band = ((D - tau).abs() < half).to(D.dtype) - ((-D - tau).abs() < half).to(D.dtype)
        grad_tau = -(tau / ctx.bandwidth) * (grad_J * band).sum()
        if ctx.mean:
            grad_tau = grad_tau / D.numel()
        return grad_J * (D.abs() > tau), grad_tau, None, None


def effective_update(A, B, log_tau, *, mix, bandwidth=1e-3, threshold_grad="mean", free=None):
    """E = ((1 - f) D + f J(D)) * free with D = B A: [out, in], float32 or wider, without the scaling."""
    D = B @ A
    J = JumpGate.apply(D, log_tau.to(D.dtype).exp(), bandwidth, threshold_grad == "mean")
    E = (1 - mix) * D + mix * J
    return E if free is None else E * free.to(D.dtype)


def gated_linear_naive(
    x, weight, bias, A, B, log_tau, *, scaling, mix, bandwidth=1e-3, threshold_grad="mean", free=None
):
    """y = x W^T + bias + scaling * x E^T: [..., out] in the dtype of x. `weight=None` gives the update alone."""
    E = effective_update(A, B, log_tau, mix=mix, bandwidth=bandwidth, threshold_grad=threshold_grad, free=free)
    y = scaling * F.linear(x.to(E.dtype), E)
    if weight is not None:
        y = y + F.linear(x, weight, bias).to(E.dtype)
    return y.to(x.dtype)

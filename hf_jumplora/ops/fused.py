"""The gated linear layer by the Triton kernels of `jumplora_kernels` (extra `triton`). Not measured on a GPU yet.

The update is folded into float32 base weights (W + s E: one matrix product). Half-precision ones are multiplied apart
and the update is added on top, because rounding W + s E loses it: of an update a hundredth as large as the weight, 17 %
in bf16 and 2 % in fp16 (relative error of what it adds to y, random weights and update); a thousandth, 86 % and 24 %.
Rounding E apart loses 0.2 % and 0.1 %. `fold=True` folds nonetheless: one product instead of two, and the very weights
of a model that was merged in half precision.

A custom operator, opaque to torch.compile. tau and the mix are read on the GPU: no wait for it, no recompilation.
"""

import torch
import torch.nn.functional as F


@torch.library.custom_op("hf_jumplora::gated_linear_triton", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    fold: bool,
) -> torch.Tensor:  # fmt: skip
    from jumplora_kernels import forward

    base = None
    with torch.autocast(x.device.type, enabled=False):
        if weight is not None and not fold:
            base = F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
            weight = bias = None
        return forward(x, weight, bias, A, B, log_tau, mix, scaling=scaling, free=free, add_to=base)


@_forward.register_fake
def _(x, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold):
    return x.new_empty(x.shape[0], B.shape[0])


@torch.library.custom_op("hf_jumplora::gated_linear_triton_backward", mutates_args=())
def _gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    fold: bool, needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from jumplora_kernels import backward

    base = None
    with torch.autocast(x.device.type, enabled=False):
        if weight is not None and not fold:
            base = grad_y @ weight.to(x.dtype) if needs_x else None
            weight = None
        grad_x, grad_A, grad_B, grad_log_tau = backward(
            grad_y, x, weight, A, B, log_tau, mix, scaling=scaling, bandwidth=bandwidth,
            threshold_grad="mean" if mean else "sum", free=free, needs_x=needs_x, add_to=base,
        )  # fmt: skip
    grad_log_tau = grad_log_tau.reshape(log_tau.shape).to(log_tau.dtype)
    return x.new_empty(0) if grad_x is None else grad_x, grad_A, grad_B, grad_log_tau


@_gradients.register_fake
def _(grad_y, x, weight, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold, needs_x):
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, torch.empty_like(A), torch.empty_like(B), torch.empty_like(log_tau)


def _setup(ctx, inputs, output):
    x, weight, _, A, B, log_tau, mix, *ctx.options, free, ctx.fold = inputs
    # A copy of `mix`: the schedule changes that buffer in place, and the backward must see the value of its forward.
    ctx.save_for_backward(x, weight, A, B, log_tau, mix.clone(), free)


def _backward(ctx, grad_y):
    x, weight, A, B, log_tau, mix, free = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, *grads = _gradients(grad_y, x, weight, A, B, log_tau, mix, *ctx.options, free, ctx.fold, needs_x)
    grad_weight = grad_y.T @ x if needs_weight else None
    grad_bias = grad_y.sum(0) if needs_bias else None
    return grad_x if needs_x else None, grad_weight, grad_bias, *grads, *[None] * 6


_forward.register_autograd(_backward, setup_context=_setup)


def gated_linear_fused(
    x, weight, bias, A, B, log_tau, *, scaling, mix, bandwidth=1e-3, threshold_grad="mean", free=None, fold=False
):
    """The operator on x [..., in], as `gated_linear_blocked`; `fold` folds into half-precision weights too."""
    rows, mean = x.reshape(-1, x.shape[-1]), threshold_grad == "mean"
    if weight is not None and weight.dtype == x.dtype == torch.float32:
        fold = True
    y = _forward(rows, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold)
    return y.view(*x.shape[:-1], y.shape[-1])

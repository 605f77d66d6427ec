"""The gated linear layer on a GPU: the library's products, and the Triton kernels of `jumplora_kernels` around them.

Forward. The update is folded into float32 base weights (W + s E: one matrix product). Half-precision ones are
multiplied apart and the update is added on top, because rounding W + s E loses it: of an update a hundredth as large as
the weight, 17 % in bf16 and 2 % in fp16 (relative error of what it adds to y, random weights and update); a thousandth,
86 % and 24 %. Rounding E apart loses 0.2 % and 0.1 %. `fold=True` folds nonetheless: one product instead of two, and
the very weights of a model that was merged in half precision.

Backward. dL/dx always goes through W + s E: what rounding loses there is as small as rounding dL/dx itself, and no
gradient of the adapter depends on it but through the layers below. dL/dE = dL/dy^T x is one product with a float32
result.

While f = 0 the update is B A: LoRA's way, nothing of size [out, in] (`low_rank_linear`). tau and the mix are read on
the GPU: no wait for it, and no recompilation when they change.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F


def _compute(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    fold: bool,
) -> torch.Tensor:  # fmt: skip
    from jumplora_kernels import forward

    base = None
    with _without_autocast(x):
        if weight is not None and not fold:
            base = F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
            weight = bias = None
        return forward(x, weight, bias, A, B, _tau(log_tau), mix, scaling=scaling, free=free, add_to=base)


def _compute_gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    fold: bool, needs_x: bool, needs_tau: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from jumplora_kernels import backward

    with _without_autocast(x):
        grad_x, grad_A, grad_B, grad_log_tau = backward(
            grad_y, x, weight, A, B, _tau(log_tau), mix, scaling=scaling, bandwidth=bandwidth,
            threshold_grad="mean" if mean else "sum", free=free, needs_x=needs_x, needs_tau=needs_tau,
        )  # fmt: skip
    # What is not needed is an empty tensor, each its own: a custom operator may not return one twice.
    grad_x = x.new_empty(0) if grad_x is None else grad_x
    grad_tau = log_tau.new_empty(0) if grad_log_tau is None else grad_log_tau.reshape(log_tau.shape).to(log_tau.dtype)
    return grad_x, grad_A, grad_B, grad_tau


def _without_autocast(x: torch.Tensor) -> AbstractContextManager:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _tau(log_tau: torch.Tensor) -> torch.Tensor:
    """Of float32 [1]. torch.exp and not the kernel's: Triton's is approximate, and one ulp of tau moves entries."""
    return log_tau.float().exp().view(1)


# Opaque to torch.compile. Without it, the functions themselves: a custom operator costs as much as several launches.
_forward = torch.library.custom_op("hf_jumplora::gated_linear_triton", _compute, mutates_args=())
_gradients = torch.library.custom_op("hf_jumplora::gated_linear_triton_backward", _compute_gradients, mutates_args=())


@_forward.register_fake
def _(x, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold):
    return x.new_empty(x.shape[0], B.shape[0])


@_gradients.register_fake
def _(grad_y, x, weight, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold, needs_x, needs_tau):
    grad_x, grad_log_tau = x.new_empty(x.shape if needs_x else 0), log_tau.new_empty(log_tau.shape if needs_tau else 0)
    return grad_x, torch.empty_like(A), torch.empty_like(B), grad_log_tau


def _save(ctx, x, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold):
    ctx.save_for_backward(x, weight, A, B, log_tau, mix, free)
    ctx.options, ctx.fold = (scaling, bandwidth, mean), fold


def _setup(ctx, inputs, output):
    _save(ctx, *inputs)


def _backward(gradients, ctx, grad_y):
    x, weight, A, B, log_tau, mix, free = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, needs_tau = ctx.needs_input_grad[:6]
    grad_x, grad_A, grad_B, grad_log_tau = gradients(
        grad_y, x, weight, A, B, log_tau, mix, *ctx.options, free, ctx.fold, needs_x, needs_tau
    )
    grad_weight = grad_y.T @ x if needs_weight else None
    grad_bias = grad_y.sum(0) if needs_bias else None
    grads = grad_x if needs_x else None, grad_weight, grad_bias, grad_A, grad_B, grad_log_tau if needs_tau else None
    return *grads, *[None] * 6


_forward.register_autograd(partial(_backward, _gradients), setup_context=_setup)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):  # with a `setup_context`, `apply` looks at signatures for as long as a launch takes
        _save(ctx, *args)
        return _compute(*args)

    backward = staticmethod(partial(_backward, _compute_gradients))


class _LowRankLinear(torch.autograd.Function):
    """Few launches, and x is never copied to float32 as by two linear layers of float32 factors."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, log_tau, scaling):
        with _without_autocast(x):
            inner = x @ A.to(x.dtype).T
            scaled = (B * scaling).to(x.dtype)
            if weight is None:
                y = inner @ scaled.T
            else:
                y = F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
                y.addmm_(inner, scaled.T)
        ctx.save_for_backward(x, weight, A, B, log_tau, inner)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad_y):
        from jumplora_kernels import product

        x, weight, A, B, log_tau, inner = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_y = grad_y.contiguous()
        grad_x = None
        with _without_autocast(x):
            grad_inner = grad_y @ (B * ctx.scaling).to(x.dtype)
            if needs_x and weight is None:
                grad_x = grad_inner @ A.to(x.dtype)
            elif needs_x:
                grad_x = (grad_y @ weight.to(x.dtype)).addmm_(grad_inner, A.to(x.dtype))
            grad_A = product(grad_inner.T, x).to(A.dtype)
            grad_B = product(grad_y.T, inner).mul_(ctx.scaling).to(B.dtype)
        grad_weight = grad_y.T @ x if needs_weight else None
        grad_bias = grad_y.sum(0) if needs_bias else None
        # 0, not None: DDP waits for a gradient of every trained parameter.
        grad_log_tau = torch.zeros_like(log_tau) if ctx.needs_input_grad[5] else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_log_tau, None


def low_rank_linear(x, weight, bias, A, B, log_tau, scaling: float) -> torch.Tensor:
    """y = x W^T + bias + scaling * x (B A)^T, products over the tokens in the dtype of x: [..., out]."""
    y = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, A, B, log_tau, scaling)
    return y.view(*x.shape[:-1], y.shape[-1])


def gated_linear_fused(
    x, weight, bias, A, B, log_tau, *, scaling, mix, bandwidth=1e-3, threshold_grad="mean", free=None, fold=False
):
    """The layer on x [..., in], as `gated_linear_blocked`; `fold` folds into half-precision weights too."""
    rows, mean = x.reshape(-1, x.shape[-1]), threshold_grad == "mean"
    if weight is not None and weight.dtype == x.dtype == torch.float32:
        fold = True
    function = _forward if torch.compiler.is_compiling() else _GatedLinear.apply
    y = function(rows, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free, fold)
    return y.view(*x.shape[:-1], y.shape[-1])

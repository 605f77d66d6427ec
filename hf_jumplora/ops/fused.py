"""The gated linear layer by the Triton kernels of `jumplora_kernels` (extra `triton`). Not measured on a GPU yet."""

import torch
import torch.nn.functional as F


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, log_tau, mix, scaling, bandwidth, threshold_grad, free):
        from jumplora_kernels import forward

        ctx.save_for_backward(x, weight, A, B, log_tau, mix.clone(), free)
        ctx.options = {"scaling": scaling, "bandwidth": bandwidth, "threshold_grad": threshold_grad}
        return forward(x, weight, None, A, B, log_tau, mix, scaling=scaling, free=free)

    @staticmethod
    def backward(ctx, grad_y):
        from jumplora_kernels import backward

        x, weight, A, B, log_tau, mix, free = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grads = backward(grad_y, x, weight, A, B, log_tau, mix, free=free, needs_x=needs_x, **ctx.options)
        grad_weight = grad_y.T @ x if needs_weight else None
        return grads[0], grad_weight, *grads[1:], None, None, None, None, None


def gated_linear_fused(
    x, weight, bias, A, B, log_tau, *, scaling, mix, bandwidth=1e-3, threshold_grad="mean", free=None
):
    """As [`blocked.gated_linear_blocked`], and like it folds the update into float32 base weights alone.

    Raises:
        RuntimeError: triton is missing, or there is neither a GPU nor Triton's interpreter. ValueError: float64.
    """
    import jumplora_kernels

    if not jumplora_kernels.is_available():
        raise RuntimeError(
            "backend='triton' needs triton and a GPU (or TRITON_INTERPRET=1 before triton is imported): "
            "pip install 'hf-jumplora[triton]', or use backend='blocked'"
        )
    if torch.float64 in (x.dtype, A.dtype):
        raise ValueError("backend='triton' has no float64: use backend='blocked'")
    rows = x.reshape(-1, x.shape[-1])
    folded = weight if weight is not None and weight.dtype == A.dtype == x.dtype else None
    y = _Fused.apply(rows, folded, A, B, log_tau, mix, scaling, bandwidth, threshold_grad, free)
    if weight is not None and folded is None:
        y = y + F.linear(rows, weight.to(rows.dtype), bias)
    elif bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], y.shape[-1])

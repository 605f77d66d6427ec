"""The gated linear layer in row blocks: same function as `naive`, and never an [out, in] tensor of its own.

Every block of D = B A is computed again in the backward pass; only x, W (as they are), A, B and the threshold are kept.
Base weights in float32 or wider are folded into the block (W + s E: one matrix product); narrower ones would lose small
updates in the rounding, so their update is a product of its own. While f = 0 the layer is plain LoRA and costs what
LoRA costs. It is a custom operator, opaque to torch.compile: no graph break, and no recompilation when the mix changes.
"""

import threading

import torch
import torch.nn.functional as F

from .sparse import unpack_bits


BLOCK_ENTRIES = 1 << 21  # entries of one row block: 8 MiB of float32 (512 rows of 4096: measured best on a CPU)
_workspaces = threading.local()


def workspace(name: str, shape, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A reused buffer of this thread [rows, width]: fresh blocks of this size cost more in page faults than in work."""
    rows, width = shape
    buffers: dict = _workspaces.__dict__
    key = (name, dtype or like.dtype, like.device)
    if key not in buffers or buffers[key].numel() < rows * width:
        buffers[key] = like.new_empty(rows * width, dtype=dtype)
    return buffers[key][: rows * width].view(rows, width)


def row_blocks(out_features: int, in_features: int):
    """(start, stop) of row blocks of about BLOCK_ENTRIES entries."""
    rows = max(1, BLOCK_ENTRIES // in_features)
    for start in range(0, out_features, rows):
        yield start, min(start + rows, out_features)


def update_block(A: torch.Tensor, B: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of D = B A, in a workspace."""
    return torch.mm(B[start:stop], A, out=workspace("D", (stop - start, A.shape[1]), A))


def free_block(free: torch.Tensor | None, start: int, stop: int, width: int) -> torch.Tensor | None:
    """Rows start..stop of packed bits of a matrix of `width` columns: bool, or None for no limit."""
    return None if free is None else unpack_bits(free, start * width, stop * width).view(stop - start, width)


def gate_block(D: torch.Tensor, tau: float, mix: float, free: torch.Tensor | None) -> torch.Tensor:
    """E of one block, in a workspace. `hardshrink` is D * 1[|D| > tau] in one pass."""
    E = workspace("E", D.shape, D)
    torch.hardshrink(D, tau, out=E)
    if mix != 1:
        torch.lerp(D, E, mix, out=E)
    return E if free is None else E.mul_(free)


def gate_block_backward(D, grad_E, tau: float, mix: float, bandwidth: float, free):
    """(dL/dD, sum over the band around +-tau of dL/dJ * sign(D)) of one block. `grad_E` is overwritten."""
    if free is not None:
        grad_E.mul_(free)
    if mix == 0:
        return grad_E, D.new_zeros(())
    masked, buffer = torch.ops.aten.hardshrink_backward.grad_input, workspace("E", D.shape, D)
    # The band: |D| between |tau - half| and tau + half; below half - tau the two rectangles of the gate cancel.
    band = masked(grad_E, D, abs(tau - bandwidth / 2), grad_input=buffer)
    band -= masked(grad_E, D, tau + bandwidth / 2, grad_input=workspace("band", D.shape, D))
    sign = torch.sign(D, out=workspace("band", D.shape, D))
    tau_sum = torch.dot(band.view(-1), sign.view(-1)) * mix
    masked(grad_E, D, tau, grad_input=buffer)
    return buffer if mix == 1 else torch.lerp(grad_E, buffer, mix, out=buffer), tau_sum


def log_tau_grad(tau_sum, tau: float, bandwidth: float, numel: int, mean: bool, like: torch.Tensor) -> torch.Tensor:
    """dL/dlog_tau = tau * dL/dtau, shape of `like`."""
    scale = -(tau * tau / bandwidth) / (numel if mean else 1)
    return (tau_sum * scale).reshape(like.shape).to(like.dtype)


def _folded(weight: torch.Tensor | None, A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The base weight where it is folded into the update's blocks, None where its product is one of its own."""
    return weight if weight is not None and weight.dtype == A.dtype == dtype else None


def _effective_rows(E, folded: torch.Tensor | None, start: int, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """W + s E, or s E without a folded weight, in `dtype`; overwrites E, which starts at row `start`."""
    if folded is None:
        rows = E.mul_(scaling)
    else:
        rows = torch.add(folded[start : start + E.shape[0]], E, alpha=scaling, out=E)
    return rows if rows.dtype == dtype else workspace("narrow", rows.shape, rows, dtype).copy_(rows)


@torch.library.custom_op("hf_jumplora::gated_linear", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    out_features, in_features = B.shape[0], A.shape[1]
    f, tau = mix.item(), log_tau.to(A.dtype).exp().item()
    with torch.autocast(x.device.type, enabled=False):
        if f == 0 and free is None:
            update = (x.to(A.dtype) @ A.T @ B.T).mul_(scaling)
            return (update if weight is None else F.linear(x, weight.to(x.dtype), bias) + update).to(x.dtype)
        folded = _folded(weight, A, x.dtype)
        y = x.new_empty(x.shape[0], out_features)
        for start, stop in row_blocks(out_features, in_features):
            E = gate_block(update_block(A, B, start, stop), tau, f, free_block(free, start, stop, in_features))
            rows = _effective_rows(E, folded, start, scaling, x.dtype)
            torch.mm(x, rows.T, out=y[:, start:stop])
        if folded is not None:
            return y if bias is None else y.add_(bias)
        return y if weight is None else y.add_(F.linear(x, weight.to(x.dtype), bias))


@_forward.register_fake
def _(x, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free):
    return x.new_empty(x.shape[0], B.shape[0])


@torch.library.custom_op("hf_jumplora::gated_linear_backward", mutates_args=())
def _gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    out_features, in_features = B.shape[0], A.shape[1]
    f, tau = mix.item(), log_tau.to(A.dtype).exp().item()
    grad_x = x.new_zeros(x.shape if needs_x else 0)
    with torch.autocast(x.device.type, enabled=False):
        if f == 0 and free is None:
            g, x_wide = grad_y.to(A.dtype), x.to(A.dtype)
            g_B = g @ B  # [tokens, r]
            if needs_x:
                grad_x = (g_B @ A).mul_(scaling).to(x.dtype)
                if weight is not None:
                    grad_x.addmm_(grad_y, weight.to(x.dtype))
            return grad_x, scaling * g_B.T @ x_wide, scaling * g.T @ (x_wide @ A.T), torch.zeros_like(log_tau)
        folded = _folded(weight, A, x.dtype)
        if needs_x and weight is not None and folded is None:
            grad_x.addmm_(grad_y, weight.to(x.dtype))
        grad_A, grad_B, tau_sum = torch.zeros_like(A), torch.empty_like(B), A.new_zeros(())
        for start, stop in row_blocks(out_features, in_features):
            D, g = update_block(A, B, start, stop), grad_y[:, start:stop]
            free_rows = free_block(free, start, stop, in_features)
            if needs_x:
                E = gate_block(D, tau, f, free_rows)
                grad_x.addmm_(g, _effective_rows(E, folded, start, scaling, x.dtype))
            grad_E = workspace("G", (stop - start, in_features), A)
            if x.dtype == A.dtype:
                torch.mm((g * scaling).T, x, out=grad_E)
            else:
                narrow = workspace("narrow", (stop - start, in_features), x)
                grad_E.copy_(torch.mm((g * scaling).T, x, out=narrow))
            grad_D, block_sum = gate_block_backward(D, grad_E, tau, f, bandwidth, free_rows)
            tau_sum += block_sum
            grad_A.addmm_(B[start:stop].T, grad_D)
            torch.mm(grad_D, A.T, out=grad_B[start:stop])
    return grad_x, grad_A, grad_B, log_tau_grad(tau_sum, tau, bandwidth, out_features * in_features, mean, log_tau)


@_gradients.register_fake
def _(grad_y, x, weight, A, B, log_tau, mix, scaling, bandwidth, mean, free, needs_x):
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, torch.empty_like(A), torch.empty_like(B), torch.empty_like(log_tau)


def _setup(ctx, inputs, output):
    x, weight, _, A, B, log_tau, mix, ctx.scaling, ctx.bandwidth, ctx.mean, free = inputs
    # A copy of `mix`: the schedule changes that buffer in place, and the backward must see the value of its forward.
    ctx.save_for_backward(x, weight, A, B, log_tau, mix.clone(), free)


def _backward(ctx, grad_y):
    x, weight, A, B, log_tau, mix, free = ctx.saved_tensors
    options = (ctx.scaling, ctx.bandwidth, ctx.mean, free, ctx.needs_input_grad[0])
    grad_x, *grads = _gradients(grad_y.contiguous(), x, weight, A, B, log_tau, mix, *options)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_weight = grad_y.T @ x if needs_weight else None
    grad_bias = grad_y.sum(0) if needs_bias else None
    return grad_x if needs_x else None, grad_weight, grad_bias, *grads, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup)


def gated_linear_blocked(
    x, weight, bias, A, B, log_tau, *, scaling, mix, bandwidth=1e-3, threshold_grad="mean", free=None
):
    """The operator on x [..., in]; `mix` is a one-element tensor, `free` packed bits (see [`ops.sparse.pack_bits`])."""
    y = _forward(
        x.reshape(-1, x.shape[-1]), weight, bias, A, B, log_tau, mix, scaling, bandwidth, threshold_grad == "mean", free
    )
    return y.view(*x.shape[:-1], y.shape[-1])

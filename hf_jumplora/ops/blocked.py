"""The gated linear layer in row blocks: same function as `naive`, and never an [out, in] tensor of its own.

Every block of D = B A is computed again in the backward pass; only x, W (as they are), A, B and the threshold are kept.
E = (1 - f) D + f J is added to the rows of W (one matrix product for both), in float32 also where the base is narrower
and the CPU has no products of that dtype. Where it has, J's product is one of its own, because W + J rounded to bf16
would lose updates below 2^-9 of the weight, and (1 - f) D stays a product of rank r over the tokens; so it does in all
gradients.
The gradient of J needs dY^T X only where |D| > tau, and the threshold's only near tau: few entries are computed one by
one (`sampled_product`), many by the whole product. While f = 0 the layer is plain LoRA and costs what LoRA costs. It is
a custom operator, opaque to torch.compile: no graph break, and no recompilation when the mix changes.
"""

import functools
import threading

import torch
import torch.nn.functional as F

from .sparse import sampled_product, unpack_bits


BLOCK_ENTRIES = 1 << 21  # entries of one row block: 8 MiB of float32 (512 rows of 4096: measured best on a CPU)
SPARSE_SHARE = 0.05  # of the entries of a block, see `near_threshold`
_workspaces = threading.local()


def workspace(name: str, shape, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A reused buffer of this thread [rows, width]: fresh blocks of this size cost more in page faults than in work."""
    rows, width = shape
    buffers: dict = _workspaces.__dict__
    key = (name, dtype or like.dtype, like.device)
    if key not in buffers or buffers[key].numel() < rows * width:
        with torch.inference_mode(False):  # the next pass may be one that trains
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
    """(dL/dD, sum over the band around +-tau of dL/dJ * sign(D)) of one block. `grad_E` is overwritten.

    A bandwidth of 0 leaves the sum out (a threshold that is not learned).
    """
    if free is not None:
        grad_E.mul_(free)
    if mix == 0:
        return grad_E, D.new_zeros(())
    buffer, half, tau_sum = workspace("E", D.shape, D), bandwidth / 2, D.new_zeros(())
    if bandwidth:
        within = torch.ops.aten.hardtanh_backward.grad_input  # grad * 1[low < D < high] in one pass
        tau_sum = within(grad_E, D, tau - half, tau + half, grad_input=buffer).sum()
        tau_sum -= within(grad_E, D, -tau - half, -tau + half, grad_input=buffer).sum()
    torch.ops.aten.hardshrink_backward.grad_input(grad_E, D, tau, grad_input=buffer)
    return buffer if mix == 1 else torch.lerp(grad_E, buffer, mix, out=buffer), tau_sum * mix


def log_tau_grad(tau_sum, tau: float, bandwidth: float, numel: int, mean: bool, like: torch.Tensor) -> torch.Tensor:
    """dL/dlog_tau = tau * dL/dtau, shape of `like`."""
    scale = -(tau * tau / bandwidth) / (numel if mean else 1)
    return (tau_sum * scale).reshape(like.shape).to(like.dtype)


def near_threshold(D: torch.Tensor, tau: float, bandwidth: float, free: torch.Tensor | None) -> torch.Tensor | None:
    """Flat indices of the entries of a block that the gradient of J = D * 1[|D| > tau] needs: kept, or in the band.

    None where they are more than SPARSE_SHARE, judged by every 16th row, and elsewhere than on a CPU: the dense way.
    """
    if D.device.type != "cpu":
        return None
    floor = min(tau, abs(tau - bandwidth / 2))  # below bandwidth / 2 - tau the two rectangles of the gate cancel
    if (D[::16].abs() > floor).float().mean() > SPARSE_SHARE:
        return None
    magnitude = torch.abs(D, out=workspace("E", D.shape, D))
    index = torch.gt(magnitude, floor, out=workspace("near", D.shape, D, torch.bool)).view(-1).nonzero().view(-1)
    return index if free is None else index[free.reshape(-1)[index]]


def sparse_gradient(D, index: torch.Tensor, grad_E: torch.Tensor, tau: float, bandwidth: float):
    """(dL/dD of a block, sum over the band) as in [`gate_block_backward`], for mix = 1 and grad_E at `index` alone."""
    values, half = D.view(-1)[index], bandwidth / 2
    tau_sum = D.new_zeros(())
    if bandwidth:
        band = ((values - tau).abs() < half).to(D.dtype) - ((values + tau).abs() < half).to(D.dtype)
        tau_sum = torch.dot(grad_E, band)
    grad_D = workspace("E", D.shape, D).zero_()
    grad_D.view(-1)[index] = grad_E * (values.abs() > tau)
    return grad_D, tau_sum


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix products in a narrow dtype; without, they take several times as long as float32's."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is not None and torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)()


def _product_dtype(x: torch.Tensor, A: torch.Tensor) -> torch.dtype:
    """Of the products with the tokens: that of x, or that of A where the device could only emulate it."""
    emulated = x.device.type == "cpu" and x.dtype.itemsize < A.dtype.itemsize and not _multiplies(x.dtype)
    return A.dtype if emulated else x.dtype


def _parts(mix: float, scaling: float, free: torch.Tensor | None) -> tuple[float, float, float]:
    """(low_rank, gated, inner): s E = low_rank * D + gated * ((1 - inner) D + inner * J) * free.

    What the gate lets through whole stays a product of rank r over the tokens, and only J goes by entries.
    A support limit holds for D too; then all goes by entries.
    """
    return (scaling * (1 - mix), scaling * mix, 1.0) if free is None else (0.0, scaling, mix)


def _effective_rows(E, weight: torch.Tensor | None, start: int, gated: float, x: torch.Tensor, dtype) -> torch.Tensor:
    """W + gated * E, or gated * E without a folded W, in `dtype`; overwrites E, which starts at row `start`.

    W is taken in the dtype of x: under autocast it is the bf16 base that it is everywhere else.
    """
    if weight is None:
        rows = E.mul_(gated)
    else:
        base = weight[start : start + E.shape[0]]
        if weight.dtype != x.dtype:
            base = workspace("narrow", E.shape, x).copy_(base)
        if x.dtype == E.dtype:
            rows = torch.add(base, E, alpha=gated, out=E)
        else:  # an addition of two dtypes in one step takes six times as long
            rows = workspace("G", E.shape, E).copy_(base).add_(E, alpha=gated)
    return rows if rows.dtype == dtype else workspace("narrow", rows.shape, rows, dtype).copy_(rows)


@torch.library.custom_op("hf_jumplora::gated_linear", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    out_features, in_features = B.shape[0], A.shape[1]
    f, tau, dtype = mix.item(), log_tau.to(A.dtype).exp().item(), _product_dtype(x, A)
    # In the dtype of D the whole of E goes into W's rows: a pass more over the block, a product over the tokens less.
    low_rank, gated, inner = (0.0, scaling, f) if f and dtype == A.dtype else _parts(f, scaling, free)
    y: torch.Tensor | None = None
    with torch.autocast(x.device.type, enabled=False):
        if not gated and weight is not None:
            y = F.linear(x, weight.to(x.dtype), bias)
        if gated:
            tokens, folded = x.to(dtype), weight if dtype == A.dtype else None
            y = tokens.new_empty(x.shape[0], out_features)
            for start, stop in row_blocks(out_features, in_features):
                free_rows = free_block(free, start, stop, in_features)
                E = gate_block(update_block(A, B, start, stop), tau, inner, free_rows)
                rows = _effective_rows(E, folded, start, gated, x, dtype)
                torch.mm(tokens, rows.T, out=y[:, start:stop])
            if weight is not None and folded is None:
                y.add_(F.linear(tokens, weight.to(dtype), bias))
            elif bias is not None:
                y.add_(bias)
        if low_rank or y is None:
            y = _add_product(y, x.to(A.dtype) @ A.T, B.T, low_rank)
    return y.to(x.dtype)


def _add_product(total: torch.Tensor | None, left, right, scale: float) -> torch.Tensor:
    """total + scale * left @ right, in place where the dtypes agree."""
    if total is None:
        return (left @ right).mul_(scale)
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=scale)
    return (left @ right).mul_(scale).add_(total)


@_forward.register_fake
def _(x, weight, bias, A, B, log_tau, mix, scaling, bandwidth, mean, free):
    return x.new_empty(x.shape[0], B.shape[0])


@torch.library.custom_op("hf_jumplora::gated_linear_backward", mutates_args=())
def _gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor,
    log_tau: torch.Tensor, mix: torch.Tensor, scaling: float, bandwidth: float, mean: bool, free: torch.Tensor | None,
    needs_x: bool, needs_tau: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    out_features, in_features = B.shape[0], A.shape[1]
    tau, (low_rank, gated, inner) = log_tau.to(A.dtype).exp().item(), _parts(mix.item(), scaling, free)
    grad_x: torch.Tensor | None = None
    grad_A, grad_B, grad_log_tau = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(log_tau)
    with torch.autocast(x.device.type, enabled=False):
        if not gated and weight is not None and needs_x:
            grad_x = grad_y @ weight.to(x.dtype)
        if gated:
            dtype = _product_dtype(x, A)
            tokens, grads, folded = x.to(dtype), grad_y.to(dtype), weight if dtype == A.dtype else None
            if needs_x and weight is not None and folded is None:
                grad_x = grads @ weight.to(dtype)
            elif needs_x:
                grad_x = torch.zeros_like(tokens)
            width, tau_sum, tokens_T = bandwidth if needs_tau else 0.0, A.new_zeros(()), None
            for start, stop in row_blocks(out_features, in_features):
                D, g = update_block(A, B, start, stop), grads[:, start:stop]
                free_rows = free_block(free, start, stop, in_features)
                if grad_x is not None:
                    E = gate_block(D, tau, inner, free_rows)
                    grad_x.addmm_(g, _effective_rows(E, folded, start, gated, x, dtype))
                index = near_threshold(D, tau, width, free_rows) if inner == 1 else None
                if index is not None:
                    if tokens_T is None:
                        tokens_T = tokens.to(A.dtype).T.contiguous()
                    grad_E = sampled_product(g.T.to(A.dtype), tokens_T, index)
                    grad_D, block_sum = sparse_gradient(D, index, grad_E, tau, width)
                else:
                    grad_E = workspace("G", D.shape, A)
                    if dtype == A.dtype:
                        torch.mm(g.T, tokens, out=grad_E)
                    else:
                        grad_E.copy_(torch.mm(g.T, tokens, out=workspace("narrow", D.shape, tokens)))
                    grad_D, block_sum = gate_block_backward(D, grad_E, tau, inner, width, free_rows)
                tau_sum += block_sum
                grad_A.addmm_(B[start:stop].T, grad_D, alpha=gated)
                torch.mm(grad_D, A.T, out=grad_B[start:stop]).mul_(gated)
            if needs_tau:
                count = out_features * in_features
                grad_log_tau = log_tau_grad(tau_sum * gated, tau, bandwidth, count, mean, log_tau)
        if low_rank:
            g, tokens = grad_y.to(A.dtype), x.to(A.dtype)
            g_B = g @ B  # [tokens, r]
            grad_A.addmm_(g_B.T, tokens, alpha=low_rank)
            grad_B.addmm_(g.T, tokens @ A.T, alpha=low_rank)
            if needs_x:
                grad_x = _add_product(grad_x, g_B, A, low_rank)
    grad_x = x.new_empty(0) if grad_x is None else grad_x.to(x.dtype)
    return grad_x, grad_A, grad_B, grad_log_tau


@_gradients.register_fake
def _(grad_y, x, weight, A, B, log_tau, mix, scaling, bandwidth, mean, free, needs_x, needs_tau):
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, torch.empty_like(A), torch.empty_like(B), torch.empty_like(log_tau)


def _setup(ctx, inputs, output):
    x, weight, _, A, B, log_tau, mix, ctx.scaling, ctx.bandwidth, ctx.mean, free = inputs
    # A copy of `mix`: the schedule changes that buffer in place, and the backward must see the value of its forward.
    ctx.save_for_backward(x, weight, A, B, log_tau, mix.clone(), free)


def _backward(ctx, grad_y):
    x, weight, A, B, log_tau, mix, free = ctx.saved_tensors
    options = (ctx.scaling, ctx.bandwidth, ctx.mean, free, ctx.needs_input_grad[0], ctx.needs_input_grad[5])
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

"""Triton kernels of one gated low-rank linear layer.

    D = B A        keep = 1[|D| > tau]        E = D * ((1 - f) + f * keep) * free        y = x (W + s E)^T + bias

No kernel writes an [out, in] tensor: every program recomputes its tile of D from A [r, in] and B [out, r].
D, the comparison with tau and the gradient of E are float32 whatever the dtype of x and W, because a support decided in
bf16 is another support. `w_ptr`, `bias_ptr` and `free_ptr` may be None: Triton compiles the branch away.

x, dy and the outputs are row-major; W has strides, so that a transposed view (GPT-2's Conv1D) needs no copy.
Row offsets are int64: out * in and tokens * in can pass 2^31 (a vocabulary-sized layer, a long packed batch).

UPCAST is for the interpreter only: NumPy has no bf16 and multiplies its bits as integers.
"""

import triton
import triton.language as tl


# Ranks one product takes: the least that tensor cores accept. With 32 or 64 the kernels spill registers at rank 64.
RANK_CHUNK = tl.constexpr(16)


@triton.jit
def _row_major(ptr, rows, cols, n_rows, n_cols):
    """Loads ptr[rows, cols] of a contiguous [n_rows, n_cols] matrix; 0 outside."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R: tl.constexpr):
    """Float32 tile of D = B A. The rank goes by in chunks: the registers needed do not grow with R."""
    d = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for r0 in range(0, R, RANK_CHUNK):
        ranks = r0 + tl.arange(0, RANK_CHUNK)
        b = _row_major(b_ptr, rows, ranks, OUT, R).to(tl.float32)
        a = _row_major(a_ptr, ranks, cols, R, IN).to(tl.float32)
        d = tl.dot(b, a, d, input_precision="ieee")
    return d


@triton.jit
def _is_free(free_ptr, rows, cols, OUT, IN):
    """1.0 where the support limit lets an entry be used. Flat entry e is bit e % 8 of byte e // 8, lowest bit first."""
    mask = (rows[:, None] < OUT) & (cols[None, :] < IN)
    entry = rows.to(tl.int64)[:, None] * IN + cols[None, :]
    byte = tl.load(free_ptr + (entry >> 3), mask=mask, other=0).to(tl.int32)
    return ((byte >> (entry & 7).to(tl.int32)) & 1).to(tl.float32)


@triton.jit
def _effective_weight(
    w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, OUT, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr,
):  # fmt: skip
    """Float32 tile of W + s E, or of s E when there is no W."""
    d = _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R)
    # Strict: an entry that equals tau is not kept.
    e = d * tl.where(tl.abs(d) > tau, 1.0, 1.0 - f) * scaling
    if free_ptr is not None:
        e *= _is_free(free_ptr, rows, cols, OUT, IN)
    if w_ptr is not None:
        mask = (rows[:, None] < OUT) & (cols[None, :] < IN)
        offsets = rows.to(tl.int64)[:, None] * stride_wo + cols.to(tl.int64)[None, :] * stride_wi
        e += tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return e


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, y_ptr,
    T, OUT, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[t, o] = sum_i x[t, i] (W + s E)[o, i] + bias[o].  Grid (T / BT, OUT / BO)."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    rows = tl.program_id(1) * BO + tl.arange(0, BO)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    y = tl.zeros((BT, BO), dtype=tl.float32)
    for i0 in range(0, IN, BI):
        cols = i0 + tl.arange(0, BI)
        weight = _effective_weight(
            w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, OUT, IN, stride_wo, stride_wi, scaling, R
        )
        x = _row_major(x_ptr, tokens, cols, T, IN)
        if UPCAST:
            x = x.to(tl.float32)
        y = tl.dot(x, tl.trans(weight).to(x.dtype), y, input_precision=PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < OUT, other=0.0).to(tl.float32)[None, :]
    mask = (tokens[:, None] < T) & (rows[None, :] < OUT)
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * OUT + rows[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def grad_x_kernel(
    dy_ptr, w_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, dx_ptr,
    T, OUT, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx[t, i] = sum_o dy[t, o] (W + s E)[o, i].  Grid (T / BT, IN / BI)."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    dx = tl.zeros((BT, BI), dtype=tl.float32)
    for o0 in range(0, OUT, BO):
        rows = o0 + tl.arange(0, BO)
        weight = _effective_weight(
            w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, OUT, IN, stride_wo, stride_wi, scaling, R
        )
        dy = _row_major(dy_ptr, tokens, rows, T, OUT)
        if UPCAST:
            dy = dy.to(tl.float32)
        dx = tl.dot(dy, weight.to(dy.dtype), dx, input_precision=PRECISION)
    mask = (tokens[:, None] < T) & (cols[None, :] < IN)
    tl.store(dx_ptr + tokens.to(tl.int64)[:, None] * IN + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def grad_params_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, da_ptr, db_ptr, dtau_ptr,
    T, OUT, IN, scaling, half_bandwidth,
    R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of the parameter gradients, one slice a tile of E.  Grid (OUT / BO, IN / BI).

    da [OUT / BO, R, IN], db [IN / BI, OUT, R], dtau [OUT / BO, IN / BI], all float32. The caller sums over the first
    dimension (both of dtau): no atomics, so the same inputs give the same bits. dtau holds
    sum(s f G free (1[|D - tau| < bandwidth / 2] - 1[|D + tau| < bandwidth / 2])); the factor -tau / bandwidth is the
    caller's.
    """
    tile_o = tl.program_id(0)
    tile_i = tl.program_id(1)
    rows = tile_o * BO + tl.arange(0, BO)
    cols = tile_i * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)

    g = tl.zeros((BO, BI), dtype=tl.float32)  # dL/dE = s dy^T x
    for t0 in range(0, T, BT):
        tokens = t0 + tl.arange(0, BT)
        dy = _row_major(dy_ptr, tokens, rows, T, OUT)
        x = _row_major(x_ptr, tokens, cols, T, IN)
        if UPCAST:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        g = tl.dot(tl.trans(dy), x, g, input_precision=PRECISION)
    g *= scaling
    if free_ptr is not None:
        g *= _is_free(free_ptr, rows, cols, OUT, IN)

    d = _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R)
    # J is a gate for D minus a gate for -D, each with its window: where tau < bandwidth / 2 they overlap and cancel.
    above = tl.where(tl.abs(d - tau) < half_bandwidth, g, 0.0)
    below = tl.where(tl.abs(d + tau) < half_bandwidth, g, 0.0)
    dtau = f * tl.sum(above - below)
    tl.store(dtau_ptr + tile_o.to(tl.int64) * tl.num_programs(1) + tile_i, dtau)

    g *= tl.where(tl.abs(d) > tau, 1.0, 1.0 - f)  # now dL/dD
    da_ptr += tile_o.to(tl.int64) * R * IN
    db_ptr += tile_i.to(tl.int64) * R * OUT
    for r0 in range(0, R, RANK_CHUNK):
        ranks = r0 + tl.arange(0, RANK_CHUNK)
        b = _row_major(b_ptr, rows, ranks, OUT, R).to(tl.float32)
        a = _row_major(a_ptr, ranks, cols, R, IN).to(tl.float32)
        da = tl.dot(tl.trans(b), g, input_precision="ieee")
        db = tl.dot(g, tl.trans(a), input_precision="ieee")
        mask_a = (ranks[:, None] < R) & (cols[None, :] < IN)
        mask_b = (rows[:, None] < OUT) & (ranks[None, :] < R)
        tl.store(da_ptr + ranks.to(tl.int64)[:, None] * IN + cols[None, :], da, mask=mask_a)
        tl.store(db_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], db, mask=mask_b)

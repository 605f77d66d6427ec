"""Triton kernels of one gated low-rank linear layer.

    D = B A        keep = 1[|D| > tau]        E = D * ((1 - f) + f * keep) * free        y = x (W + s E)^T + bias

Two ways to the same result; `launch.py` chooses:

* tiles (small rank, few tokens): `forward_kernel`, `grad_x_kernel`, `grad_params_kernel`. The weight tile is made in
  registers, inside the matrix product. Each tile of D is computed again for every BT tokens.
* rows (large rank, many tokens, float32): `weight_rows_kernel` and `grad_rows_kernel` make a bounded number of rows of
  the weight and of dL/dD, each entry of D once whatever the number of tokens; the products with them are the library's.

Neither writes an [out, in] tensor. D, the comparison with tau and the gradient of E are float32 whatever the dtype of x
and W, because a support decided in bf16 is another support. `w_ptr`, `bias_ptr` and `free_ptr` may be None: Triton
compiles the branch away.

x, dy and the outputs are row-major; W has strides, so that a transposed view (GPT-2's Conv1D) needs no copy.
Row offsets are int64: out * in and tokens * in can pass 2^31 (a vocabulary-sized layer, a long packed batch).
tau, f are read in the kernel: no host waits for them, nothing is compiled again when they change.

RC is the number of ranks one product takes. GATE_PRECISION is that of the product D: "ieee", or "tf32x3", which is as
exact (emulated, r = 8 to 512: a relative error of 0.9e-7 to 2.4e-7 against 0.5e-7 to 2.4e-7, no entry of 1024^2 on the
other side of tau; plain tf32: 3e-4 and 50) and runs on tensor cores. The products dA and dB are "ieee", because as
tf32x3 they spill. UPCAST is for the interpreter only: NumPy has no bf16 and multiplies its
bits as integers.
"""

import triton
import triton.language as tl


@triton.jit
def _row_major(ptr, rows, cols, n_rows, n_cols):
    """Loads ptr[rows, cols] of a contiguous [n_rows, n_cols] matrix; 0 outside."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R: tl.constexpr, RC: tl.constexpr, GATE_PRECISION: tl.constexpr):
    """Float32 tile of D = B A. The rank goes by in chunks: the registers needed do not grow with R."""
    d = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for r0 in range(0, R, RC):
        ranks = r0 + tl.arange(0, RC)
        b = _row_major(b_ptr, rows, ranks, OUT, R).to(tl.float32)
        a = _row_major(a_ptr, ranks, cols, R, IN).to(tl.float32)
        d = tl.dot(b, a, d, input_precision=GATE_PRECISION)
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
    R: tl.constexpr, RC: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Float32 tile of W + s E, or of s E when there is no W."""
    d = _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R, RC, GATE_PRECISION)
    # Strict: an entry that equals tau is not kept.
    e = d * tl.where(tl.abs(d) > tau, 1.0, 1.0 - f) * scaling
    if free_ptr is not None:
        e *= _is_free(free_ptr, rows, cols, OUT, IN)
    if w_ptr is not None:
        mask = (rows[:, None] < OUT) & (cols[None, :] < IN)
        offsets = rows.to(tl.int64)[:, None] * stride_wo + cols.to(tl.int64)[None, :] * stride_wi
        e += tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return e


@triton.jit
def _grad_weight(x_ptr, dy_ptr, rows, cols, T, STOP, OUT, IN, BT: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 tile of dy^T x; 0 from row STOP on."""
    g = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for t0 in range(0, T, BT):
        tokens = t0 + tl.arange(0, BT)
        mask = (tokens[:, None] < T) & (rows[None, :] < STOP)
        dy = tl.load(dy_ptr + tokens.to(tl.int64)[:, None] * OUT + rows[None, :], mask=mask, other=0.0)
        x = _row_major(x_ptr, tokens, cols, T, IN)
        if UPCAST:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        g = tl.dot(tl.trans(dy), x, g, input_precision="ieee")
    return g


@triton.jit
def _through_gate(g, d, tau, f, half_bandwidth):
    """(dL/dD, sum over the windows of dL/dJ) of a tile, from g = dL/dE after the support limit.

    J is a gate for D minus a gate for -D, each with its window: where tau < bandwidth / 2 they overlap and cancel.
    """
    above = tl.where(tl.abs(d - tau) < half_bandwidth, g, 0.0)
    below = tl.where(tl.abs(d + tau) < half_bandwidth, g, 0.0)
    return g * tl.where(tl.abs(d) > tau, 1.0, 1.0 - f), f * tl.sum(above - below)


# ---- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "T_CLASS"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, y_ptr,
    T, T_CLASS, OUT, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, RC: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    ADD: tl.constexpr, GATE_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[t, o] = sum_i x[t, i] (W + s E)[o, i] + bias[o]; with ADD on top of what y holds.  Grid (T / BT, OUT / BO)."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    rows = tl.program_id(1) * BO + tl.arange(0, BO)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    y = tl.zeros((BT, BO), dtype=tl.float32)
    for i0 in range(0, IN, BI):
        cols = i0 + tl.arange(0, BI)
        weight = _effective_weight(
            w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, OUT, IN, stride_wo, stride_wi, scaling,
            R, RC, GATE_PRECISION,
        )  # fmt: skip
        x = _row_major(x_ptr, tokens, cols, T, IN)
        if UPCAST:
            x = x.to(tl.float32)
        y = tl.dot(x, tl.trans(weight).to(x.dtype), y, input_precision="ieee")
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < OUT, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += _row_major(y_ptr, tokens, rows, T, OUT).to(tl.float32)
    mask = (tokens[:, None] < T) & (rows[None, :] < OUT)
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * OUT + rows[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "T_CLASS"])
def grad_x_kernel(
    dy_ptr, w_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, dx_ptr,
    T, T_CLASS, OUT, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, RC: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    ADD: tl.constexpr, GATE_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx[t, i] = sum_o dy[t, o] (W + s E)[o, i]; with ADD on top of what dx holds.  Grid (T / BT, IN / BI)."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    dx = tl.zeros((BT, BI), dtype=tl.float32)
    for o0 in range(0, OUT, BO):
        rows = o0 + tl.arange(0, BO)
        weight = _effective_weight(
            w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, OUT, IN, stride_wo, stride_wi, scaling,
            R, RC, GATE_PRECISION,
        )  # fmt: skip
        dy = _row_major(dy_ptr, tokens, rows, T, OUT)
        if UPCAST:
            dy = dy.to(tl.float32)
        dx = tl.dot(dy, weight.to(dy.dtype), dx, input_precision="ieee")
    if ADD:
        dx += _row_major(dx_ptr, tokens, cols, T, IN).to(tl.float32)
    mask = (tokens[:, None] < T) & (cols[None, :] < IN)
    tl.store(dx_ptr + tokens.to(tl.int64)[:, None] * IN + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "T_CLASS", "START", "STOP"])
def grad_params_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, da_ptr, db_ptr, dtau_ptr,
    T, T_CLASS, START, STOP, OUT, IN, scaling, half_bandwidth,
    R: tl.constexpr, RC: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    GATE_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of the parameter gradients over rows START to STOP.  Grid ((STOP - START) / BO, IN / BI).

    da [(STOP - START) / BO, R, IN], db [IN / BI, STOP - START, R], dtau [one a program], all float32. The caller sums
    over the first dimension (both of dtau): no atomics, so the same inputs give the same bits. dtau holds
    sum(s f G free (1[|D - tau| < bandwidth / 2] - 1[|D + tau| < bandwidth / 2])); the factor -tau / bandwidth is the
    caller's.
    """
    tile_o = tl.program_id(0)
    tile_i = tl.program_id(1)
    rows = START + tile_o * BO + tl.arange(0, BO)
    cols = tile_i * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)

    g = _grad_weight(x_ptr, dy_ptr, rows, cols, T, STOP, OUT, IN, BT, UPCAST) * scaling
    if free_ptr is not None:
        g *= _is_free(free_ptr, rows, cols, STOP, IN)
    d = _delta(a_ptr, b_ptr, rows, cols, STOP, IN, R, RC, GATE_PRECISION)
    g, dtau = _through_gate(g, d, tau, f, half_bandwidth)
    tl.store(dtau_ptr + tile_o.to(tl.int64) * tl.num_programs(1) + tile_i, dtau)

    da_ptr += tile_o.to(tl.int64) * R * IN
    db_ptr += tile_i.to(tl.int64) * R * (STOP - START)
    for r0 in range(0, R, RC):
        ranks = r0 + tl.arange(0, RC)
        b = _row_major(b_ptr, rows, ranks, STOP, R).to(tl.float32)
        a = _row_major(a_ptr, ranks, cols, R, IN).to(tl.float32)
        da = tl.dot(tl.trans(b), g, input_precision="ieee")
        db = tl.dot(g, tl.trans(a), input_precision="ieee")
        mask_a = (ranks[:, None] < R) & (cols[None, :] < IN)
        mask_b = (rows[:, None] < STOP) & (ranks[None, :] < R)
        tl.store(da_ptr + ranks.to(tl.int64)[:, None] * IN + cols[None, :], da, mask=mask_a)
        tl.store(db_ptr + (rows - START).to(tl.int64)[:, None] * R + ranks[None, :], db, mask=mask_b)


# ---- rows ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["START", "STOP"])
def weight_rows_kernel(
    w_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, rows_ptr,
    START, STOP, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, RC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows START to STOP of W + s E, or of s E when there is no W.  Grid ((STOP - START) / BO, IN / BI)."""
    rows = START + tl.program_id(0) * BO + tl.arange(0, BO)
    cols = tl.program_id(1) * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    weight = _effective_weight(
        w_ptr, a_ptr, b_ptr, free_ptr, tau, f, rows, cols, STOP, IN, stride_wo, stride_wi, scaling,
        R, RC, GATE_PRECISION,
    )  # fmt: skip
    mask = (rows[:, None] < STOP) & (cols[None, :] < IN)
    offsets = (rows - START).to(tl.int64)[:, None] * IN + cols[None, :]
    tl.store(rows_ptr + offsets, weight.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "T_CLASS", "START", "STOP"])
def grad_rows_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, dd_ptr, dtau_ptr,
    T, T_CLASS, START, STOP, OUT, IN, scaling, half_bandwidth,
    R: tl.constexpr, RC: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    GATE_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows START to STOP of dL/dD, float32, and one partial sum of tau's gradient a program (see grad_params_kernel).

    Without x, dd holds the rows of dy^T x when the kernel starts.  Grid ((STOP - START) / BO, IN / BI).
    """
    rows = START + tl.program_id(0) * BO + tl.arange(0, BO)
    cols = tl.program_id(1) * BI + tl.arange(0, BI)
    tau = tl.load(tau_ptr)
    f = tl.load(mix_ptr)
    mask = (rows[:, None] < STOP) & (cols[None, :] < IN)
    offsets = (rows - START).to(tl.int64)[:, None] * IN + cols[None, :]
    if x_ptr is None:
        g = tl.load(dd_ptr + offsets, mask=mask, other=0.0)
    else:
        g = _grad_weight(x_ptr, dy_ptr, rows, cols, T, STOP, OUT, IN, BT, UPCAST)
    g *= scaling
    if free_ptr is not None:
        g *= _is_free(free_ptr, rows, cols, STOP, IN)
    d = _delta(a_ptr, b_ptr, rows, cols, STOP, IN, R, RC, GATE_PRECISION)
    g, dtau = _through_gate(g, d, tau, f, half_bandwidth)
    tl.store(dtau_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), dtau)
    tl.store(dd_ptr + offsets, g, mask=mask)

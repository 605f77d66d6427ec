"""Triton kernels around the products of one gated low-rank linear layer.

    D = B A        keep = 1[|D| > tau]        E = D * ((1 - f) + f * keep) * free        y = x W^T + s x E^T + bias

All products over tokens are the library's: on a GPU's tensor cores no kernel of ours would be faster. What stands here
is what comes before and after them, each in one pass:

* `update_rows_kernel` writes rows of s E, or of W + s E, in the dtype of x.
* `gate_grad_kernel` takes rows of dL/dE, float32, through the gate, and reduces them to parts of dL/dA, dL/dB and
  dL/dtau while they are in registers (small ranks), or writes dL/dD in their place (large ones).
* `sum_parts_kernel` adds the parts up in a fixed order: no atomics, the same inputs give the same bits.
* `penalty_kernel` makes parts of G^T E C for the penalty ||G^T E C||^2; its gradient 2 G (G^T E C) C^T goes through
  `gate_grad_kernel` as two thin factors. For many layers of one shape in one launch.

None keeps an [out, in] tensor of float32 but the rows that it is given. D, the comparison with tau and the gradient of
E are float32 whatever the dtype of x and W: with half precision, the support would change. `w_ptr`, `free_ptr` and
others may be None: Triton compiles the branch away.

Row-major but for W, whose strides are arguments: a transposed view (GPT-2's Conv1D) needs no copy. Row offsets are
int64: out * in can pass 2^31. tau and f are read in the kernel: no host waits for them, nothing is compiled again when
they change, and a captured CUDA graph sees new values.

D takes `RC` ranks in one product. GATE_PRECISION is that of its products: "ieee", or "tf32x3", which is as exact
(emulated, r = 8 to 512: a relative error of 0.9e-7 to 2.4e-7 against 0.5e-7 to 2.4e-7, no entry of 1024^2 on the other
side of tau; plain tf32: 3e-4 and 50) and runs on tensor cores.
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
    """Float32 tile of D = B A."""
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
def _slope(d, tau, f):
    """dE/dD = E / D without the support limit. Strict: an entry that equals tau is not kept."""
    return tl.where(tl.abs(d) > tau, 1.0, 1.0 - f)


@triton.jit(do_not_specialize=["START", "STOP"])
def update_rows_kernel(
    w_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, rows_ptr,
    START, STOP, IN, stride_wo, stride_wi, scaling,
    R: tl.constexpr, RC: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows START to STOP of W + s E, or of s E when there is no W.  Grid ((STOP - START) / BO, IN / BI)."""
    rows = START + tl.program_id(0) * BO + tl.arange(0, BO)
    cols = tl.program_id(1) * BI + tl.arange(0, BI)
    d = _delta(a_ptr, b_ptr, rows, cols, STOP, IN, R, RC, GATE_PRECISION)
    e = d * _slope(d, tl.load(tau_ptr), tl.load(mix_ptr)) * scaling
    if free_ptr is not None:
        e *= _is_free(free_ptr, rows, cols, STOP, IN)
    mask = (rows[:, None] < STOP) & (cols[None, :] < IN)
    if w_ptr is not None:
        offsets = rows.to(tl.int64)[:, None] * stride_wo + cols.to(tl.int64)[None, :] * stride_wi
        e += tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = (rows - START).to(tl.int64)[:, None] * IN + cols[None, :]
    tl.store(rows_ptr + offsets, e.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["START", "STOP"])
def gate_grad_kernel(
    g_ptr, left_ptr, right_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, free_ptr, da_ptr, db_ptr, dtau_ptr,
    START, STOP, OUT, IN, scaling, half_bandwidth,
    R: tl.constexpr, RC: tl.constexpr, K: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    GATE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dE of rows START to STOP through the gate.  Grid ((STOP - START) / BO, IN / BI, layers).

    dL/dE / s is `g` [STOP - START, IN] float32 (one layer), or left [layers, OUT, K] times right [layers, IN, K]^T.
    Of the layers' a [R, IN], b [OUT, R], tau, mix one after the other. Written: parts of the sums, float32, with the
    grid's programs first: da [layers, programs, R, IN], db [layers, programs, STOP - START, R], dtau [layers,
    programs]; the last is sum(s f g free (1[|D - tau| < bandwidth / 2] - 1[|D + tau| < bandwidth / 2])). Without `da`,
    g becomes dL/dD (large ranks). Without `dtau` it is left out (a threshold that is not learned).
    """
    tile_o, tile_i, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = START + tile_o * BO + tl.arange(0, BO)
    cols = tile_i * BI + tl.arange(0, BI)
    tau, f = tl.load(tau_ptr + layer), tl.load(mix_ptr + layer)
    a_ptr += layer * R * IN
    b_ptr += layer * R * OUT
    mask = (rows[:, None] < STOP) & (cols[None, :] < IN)
    offsets = (rows - START).to(tl.int64)[:, None] * IN + cols[None, :]
    if g_ptr is not None:
        g = tl.load(g_ptr + offsets, mask=mask, other=0.0)
    else:
        g = tl.zeros((BO, BI), dtype=tl.float32)
        for k0 in range(0, K, RC):
            columns = k0 + tl.arange(0, RC)
            left = _row_major(left_ptr + layer * OUT * K, rows, columns, STOP, K)
            right = _row_major(right_ptr + layer * IN * K, cols, columns, IN, K)
            g = tl.dot(left, tl.trans(right), g, input_precision=PRECISION)
    g *= scaling
    if free_ptr is not None:
        g *= _is_free(free_ptr, rows, cols, STOP, IN)
    d = _delta(a_ptr, b_ptr, rows, cols, STOP, IN, R, RC, GATE_PRECISION)
    if dtau_ptr is not None:
        # J is a gate for D minus a gate for -D: where tau < bandwidth / 2 their windows overlap and cancel.
        above = tl.where(tl.abs(d - tau) < half_bandwidth, g, 0.0)
        below = tl.where(tl.abs(d + tau) < half_bandwidth, g, 0.0)
        part = (layer * tl.num_programs(0) + tile_o) * tl.num_programs(1) + tile_i
        tl.store(dtau_ptr + part, f * tl.sum(above - below))
    g *= _slope(d, tau, f)
    if da_ptr is None:
        tl.store(g_ptr + offsets, g, mask=mask)
    else:
        da_ptr += (layer * tl.num_programs(0) + tile_o) * R * IN
        db_ptr += (layer * tl.num_programs(1) + tile_i) * R * (STOP - START)
        for r0 in range(0, R, RC):
            ranks = r0 + tl.arange(0, RC)
            b = _row_major(b_ptr, rows, ranks, STOP, R).to(tl.float32)
            da = tl.dot(tl.trans(b), g, input_precision=PRECISION)
            mask_a = (ranks[:, None] < R) & (cols[None, :] < IN)
            tl.store(da_ptr + ranks.to(tl.int64)[:, None] * IN + cols[None, :], da, mask=mask_a)
            a = _row_major(a_ptr, ranks, cols, R, IN).to(tl.float32)
            db = tl.dot(g, tl.trans(a), input_precision=PRECISION)
            mask_b = (rows[:, None] < STOP) & (ranks[None, :] < R)
            tl.store(db_ptr + (rows - START).to(tl.int64)[:, None] * R + ranks[None, :], db, mask=mask_b)


@triton.jit
def _sum_part(parts_ptr, total_ptr, block, PARTS, SIZE, factor, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total[block] = factor * sum over parts [PARTS, SIZE]; with ADD on top of what it holds."""
    entries = block * BLOCK + tl.arange(0, BLOCK)
    mask = entries < SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * SIZE + entries, mask=mask, other=0.0)
    total *= factor
    if ADD:
        total += tl.load(total_ptr + entries, mask=mask, other=0.0)
    tl.store(total_ptr + entries, total, mask=mask)


@triton.jit(do_not_specialize=["PARTS_A", "PARTS_B", "SIZE_B"])
def sum_parts_kernel(
    parts_a_ptr, parts_b_ptr, parts_tau_ptr, tau_ptr, da_ptr, db_ptr, dtau_ptr,
    PARTS_A, PARTS_B, SIZE_A, SIZE_B, tau_factor,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of `gate_grad_kernel` for one layer.  Grid (SIZE_A / BLOCK + SIZE_B / BLOCK + 1).

    da [SIZE_A] from parts [PARTS_A, SIZE_A], db [SIZE_B] likewise, and dL/dlog_tau = tau^2 * tau_factor * the sum of
    the PARTS_A * PARTS_B parts. ADD: da and dtau are added to (a later block of rows; db has rows of its own).
    """
    block = tl.program_id(0)
    blocks_a, blocks_b = (SIZE_A + BLOCK - 1) // BLOCK, (SIZE_B + BLOCK - 1) // BLOCK
    if block < blocks_a:
        _sum_part(parts_a_ptr, da_ptr, block, PARTS_A, SIZE_A, 1.0, ADD, BLOCK)
    elif block < blocks_a + blocks_b:
        _sum_part(parts_b_ptr, db_ptr, block - blocks_a, PARTS_B, SIZE_B, 1.0, False, BLOCK)
    elif dtau_ptr is not None:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, PARTS_A * PARTS_B, BLOCK):
            entries = start + tl.arange(0, BLOCK)
            total += tl.load(parts_tau_ptr + entries, mask=entries < PARTS_A * PARTS_B, other=0.0)
        tau = tl.load(tau_ptr)
        dtau = tl.sum(total) * tau * tau * tau_factor
        if ADD:
            dtau += tl.load(dtau_ptr)
        tl.store(dtau_ptr, dtau)


@triton.jit
def penalty_kernel(
    left_ptr, right_ptr, a_ptr, b_ptr, tau_ptr, mix_ptr, parts_ptr,
    OUT, IN,
    R: tl.constexpr, RC: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    GATE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts [layers, OUT / BO, K, K] of G^T E C, whose sum over the second dimension it is.  Grid (OUT / BO, layers).

    left: G [layers, OUT, K]. right: C [layers, IN, K]. KP: K rounded up to a power of 2.
    """
    tile, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile * BO + tl.arange(0, BO)
    columns = tl.arange(0, KP)
    tau, f = tl.load(tau_ptr + layer), tl.load(mix_ptr + layer)
    a_ptr += layer * R * IN
    b_ptr += layer * R * OUT
    product = tl.zeros((BO, KP), dtype=tl.float32)
    for i0 in range(0, IN, BI):
        cols = i0 + tl.arange(0, BI)
        d = _delta(a_ptr, b_ptr, rows, cols, OUT, IN, R, RC, GATE_PRECISION)
        right = _row_major(right_ptr + layer * IN * K, cols, columns, IN, K)
        product = tl.dot(d * _slope(d, tau, f), right, product, input_precision=PRECISION)
    left = _row_major(left_ptr + layer * OUT * K, rows, columns, OUT, K)
    part = tl.dot(tl.trans(left), product, input_precision=PRECISION)
    mask = (columns[:, None] < K) & (columns[None, :] < K)
    offsets = columns[:, None] * K + columns[None, :]
    tl.store(parts_ptr + (layer * tl.num_programs(0) + tile) * K * K + offsets, part, mask=mask)

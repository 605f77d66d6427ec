"""Supports: packed bits, the code on disk, and products with non-zeros only."""

import math

import pytest
import torch

from hf_jumplora.ops import sparse
from hf_jumplora.ops.sparse import (
    add_at,
    decode_index,
    decode_support,
    encode_support,
    pack_bits,
    sparse_linear,
    support_sha256,
    unpack_bits,
)


DENSITIES = (0.0, 1e-4, 1 / 3000, 0.004, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999, 1.0)


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def entropy_bytes(mask):
    p = mask.float().mean().item()
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * mask.numel() / 8


# ---- packed bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1001])
def test_pack_unpack(n):
    mask = random_mask((n,), 0.4)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (n + 7) // 8
    assert torch.equal(unpack_bits(packed, 0, n), mask)
    g = torch.Generator().manual_seed(n)
    for _ in range(20):
        start, stop = sorted(torch.randint(0, n + 1, (2,), generator=g).tolist())
        assert torch.equal(unpack_bits(packed, start, stop), mask[start:stop])


def test_least_significant_bit_first():
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)).tolist() == [1, 2]


def test_pack_takes_views_in_logical_order():
    mask = random_mask((6, 10), 0.5)
    assert torch.equal(unpack_bits(pack_bits(mask.T), 0, 60).view(10, 6), mask.T)


# ---- the code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(300, 101), (1, 1), (1, 9), (13, 1), (8, 8)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_encode_decode(shape, density):
    mask = random_mask(shape, density)
    code = encode_support(mask)
    assert code.dtype == torch.uint8
    assert code.dim() == 1
    assert torch.equal(decode_support(code, shape), mask)
    assert code.numel() <= 9 + (mask.numel() + 7) // 8  # never larger than the bitmap


@pytest.mark.parametrize("density", DENSITIES)
def test_index_is_where_the_mask_is_set(density):
    mask = random_mask((300, 101), density)
    assert torch.equal(decode_index(encode_support(mask), (300, 101)), mask.view(-1).nonzero().view(-1))


def test_adding_at_the_support_gives_the_bits_of_the_dense_sum():
    g = torch.Generator().manual_seed(0)
    total = torch.zeros(60, 50)
    dense = total.clone()
    for seed in range(5):
        mask, product = random_mask((60, 50), 0.3, seed), torch.randn(60, 50, generator=g)
        dense += (product * mask).mul_(0.7)
        add_at(total, product, mask.view(-1).nonzero().view(-1), 0.7)
    assert torch.equal(total, dense)


@pytest.mark.parametrize("seed", range(40))
def test_encode_decode_random_sizes(seed):
    g = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 70, (2,), generator=g).tolist())
    mask = random_mask(shape, torch.rand((), generator=g) ** 3, seed)
    assert torch.equal(decode_support(encode_support(mask), shape), mask)


@pytest.mark.parametrize("index", [0, 7, 8, 2999])
def test_one_entry_among_many(index):
    mask = torch.zeros(30, 100, dtype=torch.bool)
    mask.view(-1)[index] = True
    assert torch.equal(decode_support(encode_support(mask), (30, 100)), mask)


def test_clustered_rows():
    mask = torch.zeros(100, 200, dtype=torch.bool)
    mask[17] = mask[60:63] = True
    assert torch.equal(decode_support(encode_support(mask), (100, 200)), mask)


@pytest.mark.parametrize("density", [0.004, 0.005, 0.01, 0.05, 0.1, 0.25, 0.35, 0.5, 0.65, 0.77, 0.95, 0.996])
def test_size_is_near_the_entropy(density):
    mask = random_mask((1000, 1000), density)
    assert encode_support(mask).numel() <= 1.1 * entropy_bytes(mask)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.77, 1.0])
def test_codes_of_before_are_read(density):
    """Dense supports were bitmaps, and the parameter of a Rice code had no flag for the entries that are not set."""
    mask = random_mask((30, 40), density)
    header = torch.tensor([255, *int(mask.sum()).to_bytes(8, "little")], dtype=torch.uint8)
    assert torch.equal(decode_support(torch.cat([header, pack_bits(mask)]), (30, 40)), mask)
    assert int(encode_support(mask)[0]) in ({0, 1, 255} if density <= 0.5 else {128, 129, 130})
    assert encode_support(mask).numel() <= 9 + (mask.numel() + 7) // 8


def test_code_is_a_function_of_the_mask():
    mask = random_mask((50, 40), 0.05)
    codes = [encode_support(m) for m in (mask, mask.clone(), mask.T.contiguous().T)]
    assert len({support_sha256(c) for c in codes}) == 1
    mask[3, 4] = ~mask[3, 4]
    assert support_sha256(encode_support(mask)) != support_sha256(codes[0])


def test_sha256_is_that_of_the_bytes():
    import hashlib

    assert support_sha256(torch.tensor([1, 2, 255], dtype=torch.uint8)) == hashlib.sha256(b"\x01\x02\xff").hexdigest()


@pytest.mark.parametrize("density", [0.004, 0.05, 0.5, 0.8])
def test_truncated(density):
    code = encode_support(random_mask((60, 70), density))
    for length in (0, 1, 8, 9, code.numel() - 1):
        with pytest.raises(ValueError, match=r"\(60, 70\)"):
            decode_support(code[:length], (60, 70))


@pytest.mark.parametrize("density", [0.004, 0.05, 0.5, 0.8])
def test_of_another_shape(density):
    code = encode_support(random_mask((60, 70), density))
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        decode_support(code, (5, 7))


def decodes_or_is_refused(code, shape):
    try:
        mask = decode_support(code, shape)
    except ValueError:
        return
    assert mask.shape == shape
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.5, 0.8, 1.0])
def test_garbled(density):
    g = torch.Generator().manual_seed(0)
    code = encode_support(random_mask((20, 50), density))
    for _ in range(200):
        bad = code.clone()
        where = torch.randint(0, code.numel(), (int(torch.randint(1, 4, (), generator=g)),), generator=g)
        bad[where] = torch.randint(0, 256, where.shape, generator=g).to(torch.uint8)
        decodes_or_is_refused(bad, (20, 50))


@pytest.mark.parametrize("kind", [*range(0, 64, 3), 61, 62, 63, 64, *range(127, 194, 6), 190, 191, 192, 254, 255])
def test_garbage_of_every_kind(kind):
    # Large Rice parameters make gaps that overflow 64 bits.
    g = torch.Generator().manual_seed(kind)
    for count in (0, 1, 2, 5, 40):
        low = (count * (kind % 128) + 7) // 8
        unary = torch.zeros(64, dtype=torch.bool)
        unary[torch.randperm(64, generator=g)[:count]] = True
        body = torch.cat([pack_bits(unary), torch.randint(0, 256, (low,), generator=g).to(torch.uint8)])
        header = torch.tensor([kind, *count.to_bytes(8, "little")], dtype=torch.uint8)
        decodes_or_is_refused(torch.cat([header, body]), (20, 50))


def test_gaps_that_overflow_are_refused():
    # Rice parameter 62, one entry after 2 in unary: its gap, 2 << 62, is negative as a 64-bit integer.
    header = torch.tensor([62, *(1).to_bytes(8, "little")], dtype=torch.uint8)
    with pytest.raises(ValueError, match="not a support"):
        decode_support(torch.cat([header, torch.tensor([0b100], dtype=torch.uint8), torch.zeros(8).byte()]), (20, 50))


# ---- products ----------------------------------------------------------------------------------------------------


def csr(density, shape=(50, 70), seed=0):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * random_mask(shape, density, seed)
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return dense, (rows, dense.nonzero()[:, 1].contiguous(), dense[dense != 0])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 13])
def test_sparse_linear(density, tokens):
    S, arrays = csr(density)
    x = torch.randn(tokens, 70, generator=torch.Generator().manual_seed(1), requires_grad=True)
    grad = torch.randn(tokens, 50, generator=torch.Generator().manual_seed(2))
    y = sparse_linear(x, *arrays, 50)
    y.backward(grad)
    torch.testing.assert_close(y, x.detach() @ S.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, grad @ S, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_sparse_linear_multiplies_in_float32(how):
    S, arrays = csr(0.1)
    x = (
        torch.randn(6, 70, generator=torch.Generator().manual_seed(1))
        .bfloat16()
        .to(torch.bfloat16 if how == "bf16" else torch.float32)
    )
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = sparse_linear(x, *arrays, 50)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.detach().float() @ S.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == x.dtype


def test_sparse_linear_compiles():
    S, arrays = csr(0.1)
    f = torch.compile(lambda x: 2 * sparse_linear(x, *arrays, 50), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = f(x)
    y.sum().backward()
    torch.testing.assert_close(y, 2 * x.detach() @ S.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, (2 * S.sum(0)).expand(5, 70), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["sparse_linear", "gated_linear"])
def test_operators_obey_their_schema(which):
    if which == "sparse_linear":
        _, arrays = csr(0.1)
        op, arguments = torch.ops.hf_jumplora.sparse_linear, (torch.randn(3, 70, requires_grad=True), *arrays, 50)
    else:
        import hf_jumplora.ops.blocked  # noqa: F401, makes the operator

        A, B, log_tau = (torch.randn(s, requires_grad=True) for s in ((2, 8), (6, 2), (1,)))
        x, W, mix = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8), torch.tensor([0.5])
        op = torch.ops.hf_jumplora.gated_linear
        arguments = (x, W, None, A, B, log_tau, mix, 4.0, 1e-3, True, None)
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_known_bits_are_used_as_long_as_the_code_is_the_same(monkeypatch):
    """On a GPU (here the check of the device is taken out) a code just made is not decoded on the host."""
    mask = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    code = sparse.encode_support(mask)
    monkeypatch.setattr(sparse, "_known_bits", {code: (code._version, sparse.pack_bits(mask))})
    monkeypatch.setattr(sparse, "decode_index", lambda code, shape: "decoded")
    assert torch.equal(sparse.support_index(code, (30, 40)), mask.flatten().nonzero().view(-1))
    assert sparse.support_index(code.clone(), (30, 40)) == "decoded"
    code[-1] ^= 1
    assert sparse.support_index(code, (30, 40)) == "decoded"

"""The k-th magnitude against sorting."""

import pytest
import torch

from hf_jumplora.ops import quantile
from hf_jumplora.ops.quantile import kth_magnitude, update_blocks
from hf_jumplora.ops.sparse import pack_bits


def magnitudes(blocks):
    return torch.cat([b.flatten() for b in blocks]).abs().sort().values


def check(blocks, ks):
    expected = magnitudes(blocks)
    for k in ks:
        assert kth_magnitude(lambda: iter(blocks), k) == expected[k - 1].item(), k


def test_against_sorting():
    g = torch.Generator().manual_seed(0)
    blocks = [
        torch.randn(shape, generator=g) * s for shape, s in (((30, 50), 1), ((7,), 1e-3), ((4, 3, 2), 1e4), ((1,), 1))
    ]
    n = magnitudes(blocks).numel()
    check(blocks, [1, 2, 7, 100, n // 2, n - 24, n - 1, n])


def test_values_that_share_their_upper_bits():
    values = 1 + torch.arange(2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))] * 2**-23
    check([values], [1, 2, 1000, 1999, 2000])
    assert len({kth_magnitude(lambda: [values], k) for k in range(500, 520)}) == 20


def test_ties():
    check([torch.tensor([2.0, -2.0, 2.0]), torch.tensor([-1.0, 1.0, 3.0])], range(1, 7))


def test_zeros():
    check([torch.tensor([0.0, -0.0, 0.0, 1.0])], range(1, 5))


def test_denormals():
    tiny = torch.tensor([1, 2, 3, 70000], dtype=torch.int32).view(torch.float32)
    assert (tiny > 0).all()
    assert (tiny < torch.finfo(torch.float32).tiny).all()
    check([tiny * torch.tensor([1.0, -1, 1, -1]), torch.zeros(1)], range(1, 6))


def test_largest_finite():
    check([torch.tensor([torch.finfo(torch.float32).max, 1.0])], [1, 2])


def test_views_and_parameters():
    values = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    check([values.T, values[::2]], [1, 30, 72])


@pytest.mark.parametrize("k", [0, -3, 6])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"{k}"):
        kth_magnitude(lambda: [torch.ones(2), torch.ones(3)], k)


def test_no_entries():
    with pytest.raises(ValueError, match="0 entries"):
        kth_magnitude(lambda: [], 1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("k", [1, 3])
def test_not_finite(value, k):
    with pytest.raises(ValueError, match="not finite"):
        kth_magnitude(lambda: [torch.tensor([1.0, value, 2.0])], k)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_update_blocks_are_the_products(relative_error, rows):
    g = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2, 5, generator=g), torch.randn(9, 2, generator=g, requires_grad=True)) for _ in range(2)]
    blocks = list(update_blocks([(A, B, None) for A, B in factors], rows))
    assert all(b.shape[0] <= rows and not b.requires_grad for b in blocks)
    assert relative_error(torch.cat(blocks), torch.cat([B @ A for A, B in factors])) <= 1e-6


def test_update_blocks_of_entries_that_are_free():
    """256 rows at a time on a CPU, the others zero, in float32 under autocast too."""
    g = torch.Generator().manual_seed(0)
    A, B, free = torch.randn(2, 5, generator=g), torch.randn(600, 2, generator=g), torch.rand(600, 5, generator=g) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        blocks = list(update_blocks([(A, B, pack_bits(free)), (A, B, None)]))
    assert [len(block) for block in blocks] == 2 * [256, 256, 88]
    torch.testing.assert_close(torch.cat(blocks), torch.cat([B @ A * free, B @ A]))


# ---- the bracket -------------------------------------------------------------------------------------------------


def test_one_of_the_largest_is_found_in_one_more_pass():
    values = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    expected, passes = magnitudes([values]), []
    for k in (200_000, 199_990, 199_000, 196_000, 185_000):
        passes.clear()
        found = kth_magnitude(lambda: passes.append(1) or iter(values.split(64)), k)
        assert (found, len(passes)) == (expected[k - 1].item(), 2)
        passes.clear()
        near = found * 1.01
        assert kth_magnitude(lambda: passes.append(1) or iter(values.split(64)), k, near=near) == found
        assert len(passes) == 1


@pytest.mark.parametrize("near", [1e-9, 0.5, 1e9, float("inf")])
def test_a_wrong_guess_changes_nothing(near):
    values = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    for k in (1, 45_000, 88_000, 90_000):
        assert kth_magnitude(lambda: [values], k, near=near) == magnitudes([values])[k - 1].item()


def test_a_bracket_has_its_upper_end_but_not_its_lower(monkeypatch):
    blocks = list(torch.tensor([[1.0, -2, 3], [-4, 5, 6]]))
    inside = {k: quantile._within(lambda: iter(blocks), k, 2.0, 5.0) for k in range(1, 7)}
    assert inside == {1: None, 2: None, 3: 3.0, 4: 4.0, 5: 5.0, 6: None}
    for value in (float("nan"), float("inf"), -float("inf")):  # outside the bracket
        assert quantile._within(lambda value=value: [torch.tensor([1.0, 3, 6, value])], 2, 2.0, 5.0) is None
    monkeypatch.setattr(quantile, "_INSIDE", 3)  # as many may be kept, and no more
    assert quantile._within(lambda: iter(blocks), 4, 2.0, 5.0) == 4.0
    assert quantile._within(lambda: iter(blocks), 4, 1.0, 5.0) is None


def test_a_sample_that_misleads_changes_nothing():
    values = torch.rand(120_000, generator=torch.Generator().manual_seed(0))
    values[::61] *= 1e-3  # the sampled entries are small
    check([values], [120_000, 119_000, 110_000])


def test_ties_at_the_bracket():
    values = torch.cat([torch.full((100_000,), 0.5), torch.linspace(0, 1, 5_000)])
    check([values], [105_000, 104_000, 102_000, 101_000, 100_000])


def test_not_finite_in_a_large_block():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for value in (float("nan"), float("inf"), -float("inf")):
        values[12_345] = value
        with pytest.raises(ValueError, match="not finite"):
            kth_magnitude(lambda: [values], 99_000, near=2.3)
        with pytest.raises(ValueError, match="not finite"):
            kth_magnitude(lambda: [values], 99_000)


def _quantiles_of_one_rank(rank: int, store: str) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values = torch.randn(2, 3_000, generator=torch.Generator().manual_seed(0))
    values[1, :50] = values[0, :50]  # ties over the ranks
    part = values[0, :1_000] if rank == 0 else torch.cat([values[0, 1_000:], values[1]])
    everything = magnitudes([values])
    for k in (1, 2_000, 5_900, 6_000):
        found = kth_magnitude(lambda part=part: part.split(700), k, reduce=dist.all_reduce)
        assert found == everything[k - 1].item(), (rank, k)
    dist.destroy_process_group()


def test_two_ranks_with_parts_of_different_size(tmp_path):
    torch.multiprocessing.spawn(_quantiles_of_one_rank, args=(str(tmp_path / "store"),), nprocs=2)

"""Stacks at a lower rank: the best factors, the same supports, and a stack like any other."""

import pytest
import torch
import toy

from hf_jumplora import load_stack
from hf_jumplora.cli import main
from hf_jumplora.stack import export_lora, read_manifest, squeeze, verify_stack
from hf_jumplora.stack.export import cut_factors
from hf_jumplora.stack.operations import open_tasks


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])


@pytest.fixture(scope="module", params=["gated", "plain"])
def stack(request, toy_base, tmp_path_factory):
    """Two tasks; one layer has another rank, and rsLoRA's scaling."""
    folder = tmp_path_factory.mktemp("stack")
    adapter = {"gate": request.param == "gated", "rank_pattern": {"v_proj": 4}, "use_rslora": True}
    toy.make_run(toy_base, folder, stream=toy.tasks(2), method="inclora" if request.param == "plain" else "jumplora",
                 adapter=adapter).train()  # fmt: skip
    return folder


def test_golden():
    """B = diag(3, 1), A = I: rank 1 is (sqrt 3, 0) on both sides, with nine tenths of the energy."""
    A, B, energy = cut_factors(torch.eye(2), torch.diag(torch.tensor([3.0, 1.0])), rank=1)
    torch.testing.assert_close(A.abs(), torch.tensor([[3**0.5, 0.0]]))
    torch.testing.assert_close(B @ A, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert energy == pytest.approx(0.9)
    A, _, energy = cut_factors(torch.zeros(2, 3), torch.ones(4, 2), energy=0.5)
    assert (A.shape, energy) == ((1, 3), 1.0)


@pytest.mark.parametrize(("out", "inner"), [(6, 5), (3, 9)])
def test_cut_is_the_best_of_its_rank(out, inner):
    torch.manual_seed(0)
    A, B = torch.randn(4, inner), torch.randn(out, 4)
    S = torch.linalg.svdvals((B @ A).double())
    A2, B2, energy = cut_factors(A, B, rank=2)
    error = torch.linalg.matrix_norm((B @ A - B2 @ A2).double(), 2)
    torch.testing.assert_close(error, S[2], rtol=1e-5, atol=1e-6)
    assert energy == pytest.approx(float(S[:2].square().sum() / S.square().sum()))
    A3, _, energy = cut_factors(A, B, energy=energy)
    assert len(A3) == 2
    A4, B4, _ = cut_factors(A, B, rank=9)
    torch.testing.assert_close(B4 @ A4, B @ A, rtol=1e-5, atol=1e-6)


def test_supports_stay(stack, tmp_path):
    """Every update is the best factors' product on the old support, at the old scaling; the figures are those."""
    rows = squeeze(stack, tmp_path / "out", rank=2, min_energy=0)
    verify_stack(tmp_path / "out")
    (_, _, before), (_, _, after) = open_tasks(stack), open_tasks(tmp_path / "out")
    assert read_manifest(tmp_path / "out").task_names == read_manifest(stack).task_names
    changed = 0
    for old, new in zip(before, after, strict=True):
        for layer in old.shapes:
            assert old.code(layer) is None or torch.equal(old.code(layer), new.code(layer))
            A, B, _ = cut_factors(*old.factors(layer), rank=2)
            assert new.scaling(layer) == pytest.approx(old.scaling(layer))
            torch.testing.assert_close(new.update(layer), old.update(layer, (A, B)), rtol=1e-6, atol=1e-9)
            left = (old.update(layer) - new.update(layer)).double().square().sum() / old.update(layer).square().sum()
            assert rows[old.name][layer] == (2, pytest.approx(1 - float(left), abs=1e-6))
            changed += float(left) > 1e-4
    assert changed  # layers of rank 4
    smaller = load_stack(tmp_path / "out")
    merged = load_stack(tmp_path / "out", merge=True)
    with torch.no_grad():
        torch.testing.assert_close(smaller.eval()(IDS).logits, merged.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_first_ranks(stack, tmp_path):
    """Of nested ranks, at the scaling that rank has: alpha / sqrt(rank). Too little energy is refused unless forced."""
    with pytest.raises(ValueError, match=r"would retain .* less than min_energy=100%"):
        squeeze(stack, tmp_path / "out", rank=1, prefix=True, min_energy=1.0)
    squeeze(stack, tmp_path / "out", rank=1, prefix=True, min_energy=1.0, force=True)
    for old, new in zip(open_tasks(stack)[2], open_tasks(tmp_path / "out")[2], strict=True):
        for layer in old.shapes:
            A, B = old.factors(layer)
            expected = old.update(layer, (A[:1], B[:, :1] * len(A) ** 0.5))
            torch.testing.assert_close(new.update(layer), expected, rtol=1e-6, atol=1e-9)


def test_own_rank_changes_nothing(stack, tmp_path):
    squeeze(stack, tmp_path / "out", energy=1.0)
    with torch.no_grad():
        a, b = (load_stack(path, merge=True).eval()(IDS).logits for path in (stack, tmp_path / "out"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_command_and_refusals(stack, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["squeeze", str(stack), "--rank", "1", "--out", out, "--min-energy", "0.999"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for wrong in (["--rank", "0"], [], ["--rank", "1", "--energy", "0.5"]):
        assert main(["squeeze", str(stack), "--out", out, *wrong]) == 2
        assert "rank" in capsys.readouterr().err
    assert main(["squeeze", str(stack), "--rank", "1", "--out", out, "--force"]) == 0
    assert "rank 1" in capsys.readouterr().out
    assert main(["squeeze", str(stack), "--rank", "1", "--out", out]) == 2  # not empty


def test_lora_export_of_plain_tasks_is_exact(stack, tmp_path):
    """Without gates the sum is a product of the factors side by side: 2 + 2 ranks lose nothing."""
    rows = export_lora(stack, tmp_path / "out", rank=8, force=True)
    plain = not open_tasks(stack)[2][0].config.gate
    assert all((energy > 1 - 1e-9) == plain for _, energy in rows.values())

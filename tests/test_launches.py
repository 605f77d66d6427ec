"""What must be fast on a GPU, counted on a CPU: operations and waits of a training step, of 30 layers."""

import functools

import pytest
from interpreted import kernels_package


pytest.importorskip("triton")


@functools.cache
def counted(name):
    import launches

    with kernels_package():
        return launches.measure(name)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """As on a GPU. The kernels are counted, not run."""
    monkeypatch.setenv("HF_JUMPLORA_BACKEND", "triton")


@pytest.mark.parametrize("method", ["jumplora", "jumplora-best"])
def test_a_step_costs_what_loras_costs(method):
    """With held density and curvature penalty, and without one wait for the device beyond the Trainer's own."""
    lora, ours = counted("lora"), counted(method)
    assert ours["step"].operations <= 1.1 * lora["step"].operations
    assert ours["step"].waits.total() == lora["step"].waits.total()
    assert ours["logging"].operations <= 1.2 * lora["logging"].operations
    assert ours["logging"].waits.total() <= lora["logging"].waits.total() + 5
    assert ours["step"].by_name["kernel gate_grad"] > 0  # the kernels' way was counted


def test_the_end_of_a_task_waits_for_layers_not_for_examples():
    """64 examples and 60 layers: a support is coded in three waits, everything else is asked for at once."""
    end = counted("jumplora-best")["end"]
    coding = sum(n for where, n in end.waits.items() if "ops/sparse.py" in where)
    assert end.waits.total() - coding <= 8
    assert coding <= 4 * 60
    assert end.by_name["_linalg_eigh"] <= 8
    assert end.by_name["_linalg_svd"] == 0
    assert end.operations <= 12_000


def test_the_table_of_all_results(tmp_path):
    """`make bench` reads every row that was ever committed, those of a GPU too."""
    import run

    table = run.table()
    assert "NaN" not in table
    assert table.count("\n| layer |") > 10
    pytest.importorskip("matplotlib")
    run.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000

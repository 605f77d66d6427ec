"""Two tasks through `ContinualRun` on a tiny Llama and a tiny T5: every backend trains the same model."""

import pytest
import toy
from interpreted import DEVICE, kernels_package
from transformers import TrainerCallback

from hf_jumplora.ops import dispatch
from hf_jumplora.tuner import named_layers


class Losses(TrainerCallback):
    """The losses of all steps."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(base, folder, backend):
    """(losses of all steps of both tasks, accuracy matrix, {(task, layer): support})."""
    watch = Losses()
    adapter = {"backend": backend, "initial_density": 0.1}
    run = toy.make_run(
        base, folder, stream=toy.tasks(2, train=32, evaluate=4), adapter=adapter, callbacks=[watch], logging_steps=1,
        use_cpu=DEVICE == "cpu", eval_tasks="seen",
    )  # fmt: skip
    metrics = run.train().metrics
    layers = named_layers(run.model)
    supports = {(task, name): layer.support(task).cpu() for task in ("task_000", "task_001") for name, layer in layers}
    return watch.losses, metrics["matrix"], supports


@pytest.mark.parametrize("architecture", ["toy_base", pytest.param("toy_t5", marks=pytest.mark.slow)])
def test_the_loss_curve_does_not_depend_on_the_backend(architecture, request, tmp_path, monkeypatch):
    """8 steps a task, through the start of the threshold and the ramp. Every loss to a relative error of 1e-5, of the
    support all but two entries in a thousand.

    Not of one layer: behind a single token, the query of T5's decoder gets a gradient of rounding errors alone, and
    Adam makes steps of full size of them.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_logged", set())
    dispatch._choose.cache_clear()
    base = request.getfixturevalue(architecture)
    results = {backend: train(base, tmp_path / backend, backend) for backend in ("naive", "blocked")}
    with kernels_package():
        results["triton"] = train(base, tmp_path / "triton", "triton")
    assert {name for name, _ in dispatch._logged} == set(results)
    expected, matrix, supports = results["naive"]
    assert len(expected) == 16
    assert expected[7] < expected[0]  # both tasks are learned
    assert expected[-1] < expected[8]
    for losses, scores, found in results.values():
        assert losses == pytest.approx(expected, rel=1e-5)
        assert scores == matrix
        for (task, layer), support in supports.items():
            if not layer.endswith("decoder.block.0.layer.0.SelfAttention.q"):
                assert (found[task, layer] != support).float().mean() <= 2e-3, (task, layer)

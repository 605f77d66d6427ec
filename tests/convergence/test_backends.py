"""Two tasks through `ContinualRun` on a tiny Llama and a tiny T5: every backend trains the same model."""

import json

import pytest
import toy
from interpreted import DEVICE, kernels_package
from transformers import TrainerCallback

from hf_jumplora.ops import dispatch


class Losses(TrainerCallback):
    """The losses of all steps."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(base, folder, backend):
    """(losses of all steps of both tasks, metrics.json)."""
    watch = Losses()
    adapter = {"backend": backend, "initial_density": 0.1}
    run = toy.make_run(
        base, folder, stream=toy.tasks(2, train=32, evaluate=4), adapter=adapter, callbacks=[watch], logging_steps=1,
        use_cpu=DEVICE == "cpu", eval_tasks="seen",
    )  # fmt: skip
    run.train()
    return watch.losses, json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("architecture", ["toy_base", "toy_t5"])
def test_the_loss_curve_does_not_depend_on_the_backend(architecture, request, tmp_path, monkeypatch):
    """8 steps a task, through the start of the threshold and the ramp; every loss to a relative error of 1e-5.

    Densities to 0.01 only: Adam makes steps of full size of gradients that are rounding errors.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_logged", set())
    base = request.getfixturevalue(architecture)
    results = {backend: train(base, tmp_path / backend, backend) for backend in ("naive", "blocked")}
    with kernels_package():
        results["triton"] = train(base, tmp_path / "triton", "triton")
    assert {name for name, _ in dispatch._logged} == set(results)
    expected, metrics = results["naive"]
    assert len(expected) == 16
    assert expected[7] < expected[0]  # both tasks are learned
    assert expected[-1] < expected[8]
    for losses, found in results.values():
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found["matrix"] == metrics["matrix"]
        for task, reference in zip(found["trained"], metrics["trained"], strict=True):
            assert task["density"] == pytest.approx(reference["density"], abs=0.01)

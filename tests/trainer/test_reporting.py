"""What a run shows while it trains: lines in a log file, and one x-axis for what `report_to` names."""

import pytest
import toy
from transformers import TrainerCallback

from hf_jumplora.trainer.callbacks import ReportCallback


class Recorder(TrainerCallback):
    """In place of TensorBoard."""

    seen: list = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(("begin", args.output_dir))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, logs.get("task"), "loss" in logs))


def test_one_axis_over_tasks(toy_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_jumplora.trainer.callbacks.get_reporting_integration_callbacks", lambda names: [Recorder])
    monkeypatch.setattr(Recorder, "seen", [])
    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(2), logging_steps=4, disable_tqdm=None)
    assert sum(isinstance(callback, ReportCallback) for callback in run.plan.callbacks) == 1
    capsys.readouterr()  # of loading the base
    run.train()
    begun, *logged = Recorder.seen
    assert begun == ("begin", str(tmp_path))  # once, and not in the folder of the checkpoints
    assert [entry for entry in logged if entry[2]] == [
        (4, "size", True), (8, None, True), (12, "light", True), (16, None, True)
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err  # no terminal here: no progress bars
    lines = [line for line in printed.out.splitlines() if line.startswith("task ")]
    assert lines[0] == "task 1 of 2, size: 8 steps"
    assert lines[4].startswith("task 2 of 2, light: step 4 of 8, loss ")
    assert "density" in lines[4]
    assert "SHIP" in printed.out


def test_an_unknown_integration(toy_base, tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        toy.make_run(toy_base, tmp_path, report_to=["nonsense"])

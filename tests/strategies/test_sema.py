"""SEMA: what is new is told by hand-made errors, a known task costs nothing and is called so, refusals."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
import toy
from safetensors.torch import load, save
from transformers import TrainerCallback

from hf_jumplora import load_stack
from hf_jumplora.cli import main
from hf_jumplora.methods import METHODS
from hf_jumplora.report.folder import read_run
from hf_jumplora.report.verdict import judge_metrics
from hf_jumplora.strategies import L2, Replay, Sema, sema
from hf_jumplora.strategies.sema import describe, mixture, z_scores


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])
RESTART = {"save_strategy": "steps", "save_steps": 1}


def features(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def described():
    """Every second row is fitted: with no direction, the others' errors are 1, 2 and 3."""
    return describe(features([0, 0], [1, 0], [0, 0], [0, math.sqrt(2)], [0, 0], [math.sqrt(3), 0]), 0)


def test_golden():
    """Errors 1, 2, 3: mean 2, standard deviation 1. Error 5 is z = 3, error 0 is z = -2."""
    known = described()
    torch.testing.assert_close(known["errors"], torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(z_scores(features([math.sqrt(5), 0], [0, 0]), known), torch.tensor([3.0, -2.0]))


def test_directions_that_are_known_have_no_error():
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 8)
    known = describe(rows, 3)
    assert known["basis"].shape == (8, 3)
    assert sema.errors(rows, known).max() < 1e-9
    torch.testing.assert_close(sema.errors(rows + 2 * torch.eye(8)[5], known), torch.full((40,), 4.0))
    assert describe(rows[:6], 3)["basis"].shape == (8, 1)  # of three rows
    assert torch.isfinite(describe(rows[:1], 3)["errors"]).all()


@pytest.mark.parametrize(("row", "reused"), [([math.sqrt(5), 0], None), ([0, 0], 7)])
def test_what_is_new(row, reused, gated, monkeypatch):
    """Low errors are not new; a descriptor that was stored says the same; all processes do as the first one says."""
    first = Sema(threshold=2.0)
    first.descriptors = {7: described()}
    strategy = Sema(threshold=2.0)
    strategy.load_state_dict(load(save(first.state_dict())))
    monkeypatch.setattr(Sema, "_features", lambda *_: features(row, row))
    model = gated(gate=False)
    for one in (first, strategy):
        one.on_task_start(model, "default", None)
        assert one.reused == reused
    for key, value in described().items():
        assert torch.equal(strategy.descriptors[7][key], value)
    monkeypatch.setattr(sema, "broadcast", lambda z: 5 - 2 * z)  # the first process has found the opposite
    strategy.on_task_start(model, "default", None)
    assert strategy.reused == (7 if reused is None else None)


class Interrupt(TrainerCallback):
    """Ctrl-C in the second task, after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("task_001") and state.global_step == 2:
            raise KeyboardInterrupt


def test_a_known_task_is_not_trained(toy_base, tmp_path, monkeypatch, caplog, capsys):
    """Neither is its adapter anything, and report and verdict say so. A task with a checkpoint is trained to its end,
    whatever is found after the restart."""
    folder, stream = tmp_path / "run", toy.tasks(2, 12, 2)
    stream.append(dataclasses.replace(stream[0], name="again", train_dataset=toy.rows(0, 12, 7)))
    with pytest.raises(KeyboardInterrupt):
        toy.make_run(toy_base, folder, "sema", stream, callbacks=[Interrupt()], **RESTART).train()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(sema, "z_scores", lambda *args: z_scores(*args) - 1e6)
        run = toy.make_run(toy_base, folder, "sema", stream, **RESTART)
        run.train()
    assert [(info["steps"], info.get("reused")) for info in run.record.trained] == [(3, None), (3, None), (0, "size")]
    assert sorted(run.strategies[0].descriptors) == [0, 1]
    assert "task number 0, whose prompts are alike, serves it" in caplog.text
    assert "3. again (not trained: size serves it)" in (folder / "report.md").read_text()
    with torch.no_grad():
        assert torch.equal(run.model.eval()(IDS).logits, load_stack(folder, tasks=["size", "light"])(IDS).logits)
        assert torch.equal(load_stack(folder, tasks=["again"])(IDS).logits, toy.load_base(toy_base)(IDS).logits)

    known, route = list(run.strategies[0].descriptors.values()), mixture(folder)
    given = torch.stack([one["mean"] for one in known])
    z = torch.stack([z_scores(given, one) for one in known], 1)
    assert torch.equal(route(given), torch.cat([(-z).softmax(1), torch.zeros(2, 1)], 1))
    assert torch.isfinite(load_stack(folder, route=route)(IDS).logits).all()

    metrics = copy.deepcopy(read_run(folder).metrics)
    for score, ok, says in (
        (0.75, None, "not trained: its prompts are like those of size, which serves it"),
        (0.5, False, "no better by the adapter of size, which serves it without training (50.0) than before (50.0)"),
    ):
        metrics["matrix"][0][2], metrics["matrix"][3][2] = 0.5, score
        (found,) = (c for c in judge_metrics(metrics)["checks"] if c["check"] == "learning of again")
        assert (found["ok"], found["says"]) == (ok, says)
    assert main(["remove", str(folder), "--tasks", "size", "--out", str(tmp_path / "rest")]) == 0
    assert "Nothing serves again any more" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it was not trained with Sema"):  # what is left has no descriptors
        mixture(tmp_path / "rest")


def test_refused(toy_base, toy_run, tmp_path):
    with pytest.raises(ValueError, match="it was not trained with Sema"):
        mixture(toy_run.output_dir)
    with pytest.raises(ValueError, match="only Replay goes with Sema"):
        Sema().check_run([L2()], None, "none")
    Sema().check_run([Replay()], None, "ddp")
    with pytest.raises(ValueError, match="which DeepSpeed and FSDP shard"):
        Sema().check_run([], None, "zero1")
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="use an incremental method such as inclora"):
            toy.make_run(toy_base, tmp_path, method, strategies=[Sema()])
    for options in ({"threshold": math.nan}, {"directions": 0}, {"examples": 0}):
        with pytest.raises(ValueError, match="Sema needs a finite threshold, directions >= 1"):
            Sema(**options)
    assert METHODS["sema"].make_strategies(["sema.threshold=2"])[0].threshold == 2

"""`hf-jumplora check`: the verdict, its reasons and its exit code."""

import json
import math

import pytest
from report.runs import write_run

from hf_jumplora.cli import main
from hf_jumplora.report.verdict import mcnemar


NAMES = ["first", "second", "third"]
GOOD = [[0.2, 0.2, 0.2], [0.9, 0.2, 0.2], [0.9, 0.8, 0.2], [0.89, 0.8, 0.7]]
BAD = [[0.2, 0.2, 0.2], [0.9, 0.2, 0.2], [0.8, 0.8, 0.2], [0.6, 0.8, 0.7]]


def check(capsys, *argv):
    code = main(["check", *map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def failed(result):
    return [c["check"] for c in result["checks"] if c["ok"] is False]


def test_ship(tmp_path, capsys):
    code, result = check(capsys, write_run(tmp_path / "run", NAMES, matrix=GOOD))
    assert (code, result["ship"], failed(result)) == (0, True, [])
    assert main(["check", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SHIP"
    assert "ok    forgetting: 0.5 points on average (at most 2)" in lines
    assert "-     general ability: not measured: give general_text, or tasks with held_out=True" in lines


def test_forgetting(tmp_path, capsys):
    run = write_run(tmp_path / "run", NAMES, matrix=BAD)
    code, result = check(capsys, run)
    assert (code, result["ship"], failed(result)) == (1, False, ["forgetting", "task first"])
    code, result = check(capsys, run, "--max-forgetting", 15, "--max_task_loss", 30)
    assert (code, failed(result)) == (0, [])


def test_learned_nothing(tmp_path, capsys):
    """A task that was perfect before its training is no fault of it."""
    flat = [[0.2, 1.0, 0.2], [0.2, 1.0, 0.2], [0.2, 1.0, 0.2], [0.2, 1.0, 0.7]]
    code, result = check(capsys, write_run(tmp_path / "run", NAMES, matrix=flat))
    assert (code, failed(result)) == (1, ["learning of first"])
    (says,) = [c["says"] for c in result["checks"] if c["check"] == "learning of first"]
    assert says == "no better after its training (20.0) than before (20.0)"


def test_joint_training_without_an_average(tmp_path, capsys):
    """A task has no score: the one stage is finished all the same."""
    run = write_run(tmp_path / "run", NAMES, matrix=[[0.2, 0.2, None], [0.9, 0.8, None]], method="mtl")
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("learning_accuracy", "backward_transfer", "forgetting"):
        metrics.pop(name, None)
    metrics["trained"][0]["name"] = "joint"
    (run / "metrics.json").write_text(json.dumps(metrics))
    code, result = check(capsys, run)
    assert (code, failed(result)) == (0, [])
    assert result["checks"][0]["says"] == "1 of 1 tasks are trained"


def test_nothing_was_measured(tmp_path, capsys):
    nothing = [[None] * 3] * 4
    code, result = check(capsys, write_run(tmp_path / "run", NAMES, matrix=nothing))
    assert (code, failed(result)) == (1, ["scores"])


def test_unfinished(tmp_path, capsys):
    code, result = check(capsys, write_run(tmp_path / "run", NAMES, matrix=GOOD[:-1]))
    assert (code, failed(result)) == (1, ["finished"])


def test_general_ability(tmp_path, capsys):
    before, after = (
        {"wiki cross_entropy": 3.0, "quiz accuracy": 0.8},
        {"wiki cross_entropy": 3.1, "quiz accuracy": 0.77},
    )
    run = write_run(tmp_path / "run", NAMES, matrix=GOOD, general=[before, {}, {}, after])
    code, result = check(capsys, run)
    assert (code, failed(result)) == (1, ["general ability, wiki cross_entropy", "general ability, quiz accuracy"])
    limits = tmp_path / "limits.yaml"
    limits.write_text("max_general_loss: 0.2\nmax_general_drop: 1\n")
    assert failed(check(capsys, run, "--limits", limits)[1]) == ["general ability, quiz accuracy"]
    assert check(capsys, run, "--limits", limits, "--max_general_drop", 4)[0] == 0  # options win
    nan = write_run(
        tmp_path / "nan", NAMES, matrix=GOOD, general=[before, {}, {}, {**before, "quiz accuracy": math.nan}]
    )
    assert failed(check(capsys, nan)[1]) == ["general ability, quiz accuracy"]


def test_against(tmp_path, capsys):
    good = write_run(tmp_path / "good", NAMES, matrix=GOOD)
    bad = write_run(tmp_path / "jumplora", NAMES, matrix=BAD)
    loose = ["--max_forgetting", 100, "--max_task_loss", 100]
    assert failed(check(capsys, bad, "--against", good, *loose)[1]) == ["against good (jumplora)"]
    code, result = check(capsys, good, "--against", bad, *loose)
    assert (code, result["checks"][-1]["check"]) == (0, "against jumplora")  # the folder's name is the method's


@pytest.mark.parametrize(("lost", "ships"), [(3, True), (30, False)])
def test_against_with_predictions(tmp_path, capsys, lost, ships):
    """Three rows of 120 could be chance although accuracy is lower; thirty could not."""
    good = write_run(tmp_path / "good", NAMES, matrix=GOOD, flips={})
    run = write_run(tmp_path / "run", NAMES, matrix=[*GOOD[:-1], [0.85, 0.8, 0.68]], flips={"first": (lost, 0)})
    code, result = check(capsys, run, "--against", good, "--max_forgetting", 100, "--max_task_loss", 100)
    assert code == (0 if ships else 1)
    assert f"of 120 rows {lost} are right only in that run, 0 only in this one" in result["checks"][-1]["says"]
    assert result["flips"][0] == {"task": "first", "right_to_wrong": lost, "wrong_to_right": 0, "p": mcnemar(lost, 0)}


def test_mcnemar():
    """Against numbers worked out by hand from the binomial distribution."""
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(4, 4) == 1
    assert mcnemar(30_000, 30_100) == pytest.approx(0.68, abs=0.02)  # large counts do not overflow


def test_mistakes(tmp_path, capsys):
    run = write_run(tmp_path / "run", NAMES, matrix=GOOD)
    other = write_run(tmp_path / "other", ["first", "second"], matrix=[row[:2] for row in GOOD[:3]])
    (tmp_path / "limits.yaml").write_text("max_forgeting: 3")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    cases = {
        "no metrics.json there": [tmp_path],
        "has other tasks than": [run, "--against", other],
        "expected keys of max_forgetting": [run, "--limits", tmp_path / "limits.yaml"],
        "must be a number of at least 0, not -1.0": [run, "--max_forgetting", -1],
        "is not valid JSON": [tmp_path / "broken"],
    }
    for words, argv in cases.items():
        assert main(["check", *map(str, argv)]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out

"""What a run leaves for its report: history.jsonl, where each task lives, report.html."""

import json

import pytest
import toy

from hf_jumplora.report.folder import PREDICTIONS, ROWS, after, read_lines, read_run
from hf_jumplora.report.verdict import judge
from hf_jumplora.trainer import predictions


def test_a_run_leaves_its_history_and_a_page(toy_run):
    stored = read_run(toy_run.output_dir)
    assert [(line["task"], line["step"]) for line in stored.history] == [
        (task, step) for task in ("size", "light", "mood") for step in (2, 4, 6, 8)
    ]
    assert {"loss", "density", "threshold", "mix"} <= set(stored.history[-1])
    page = (toy_run.output_dir / "report.html").read_text()
    assert "While it trained" in page
    assert "Where in the network each task lives" in page


def test_layers_add_up_to_the_whole(toy_run):
    """The mean over layers, weighed by their size (q_proj has twice the entries of v_proj), is the whole."""
    for info in read_run(toy_run.output_dir).metrics["trained"]:
        layers = [(2 if "q_proj" in name else 1, values) for name, values in info["layers"].items()]
        assert sum(size for size, _ in layers) == 6
        assert sum(n * v["density"] for n, v in layers) / 6 == pytest.approx(info["density"], abs=1e-5)
        for k, collision in enumerate(info["collision"]):
            assert sum(n * v["collision"][k] for n, v in layers) / 6 == pytest.approx(collision, abs=1e-5)


def test_a_restart_logs_a_step_again_and_it_counts_once(toy_base, tmp_path):
    toy.killed(toy_base, str(tmp_path), "jumplora", "step task_001 7", {"save_strategy": "steps", "save_steps": 4})
    toy.make_run(toy_base, tmp_path, save_strategy="steps", save_steps=4).train()
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sum(line["task"] == "light" and line["step"] == 6 for line in lines) == 2
    assert len(read_run(tmp_path).history) == 12
    _check_answers(tmp_path)


def _check_answers(folder):
    """The answers kept of a toy run are those that its matrix counts."""
    stored = read_run(folder)
    matrix = stored.metrics["matrix"]
    names = stored.metrics["tasks"]
    for stage, name in enumerate(names, 1):
        found = stored.answers(stage)
        assert {task for task, _ in found} == (set(names) if stage == 3 else {name})  # earlier: its own task alone
        for j, task in enumerate(names):
            right = [answer["correct"] for (of, _), answer in found.items() if of == task]
            assert not right or (len(right) == 8 and sum(right) / 8 == matrix[stage][j])


def test_a_run_keeps_its_answers(toy_run):
    folder = toy_run.output_dir
    _check_answers(folder)
    assert sorted(path.name for path in (folder / PREDICTIONS).iterdir()) == [*map(after, (1, 2, 3)), ROWS]
    stored, data = read_run(folder), toy_run.tasks[1].eval_dataset
    assert stored.rows()["light", 3] == {
        "task": "light", "row": 3, "text": data[3]["sentence"], "expected": data[3]["label"]
    }  # fmt: skip
    lost, won = stored.flips("size", 1)
    flips = judge(stored)["flips"][0]
    assert (len(lost), len(won)) == (flips["right_to_wrong"], flips["wrong_to_right"])
    assert (len(won) - len(lost)) / 8 == pytest.approx(stored.metrics["matrix"][3][0] - stored.metrics["matrix"][1][0])


def test_answers_are_bounded(tmp_path, monkeypatch):
    """Of many rows some, evenly spaced; of long texts the beginning; what was kept of other tasks stays."""
    monkeypatch.setattr(predictions, "ROWS_KEPT", 4)
    size, light = toy.tasks(2)
    size.eval_dataset = [{"sentence": "word " * 1000, "label": "huge"} for _ in range(10)]
    predictions.write_answers(tmp_path, [size, light], 1, {"light": [("pale", 1.0)] * 8})
    predictions.write_answers(tmp_path, [size, light], 1, {"size": [("h" * 1000, 0.4)] * 10})
    rows, said = (read_lines(tmp_path / PREDICTIONS / name) for name in (ROWS, after(1)))
    assert [(line["task"], line["row"]) for line in rows] == [
        *(("light", row) for row in (0, 2, 4, 6)), *(("size", row) for row in (0, 2, 5, 7))
    ]  # fmt: skip
    assert (len(rows[-1]["text"]), len(said[-1]["predicted"])) == (500, 200)
    assert [line["correct"] for line in said] == [True] * 4 + [False] * 4

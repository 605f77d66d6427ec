"""What a run leaves for its report: history.jsonl, where each task lives, report.html."""

import json

import pytest
import toy

from hf_jumplora.report.folder import read_run


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

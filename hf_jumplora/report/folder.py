"""Reading a run's folder: metrics.json, run.json, history.jsonl and the predictions.

`history.jsonl`: one JSON object a logging step, {"task", "step", "loss", ...} with what the trainer logged; a step that
was logged twice (after an interruption) counts as it was logged last.

`predictions/`: `rows.jsonl` has one object a row that is evaluated, {"task", "row", "text", "expected"}, and
`after_001.jsonl`, `after_002.jsonl`, ... what the model said of it after so many tasks, {"task", "row", "predicted",
"correct"}: the newest of all tasks, an earlier one of the task alone that was then new.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


HISTORY = "history.jsonl"
PREDICTIONS, ROWS = "predictions", "rows.jsonl"
# {"after": finished tasks, "limit", "scores": {"task metric": {"base", "stack"}}}, with "each" (after each task) or not
HARNESS = "lm_eval.json"


def after(stage: int) -> str:
    """The file with the model's answers after `stage` tasks."""
    return f"after_{stage:03d}.jsonl"


@dataclass
class StoredRun:
    """path, the content of metrics.json and run.json (empty without one), of history.jsonl in order, the versions that
    stack.json names, and the content of lm_eval.json (empty without one)."""

    path: Path
    metrics: dict[str, Any]
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    versions: dict[str, str] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    _answers: dict[int, dict[tuple[str, int], dict[str, Any]]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The folder's name, with the method unless that is its name."""
        folder, method = self.path.resolve().name, self.metrics["method"]
        return folder if folder == method else f"{folder} ({method})"

    def answers(self, stage: int) -> dict[tuple[str, int], dict[str, Any]]:
        """{(task, row): {"predicted", "correct"}} of the model after `stage` tasks; empty if none were stored."""
        if stage not in self._answers:
            lines = read_lines(self.path / PREDICTIONS / after(stage))
            self._answers[stage] = {(line["task"], line["row"]): line for line in lines}
        return self._answers[stage]

    def rows(self) -> dict[tuple[str, int], dict[str, Any]]:
        """{(task, row): {"text", "expected"}}; empty if none were stored."""
        return {(line["task"], line["row"]): line for line in read_lines(self.path / PREDICTIONS / ROWS)}

    def flips(self, task: str, learned: int) -> tuple[list[int], list[int]]:
        """The rows of a task that were right after stage `learned` and are wrong now, and the reverse."""
        before, now = self.answers(learned), self.answers(len(self.metrics["matrix"]) - 1)
        both = [key for key in before if key in now and key[0] == task]
        lost = [row for _, row in both if before[task, row]["correct"] and not now[task, row]["correct"]]
        won = [row for _, row in both if not before[task, row]["correct"] and now[task, row]["correct"]]
        return lost, won


def read_run(path: str | Path) -> StoredRun:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: no metrics.json there. ValueError: a file is not what it should be; it is named.
    """
    path = Path(path)
    if not (path / "metrics.json").is_file():
        raise FileNotFoundError(f"{path}: no metrics.json there: give the output_dir of a run")
    metrics, settings = _json(path / "metrics.json"), {}
    needed = {"tasks": list, "matrix": list, "trained": list, "method": str}
    wrong = [key for key, kind in needed.items() if not isinstance(metrics.get(key), kind)]
    if wrong or not metrics["matrix"] or any(len(row) != len(metrics["tasks"]) for row in metrics["matrix"]):
        raise ValueError(f"{path / 'metrics.json'}: not the metrics of a run ({', '.join(wrong) or 'matrix'})")
    if (path / "run.json").is_file():
        settings = _json(path / "run.json")
    latest = {(line["task"], line["step"]): line for line in read_lines(path / HISTORY)}
    order = {info["name"]: k for k, info in enumerate(metrics["trained"])}
    history = [latest[key] for key in sorted(latest, key=lambda key: (order.get(key[0], len(order)), key[1]))]
    versions = _json(path / "stack.json").get("versions", {}) if (path / "stack.json").is_file() else {}
    harness = _json(path / HARNESS) if (path / HARNESS).is_file() else {}
    rows = harness.get("scores", {})
    if not isinstance(rows, dict) or not all(
        isinstance(row, dict) and {"base", "stack"} <= row.keys() for row in rows.values()
    ):
        raise ValueError(f"{path / HARNESS}: not what `hf-jumplora eval --lm_eval` writes")
    return StoredRun(path, metrics, settings, history, versions, harness)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, empty if there is none; an incomplete last line, left by a kill, is skipped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
    return found

"""Folders of finished runs, written by hand, without training anything."""

import json
import random
from pathlib import Path

from hf_jumplora.metrics.derived import derive


def write_run(
    folder: Path, names, *, matrix=None, method="jumplora", general=None, steps=0, layers=0, flips=None
) -> Path:
    """A run over tasks of these names. flips: {task: (rows right to wrong, wrong to right)} of 40 rows a task.

    steps: logged steps a task. layers: how many layers say where each task lives.
    """
    rng, count = random.Random(0), len(names)
    folder.mkdir(parents=True)
    if matrix is None:
        matrix = [[0.25] * count]
        for i in range(count):
            matrix.append([max(0.5, 0.9 - 0.02 * (i - j)) if j <= i else 0.3 for j in range(count)])
    result = derive(matrix, list(names), continual=True)
    result |= {"method": method, "general": general or [{} for _ in matrix], "data": [], "held_out": {}}
    result["trained"] = [
        {
            "name": name, "index": k, "density": 0.1, "steps": 100, "train_examples": 1000, "effective_batch": 8,
            "truncated": 0, "seconds": 12.5, "seed": k, "processes": 1,
            "collision": [rng.random() / 50 for _ in range(k)], "overlap": [rng.random() / 4 for _ in range(k)],
            "layers": {
                f"model.layers.{n}.self_attn.{part}_proj": {
                    "density": rng.random() / 5, "collision": [rng.random() / 50 for _ in range(k)]
                }
                for n in range(layers) for part in "qv"
            },
        }
        for k, name in enumerate(names[: len(matrix) - 1])
    ]  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(result))
    settings = {"method": method, "arguments": {"learning_rate": 1e-3}, "adapter": {"r": 8}}
    (folder / "run.json").write_text(json.dumps(settings))
    if steps:
        with (folder / "history.jsonl").open("w") as file:
            for name in names:
                for step in range(1, steps + 1):
                    line = {"task": name, "step": step, "loss": 2 / step + 0.1, "density": 0.1, "threshold": 1e-3}
                    file.write(json.dumps({**line, "penalty": 0.1 / step, "mix": 1.0}) + "\n")
    if flips is not None:
        write_predictions(folder, names, flips)
    return folder


def write_predictions(folder: Path, names, flips, rows=40) -> None:
    """All answers are wrong before training, and right from a task's own stage on except those that `flips` tells."""
    (folder / "predictions").mkdir()
    keys = [(name, row) for name in names for row in range(rows)]
    lines = [{"task": n, "row": r, "text": f"Row {r} <b>of</b> {n}", "expected": "yes"} for n, r in keys]
    (folder / "predictions" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for after in range(len(names) + 1):
        lines = []
        for name, row in keys:
            lost, won = flips.get(name, (0, 0))
            right = after > names.index(name) and not lost <= row < lost + won
            if after == len(names):
                right = row >= lost
            lines.append({"task": name, "row": row, "predicted": "yes" if right else "no", "correct": right})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "predictions" / f"after_{after:03d}.jsonl").write_text(text)

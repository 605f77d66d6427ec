"""What a model answered, row by row, kept in a run's folder for `hf-jumplora report` and `check` (report/folder.py)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Task, TextTask
from ..disk import write_atomic
from ..report.folder import PREDICTIONS, ROWS, after, read_lines


ROWS_KEPT = 2000  # of a task, evenly spaced: enough for a paired test
TEXT_LETTERS, ANSWER_LETTERS = 500, 200

Answers = Mapping[str, Sequence[tuple[str, float]]]  # task -> (answer, score in [0, 1]) of each eval row


def write_answers(folder: Path, tasks: Sequence[Task], stage: int, answers: Answers) -> None:
    """Keep what the model said after `stage` tasks, beside what was kept of tasks that were not asked again.

    An answer counts as correct from a score of 0.5 on; exact matches score 0 or 1.
    """
    rows, said = [], []
    for task in tasks:
        if isinstance(task, TextTask) and task.name in answers:
            found, data = answers[task.name], task.eval_dataset
            for i in _evenly(len(found)):
                key, row, (answer, score) = {"task": task.name, "row": i}, data[i], found[i]
                text, label = str(row[task.text_column]), str(row[task.label_column])
                rows.append({**key, "text": text[:TEXT_LETTERS], "expected": label[:ANSWER_LETTERS]})
                said.append({**key, "predicted": answer[:ANSWER_LETTERS], "correct": score >= 0.5})
    for name, lines in ((ROWS, rows), (after(stage), said)) if said else ():
        path = folder / PREDICTIONS / name
        _write(path, [*(line for line in read_lines(path) if line["task"] not in answers), *lines])


def keep_own(folder: Path, stage: int, task: str) -> None:
    """Of the answers after `stage` tasks keep those to the task that was then new: others are compared with the newest
    ones alone. So a run keeps two answers a row, however many tasks it has."""
    path = folder / PREDICTIONS / after(stage)
    if path.is_file():
        _write(path, [line for line in read_lines(path) if line["task"] == task])


def _evenly(count: int) -> list[int]:
    return list(range(count)) if count <= ROWS_KEPT else [i * count // ROWS_KEPT for i in range(ROWS_KEPT)]


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))

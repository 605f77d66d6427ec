"""The rows of a bench: one choice for all methods and seeds, dev rows held out of the training rows."""

import dataclasses
import random
from pathlib import Path

from ..trainer import TextTask, load_tasks
from .protocol import Budget


def bench_tasks(
    stream: str | Path, data_dir: str | None, prompt_style: str | None, budget: Budget, tune: bool
) -> list[TextTask]:
    """The tasks of a final run (test rows to evaluate), or of a tuning run (the first two, dev rows to evaluate).

    Training rows are shuffled with a fixed seed; the last `dev_rows` (a fifth of a small set at most) are dev rows and
    trained on by nobody. A final run evaluates `test_rows` rows of the test split, drawn with a fixed seed.

    Raises:
        ValueError: a task without test rows.
    """
    tasks = []
    for task in load_tasks(stream, data_dir, prompt_style=prompt_style)[: 2 if tune else None]:
        if not task.eval_dataset:
            raise ValueError(f"task {task.name!r} has no eval rows: a bench needs them")
        rows, test = list(task.train_dataset), list(task.eval_dataset)
        random.Random(0).shuffle(rows)
        random.Random(0).shuffle(test)
        held = min(budget.dev_rows, max(1, len(rows) // 5))
        train, dev = rows[:-held], rows[-held:]
        size = (budget.tune_steps if tune else budget.steps) * budget.batch
        evaluated = dev if tune else test[: budget.test_rows]
        tasks.append(dataclasses.replace(task, train_dataset=train[:size], eval_dataset=evaluated))
    return tasks

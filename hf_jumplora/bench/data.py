"""The rows of a bench: one choice for all methods and seeds, dev rows held out of the training rows."""

import dataclasses
import random
from pathlib import Path
from typing import Any

from ..data import Encoder, TextTask, load_tasks
from .protocol import Budget


def bench_tasks(
    stream: str | Path,
    data_dir: str | None,
    prompt_style: str | None,
    budget: Budget,
    tune: bool,
    held_out: list[str] | None = None,
    general_text: str | None = None,
) -> list[Any]:
    """The tasks of a final run (test rows to evaluate), or of a tuning run (the first two, dev rows to evaluate).

    Training rows are shuffled with a fixed seed; the last `dev_rows` (a fifth of a small set at most) are dev rows and
    never trained on. A final run evaluates `test_rows` rows of the test split, drawn with a fixed seed, and so many
    of the held-out tasks and of the general text.

    Raises:
        ValueError: a task without test rows.
    """
    tasks = []
    everything = load_tasks(stream, data_dir, prompt_style=prompt_style, held_out=held_out, general_text=general_text)
    for task in [t for t in everything if not t.held_out][: 2 if tune else None]:
        if not task.eval_dataset:
            raise ValueError(f"task {task.name!r} has no eval rows: a bench needs them")
        rows = list(task.train_dataset)
        random.Random(0).shuffle(rows)
        held = min(budget.dev_rows, max(1, len(rows) // 5))
        train, dev = rows[: len(rows) - held], rows[len(rows) - held :]
        size = (budget.tune_steps if tune else budget.steps) * budget.batch
        evaluated = dev if tune else _drawn(task.eval_dataset, budget.test_rows)
        tasks.append(dataclasses.replace(task, train_dataset=train[:size], eval_dataset=evaluated))
    for task in everything if not tune else ():
        if task.held_out:
            tasks.append(dataclasses.replace(task, eval_dataset=_drawn(task.eval_dataset, budget.test_rows)))
    return tasks


def tokens_around_text(tokenizer: Any, tasks: list[Any]) -> int:
    """Tokens that the longest prompt of these tasks and its answer take, the text aside."""
    encoder = Encoder(tokenizer, 0, seq2seq=False)
    prompts = [task for task in tasks if isinstance(task, TextTask)]
    return max((len(tokenizer(t.render("")).input_ids) + encoder.longest_answer(t) for t in prompts), default=0)


def _drawn(rows: list[dict], count: int) -> list[dict]:
    """So many rows, drawn with a fixed seed."""
    test = list(rows)
    random.Random(0).shuffle(test)
    return test[:count]

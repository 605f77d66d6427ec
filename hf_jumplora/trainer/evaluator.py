"""What a run measures: a task's score, and beside the accuracy matrix general ability and what its data is."""

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model

from ..data.tasks import LanguageModelTask, Task, TextTask
from .backend import runnable
from .record import METRICS
from .scoring import evaluate_task, evaluate_text, own_adapter


if TYPE_CHECKING:
    from .run import ContinualRun


def score(run: "ContinualRun", task: Any) -> float:
    """Of the model as it is: the task's metric, in [0, 1] for text tasks. The cross-entropy of plain text is left in
    `run.cross_entropy`.

    Raises:
        ValueError: `compute_metrics` does not give the task's metric, or no number for it.
    """
    batch = run.args.per_device_eval_batch_size
    if isinstance(task, TextTask):
        return evaluate_task(run.model, run.encoder, task, getattr(run.args, "eval_mode", "generate"), batch)
    if isinstance(task, LanguageModelTask):
        accuracy, run.cross_entropy[task.name] = evaluate_text(run.model, run.encoder, task, batch)
        return accuracy
    if getattr(run.model, "is_quantized", False) and not isinstance(run.model, PeftModel):
        # The Trainer refuses a quantised model without an adapter, even to evaluate it.
        run.model = get_peft_model(run.model, copy.deepcopy(run.config))
        try:
            with run.model.disable_adapter():
                return score(run, task)
        finally:
            run.model = run.model.unload()
    # Nothing is trained here, but TRL's trainers are not made without training rows.
    rows = {"train_dataset": task.eval_dataset, "eval_dataset": task.eval_dataset}
    trainer = run._trainer(run.output_dir / "checkpoints", 0, **rows, compute_metrics=task.compute_metrics)
    scores = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    if task.metric not in scores:
        raise ValueError(f"task {task.name!r}: compute_metrics gave no {task.metric!r}, only {sorted(scores)}")
    if not math.isfinite(scores[task.metric]):
        raise ValueError(f"task {task.name!r}: its {task.metric} is {scores[task.metric]}, which is no score")
    return float(scores[task.metric])


def measure(run: "ContinualRun", row: dict[str, float]) -> None:
    """Add to `row` what the model as it is scores on the held-out tasks that it lacks: {"task metric": value}.

    Accuracies and their like in [0, 1], cross-entropy in nats a token. With method `perlora`, which needs a task id,
    that is the base model. The cross-entropy of language-modelling tasks of the stream is taken from the evaluation
    just made.
    """
    if lacks(run, row):
        with runnable(run.model, run.args):
            for index, task in enumerate(run.held_out, len(run.tasks)):
                if f"{task.name} {task.metric}" not in row:
                    with own_adapter(run.model, index) if run.method.mode == "separate" else nullcontext():
                        row[f"{task.name} {task.metric}"] = score(run, task)
    row |= {f"{name} cross_entropy": value for name, value in run.cross_entropy.items()}
    run.cross_entropy.clear()


def lacks(run: "ContinualRun", row: dict[str, float]) -> bool:
    """Whether a held-out task was not measured for this row."""
    return any(f"{task.name} {task.metric}" not in row for task in run.held_out)


def read_general(folder: Path, run: "ContinualRun") -> list[dict[str, float]]:
    """The rows that a former process measured; without those of held-out tasks that are other ones now."""
    path = folder / METRICS
    result = json.loads(path.read_text()) if path.is_file() else {}
    now = {task.name: task.fingerprint() for task in run.held_out}
    before = result.get("held_out", {})
    changed = {name for name in now if before.get(name) != now[name]}
    return [
        {key: value for key, value in row.items() if key.split()[0] not in changed}
        for row in result.get("general", [{}] * len(result.get("matrix", ())))
    ]


def describe_data(run: "ContinualRun") -> list[dict[str, Any]]:
    """For the report: of each task its sizes, what is measured, and the prompt with what it gives away."""
    return [_describe(task) for task in (*run.tasks, *run.held_out)]


def _describe(task: Any) -> dict[str, Any]:
    sizes = [None if rows is None else len(rows) for rows in (task.train_dataset, task.eval_dataset)]
    text = isinstance(task, TextTask)
    return {
        "name": task.name,
        "source": getattr(task, "source", ""),
        "train_examples": sizes[0],
        "eval_examples": sizes[1],
        "metric": getattr(task, "metric", None),
        "prompt_style": task.style() if text else "none",
        "prompt": task.prompt if text else None,
        "names_in_prompt": task.names_in_prompt() if text else [],
        "held_out": isinstance(task, Task) and task.held_out,
    }


def general_texts(run: "ContinualRun") -> list[str]:
    """The training texts of the held-out plain texts: what a strategy with `general=True` keeps.

    Raises:
        ValueError: there is none.
    """
    texts = [
        row[task.text_column]
        for task in run.held_out
        if isinstance(task, LanguageModelTask)
        for row in task.train_dataset or ()
    ]
    if not texts:
        raise ValueError(
            "general=True keeps what the base model knows of general text, and there is none with training rows: give "
            "general_text, or a held-out LanguageModelTask with a train_dataset"
        )
    return texts

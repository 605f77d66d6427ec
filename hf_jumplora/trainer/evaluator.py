"""`Evaluator`: what a model scores on the tasks of a plan."""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any

from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from ..data import LanguageModelTask, Task, TextTask
from ..schema import short
from .arguments import argument
from .backend import end_autocast, runnable
from .plan import RunPlan
from .preferences import PREFERENCE_ACCURACY, preference_accuracy
from .processes import quiet
from .scoring import evaluate_text, own_adapter, score_rows
from .task import task_trainer


Row = list[float | None]


class Evaluator:
    """Scores a model on a plan's tasks, and returns the scores.

    answers: {text task: (answer, score) of each of its eval rows}, of those that `measure` scored last.
    """

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self.answers: dict[str, list[tuple[str, float]]] = {}

    def measure(
        self, model: Any, seen: int, row: Sequence[float | None] = (), general: Mapping[str, float] | None = None
    ) -> tuple[Row, dict[str, float]]:
        """[`row`] and [`general`] of one model; what `row` and `general` know already is not measured again."""
        self.answers = {}
        scores, cross_entropy = self.row(model, seen, row)
        return scores, self.general(model, general, cross_entropy)

    def row(self, model: Any, seen: int | None = None, known: Sequence[float | None] = ()) -> tuple[Row, dict]:
        """(a row of the accuracy matrix, {"task cross_entropy": nats per token} of its plain texts).

        A score is in [0, 1], and None for a task without an eval set, or not among the first `seen` tasks where only
        those are evaluated (eval_tasks="seen"; seen=None: all of them). With method `perlora` each task is scored with
        its own adapter, one that has none yet with the base model.
        """
        row, cross_entropy = [*known, *[None] * (len(self.plan.tasks) - len(known))], {}
        whole = (
            seen is None
            or argument(self.plan.args, "eval_tasks") == "all"
            or (seen > 0 and self.plan.method.mode == "joint")
        )
        wanted = [
            index
            for index, task in enumerate(self.plan.tasks[: None if whole else seen])
            if task.eval_dataset is not None and row[index] is None
        ]
        with runnable(model, self.plan.args) if wanted else nullcontext():
            for index in tqdm(wanted, desc="evaluating", leave=False, disable=quiet(self.plan.args)):
                row[index], loss = self._score(model, index, self.plan.tasks[index])
                if loss is not None:
                    cross_entropy[f"{self.plan.tasks[index].name} cross_entropy"] = loss
        return row, cross_entropy

    def general(
        self, model: Any, known: Mapping[str, float] | None = None, row_losses: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """{"task metric": score in [0, 1]} on the held-out tasks that `known` lacks, and their cross-entropy in nats a
        token, after those of [`row`] (`row_losses`). With method `perlora`, of the base model."""
        scores, cross_entropy = dict(known or {}), dict(row_losses or {})
        with runnable(model, self.plan.args) if self.lacks(scores) else nullcontext():
            for index, task in enumerate(self.plan.held_out, len(self.plan.tasks)):
                if _key(task) not in scores:
                    scores[_key(task)], loss = self._score(model, index, task)
                    if loss is not None:
                        cross_entropy[f"{task.name} cross_entropy"] = loss
        return scores | cross_entropy

    def lacks(self, general: Mapping[str, float]) -> bool:
        """Whether a held-out task was not measured for this row."""
        return any(_key(task) not in general for task in self.plan.held_out)

    def _score(self, model: Any, index: int, task: Task) -> tuple[float, float | None]:
        """(the task's metric, the cross-entropy of plain text) of task number `index`."""
        with own_adapter(model, index) if self.plan.method.mode == "separate" else nullcontext():
            batch, encoder = self.plan.args.per_device_eval_batch_size, self.plan.encoder
            if isinstance(task, TextTask):
                found = score_rows(model, encoder, task, argument(self.plan.args, "eval_mode"), batch)
                self.answers[task.name] = found
                return sum(score for _, score in found) / len(found), None
            if isinstance(task, LanguageModelTask):
                return evaluate_text(model, encoder, task, batch)
            if task.metric == PREFERENCE_ACCURACY:
                length = argument(self.plan.trainer_of(task)[1], "max_length")
                return preference_accuracy(model, self.plan.tokenizer, task.eval_dataset, length, batch), None
            if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
                # The Trainer refuses a quantised model without an adapter, even to evaluate it.
                adapted: Any = get_peft_model(model, copy.deepcopy(self.plan.config))
                try:
                    with adapted.disable_adapter():
                        return self._score_by_trainer(adapted, task), None
                finally:
                    adapted.unload()
            return self._score_by_trainer(model, task), None

    def _score_by_trainer(self, model: Any, task: Task) -> float:
        """The task's own metric.

        Raises:
            ValueError: `compute_metrics` does not give the task's metric, or no number for it.
        """
        # Nothing is trained here, but TRL's trainers are not made without training rows.
        rows = {"train_dataset": task.eval_dataset, "eval_dataset": task.eval_dataset}
        folder = self.plan.output_dir / "checkpoints"
        trainer = task_trainer(self.plan, model, folder, 0, task, **rows, **task.scoring())
        trainer.args.dataloader_drop_last = False  # of training batches; a score is of all rows
        try:
            scores = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
        finally:
            end_autocast(trainer.accelerator, model)
        if task.metric not in scores:
            raise ValueError(f"task {task.name!r}: compute_metrics gave no {task.metric!r}, only {sorted(scores)}")
        if not isinstance(scores[task.metric], Real) or not math.isfinite(scores[task.metric]):
            raise ValueError(
                f"task {task.name!r}: its {task.metric} is {short(scores[task.metric])}, which is not a score"
            )
        return float(scores[task.metric])


def _key(task: Task) -> str:
    return f"{task.name} {task.metric}"

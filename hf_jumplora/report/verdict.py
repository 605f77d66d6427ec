"""SHIP or DON'T SHIP: whether a run lost more than the limits allow, and whether it is worse than another run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..escape import terminal
from ..metrics.units import common, units_of
from .folder import StoredRun
from .report import general_unit, in_nats


WORDS = {True: "ok  ", False: "FAIL", None: "-   "}


@dataclass
class Limits:
    """What a run may lose. Points are percentage points of accuracy, or of the task's own score; of a score that is no
    share, such as a loss, limits in points are per cent of what it was."""

    max_forgetting: float = field(default=2.0, metadata={"help": "mean forgetting, in points"})
    max_task_loss: float = field(
        default=10.0, metadata={"help": "what any one task may lose since it was learned, in points"}
    )
    max_general_loss: float = field(
        default=0.05, metadata={"help": "rise of cross-entropy on text of no task, in nats"}
    )
    max_general_drop: float = field(default=2.0, metadata={"help": "drop on held-out tasks, in points"})
    max_drop: float = field(default=1.0, metadata={"help": "average accuracy below the other run's, in points"})
    alpha: float = field(default=0.05, metadata={"help": "a paired difference counts as real below this p value"})

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{item.name} must be a number of at least 0, not {value!r}")


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: the chance of a split at least as uneven if both directions were equally likely.

    lost, won: rows that only the one, only the other had right (McNemar 1947; the binomial form).
    """
    total = lost + won
    log_tail = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(min(lost, won) + 1)
    ]
    return min(1.0, 2 * sum(map(math.exp, log_tail)))


def judge(stored: StoredRun, other: StoredRun | None = None, limits: Limits | None = None) -> dict[str, Any]:
    """The verdict on a run.

    Returns {"ship": bool, "checks": [{"check", "ok": True, False or None where it was not measured, "says"}], "flips":
    [{"task", "right_to_wrong", "wrong_to_right", "p"}]}: flips since each task was learned, where predictions are
    stored.

    Raises:
        ValueError: `other` was run on other tasks.
    """
    limits = limits or Limits()
    flips = _flips(stored)
    checks = judge_metrics(stored.metrics, limits, flips)["checks"]
    if other is not None:
        _check_against(_adder(checks), stored, other, limits)
    return {"ship": all(c["ok"] is not False for c in checks), "checks": checks, "flips": flips}


def judge_metrics(
    metrics: dict[str, Any], limits: Limits | None = None, flips: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The verdict of [`judge`] on the content of metrics.json only; `flips` as there."""
    limits = limits or Limits()
    checks: list[dict[str, Any]] = []
    check = _adder(checks)
    joint = _joint(metrics)
    done, total = len(metrics["matrix"]) - 1, 1 if joint else len(metrics["tasks"])
    check("finished", done == total, f"{done} of {total} tasks are trained")
    if done and all(score is None for score in metrics["matrix"][-1]):
        check("scores", False, "nothing was measured: give the tasks eval sets")
    if not joint:
        _check_learned(check, metrics)
    if not joint and done > 1:
        value, unit = metrics.get("forgetting"), common(units_of(metrics))
        if unit is None:
            check("forgetting", None, "no average: the units of the tasks differ")
        elif value is None:
            check("forgetting", None, "not measured: some tasks were not evaluated")
        else:
            lost, points = unit.lost(value, metrics["learning_accuracy"])
            says = f"{lost:.1f} {points} on average (at most {limits.max_forgetting:g})"
            check("forgetting", _at_most(lost, limits.max_forgetting), says)
        _check_tasks(check, metrics, limits, {flip["task"]: flip for flip in flips})
    _check_general(check, metrics, limits)
    return {"ship": all(c["ok"] is not False for c in checks), "checks": checks}


def verdict_text(result: dict[str, Any]) -> str:
    """The result of [`judge`] for a terminal: one line per check."""
    lines = [f"{WORDS[c['ok']]}  {c['check']}: {c['says']}" for c in result["checks"]]
    return terminal("\n".join([says(result), *lines]))


def says(result: dict[str, Any]) -> str:
    """The verdict in a word or two."""
    return "SHIP" if result["ship"] else "DON'T SHIP"


def _joint(metrics: dict[str, Any]) -> bool:
    """Whether all tasks were trained at once: the one stage then has a name of its own."""
    return any(info["name"] not in metrics["tasks"] for info in metrics["trained"])


def _adder(checks: list[dict[str, Any]]) -> Callable[[str, bool | None, str], None]:
    return lambda name, ok, says: checks.append({"check": name, "ok": ok, "says": says})


def _at_most(value: float, limit: float) -> bool:
    return value <= limit + 1e-9  # False for nan


def _flips(stored: StoredRun) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if _joint(stored.metrics):  # no task is learned before another
        return found
    for stage, task in enumerate(stored.metrics["tasks"][: len(stored.metrics["matrix"]) - 1], 1):
        lost, won = stored.flips(task, stage)
        if stored.answers(stage):
            found.append(
                {
                    "task": task,
                    "right_to_wrong": len(lost),
                    "wrong_to_right": len(won),
                    "p": mcnemar(len(lost), len(won)),
                }
            )
    return found


def _check_learned(check: Any, metrics: dict[str, Any]) -> None:
    """The tasks that their own training made no better, or that were not trained because an earlier one serves them."""
    matrix, found = metrics["matrix"], units_of(metrics)
    for j, task in enumerate(metrics["tasks"][: len(matrix) - 1]):
        before, learned, unit = matrix[0][j], matrix[j + 1][j], found[j]
        reused = metrics["trained"][j].get("reused")
        scores = f"({unit.show(learned)}) than before ({unit.show(before)})"
        measured = before is not None and learned is not None
        if measured and unit.sign * (learned - before) <= 0 and not (unit.share and learned == 1):
            served = f"by the adapter of {reused}, which serves it without training" if reused else "after its training"
            check(f"learning of {task}", False, f"no better {served} {scores}")
        elif reused:
            check(f"learning of {task}", None, f"not trained: its prompts are like those of {reused}, which serves it")


def _check_tasks(check: Any, metrics: dict[str, Any], limits: Limits, flips: dict[str, dict[str, Any]]) -> None:
    """What each task has lost since it was learned; tasks that lost nothing are left out."""
    matrix, found = metrics["matrix"], units_of(metrics)
    for j, task in enumerate(metrics["tasks"][: len(matrix) - 2]):
        learned, now = matrix[j + 1][j], matrix[-1][j]
        if learned is None or now is None:
            check(f"task {task}", None, "not measured")
            continue
        lost, points = found[j].lost(found[j].sign * (learned - now), learned)
        if lost > 0:
            says = f"{lost:.1f} {points} since it was learned (at most {limits.max_task_loss:g})"
            if flip := flips.get(task):
                real = "more than" if flip["p"] < limits.alpha else "not more than"
                says += (
                    f"; {flip['right_to_wrong']} rows from right to wrong, {flip['wrong_to_right']} from wrong to right"
                )
                says += f", {real} noise (p = {flip['p']:.2g})"
            check(f"task {task}", _at_most(lost, limits.max_task_loss), says)


def _check_general(check: Any, metrics: dict[str, Any], limits: Limits) -> None:
    rows = metrics.get("general") or [{}]
    keys = [key for key in rows[0] if key in rows[-1]] if len(rows) > 1 else []
    if not keys:
        check("general ability", None, "not measured: give general_text, or tasks with held_out=True")
    for key in keys:
        change = rows[-1][key] - rows[0][key]
        if in_nats(key):
            says = f"{change:+.4f} nats per token (at most +{limits.max_general_loss:g})"
            check(f"general ability, {key}", _at_most(change, limits.max_general_loss), says)
        else:
            unit = general_unit(key, rows)
            lost, points = unit.lost(-unit.sign * change, rows[0][key])
            says = f"{-lost:+.1f} {points} (at least -{limits.max_general_drop:g})"
            check(f"general ability, {key}", _at_most(lost, limits.max_general_drop), says)


def _check_against(check: Any, stored: StoredRun, other: StoredRun, limits: Limits) -> None:
    if set(stored.metrics["tasks"]) != set(other.metrics["tasks"]):
        raise ValueError(f"{other.path} has other tasks than {stored.path}: they cannot be compared")
    ours, theirs = stored.metrics.get("average_accuracy"), other.metrics.get("average_accuracy")
    if ours is None or theirs is None:
        check(f"against {other.name}", None, "not measured: a run without an average accuracy")
        return
    unit = common([*units_of(stored.metrics), *units_of(other.metrics)])
    if unit is None:
        check(f"against {other.name}", None, "no average: the units of the tasks differ")
        return
    drop, points = unit.lost(unit.sign * (theirs - ours), theirs)
    says = f"average {'accuracy' if unit.share else unit.name} {unit.show(ours)} against {unit.show(theirs)} "
    says += f"(at most {limits.max_drop:g} {points} {'lower' if unit.sign > 0 else 'higher'})"
    ok = _at_most(drop, limits.max_drop)
    mine, its = stored.answers(len(stored.metrics["matrix"]) - 1), other.answers(len(other.metrics["matrix"]) - 1)
    both = [key for key in mine if key in its]
    if both:
        lost = sum(its[key]["correct"] and not mine[key]["correct"] for key in both)
        won = sum(mine[key]["correct"] and not its[key]["correct"] for key in both)
        p = mcnemar(lost, won)
        real = p < limits.alpha
        says += f"; of {len(both)} rows {lost} are right only in that run, {won} only in this one: "
        says += f"{'more' if real else 'not more'} than noise (p = {p:.2g})"
        ok = ok or not real
    check(f"against {other.name}", ok, says)

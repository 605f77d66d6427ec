"""Every formula on one 3 x 3 matrix worked out by hand, and what a run derives from a matrix that is still growing."""

import pytest

from hf_jumplora import metrics
from hf_jumplora.metrics.derived import derive
from hf_jumplora.metrics.units import PERCENT, Unit, unit_of


A = [  # row: after training on task i; column: score on task j
    [0.9, 0.2, 0.1],
    [0.6, 0.8, 0.3],
    [0.7, 0.5, 1.0],
]
Z = [0.3, 0.1, 0.2]  # before any training
U = [0.95, 0.85, 0.9]  # trained alone


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("average_accuracy", (A,), (0.7 + 0.5 + 1.0) / 3),
        ("backward_transfer", (A,), ((0.7 - 0.9) + (0.5 - 0.8)) / 2),
        ("forgetting", (A,), ((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        ("learning_accuracy", (A,), (0.9 + 0.8 + 1.0) / 3),
        ("forward_transfer_gem", (A, Z), ((0.2 - 0.1) + (0.3 - 0.2)) / 2),
        ("forward_transfer_scratch", (A, U), ((0.9 - 0.95) + (0.8 - 0.85) + (1.0 - 0.9)) / 3),
        ("forward_transfer_jumplora", (A, U), ((0.7 - 0.95) + (0.5 - 0.85) + (1.0 - 0.9)) / 3),
    ],
)
def test_formula(name, arguments, expected):
    assert getattr(metrics, name)(*arguments) == pytest.approx(expected, abs=1e-12)
    assert name in metrics.FORMULAS
    assert metrics.FORMULAS[name].split(" = ")[-1] in getattr(metrics, name).__doc__


def test_forgetting_looks_at_the_best_and_not_at_the_first():
    """A task that got better later and then fell: BWT and forgetting are not each other's negative."""
    a = [[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.6, 0.8, 0.9]]
    assert metrics.forgetting(a) == pytest.approx(((0.9 - 0.6) + 0.0) / 2)
    assert metrics.backward_transfer(a) == pytest.approx(((0.6 - 0.5) + 0.0) / 2)


def test_forgetting_may_be_negative():
    """The last row is no part of the maximum, so a task that improved at the end counts as negative forgetting."""
    assert metrics.forgetting([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.2)


@pytest.mark.parametrize("name", ["backward_transfer", "forgetting"])
def test_one_task_is_too_few(name):
    with pytest.raises(ValueError, match="at least two tasks"):
        getattr(metrics, name)([[0.9]])


def test_forward_transfer_of_one_task():
    with pytest.raises(ValueError, match="at least two tasks"):
        metrics.forward_transfer_gem([[0.9]], [0.1])


@pytest.mark.parametrize(
    ("shared", "sizes", "collision", "overlap"),
    [(3, (6, 12), 0.03, 0.5), (0, (6, 12), 0.0, 0.0), (0, (0, 5), 0.0, 0.0), (5, (5, 5), 0.05, 1.0)],
    ids=["some", "none", "empty-support", "same"],
)
def test_overlap_of_supports(shared, sizes, collision, overlap):
    assert metrics.collision_rate(shared, 100) == collision
    assert metrics.overlap(shared, *sizes) == overlap


# ---- metrics.json ------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c"]


def test_derived_from_the_whole_matrix():
    result = derive([Z, *A], NAMES, continual=True)
    for name in ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy"):
        assert result[name] == getattr(metrics, name)(A)
    assert result["forward_transfer_gem"] == metrics.forward_transfer_gem(A, Z)
    assert set(result["formulas"]) == set(result) - {"tasks", "matrix", "formulas"}


def test_derived_before_the_last_task():
    """Over the tasks trained so far, as if the stream ended there."""
    result = derive([Z, *A[:2]], NAMES, continual=True)
    assert result["average_accuracy"] == pytest.approx((0.6 + 0.8) / 2)
    assert result["backward_transfer"] == pytest.approx(0.6 - 0.9)
    assert result["forward_transfer_gem"] == pytest.approx(0.2 - 0.1)


def test_derived_after_one_task():
    result = derive([Z, A[0]], NAMES, continual=True)
    assert result["average_accuracy"] == result["learning_accuracy"] == 0.9
    assert "backward_transfer" not in result
    assert "forgetting" not in result


def test_derived_before_training():
    assert set(derive([Z], NAMES, continual=True)) == {"tasks", "matrix", "formulas"}


def test_derived_from_seen_tasks_alone():
    """With holes above the diagonal: all but forward transfer, which needs the row before a task."""
    seen = [[None] * 3, [0.9, None, None], [0.6, 0.8, None], [0.7, 0.5, 1.0]]
    result = derive(seen, NAMES, continual=True)
    assert result["forgetting"] == pytest.approx(metrics.forgetting(A))
    assert result["backward_transfer"] == pytest.approx(metrics.backward_transfer(A))
    assert "forward_transfer_gem" not in result


def test_derived_with_a_task_that_is_never_evaluated():
    """No number stands for a mean over other tasks than its formula says."""
    holes = [[z, None, y] for z, _, y in [Z, *A]]
    assert set(derive(holes, NAMES, continual=True)) == {"tasks", "matrix", "formulas"}


def test_joint_training_has_an_average_only():
    result = derive([Z, A[2]], NAMES, continual=False)
    assert result["average_accuracy"] == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert set(result["formulas"]) == {"average_accuracy"}


def test_a_score_that_is_missing_is_named():
    with pytest.raises(ValueError, match="task 0 was not evaluated after task 1"):
        metrics.backward_transfer([[0.5, None], [None, 0.7]])


@pytest.mark.parametrize("eval_tasks", ["all", "seen"])
def test_forgetting_begins_when_a_task_is_learned(eval_tasks):
    """What a task scored by chance before it was learned is forgotten in neither mode."""
    a = [[0.9, 0.95, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 1.0]]
    seen = [[x if j <= i else None for j, x in enumerate(row)] for i, row in enumerate(a)]
    assert metrics.forgetting(a if eval_tasks == "all" else seen) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)


LOSS = [[3.0, 4.0, None], [1.0, 3.5, None], [2.5, 0.5, None]]


def test_less_of_a_loss_is_better():
    """A loss that rises has the signs of an accuracy that falls; averages are those of the losses."""
    result = derive(LOSS, NAMES, continual=True, metrics=dict.fromkeys(NAMES, "eval_loss"))
    assert result["forgetting"] == pytest.approx(1.5)
    assert result["backward_transfer"] == pytest.approx(-1.5)
    assert result["forward_transfer_gem"] == pytest.approx(0.5)
    assert result["average_accuracy"] == pytest.approx(1.5)
    assert result["learning_accuracy"] == pytest.approx(0.75)
    assert result["formulas"]["forgetting"] == f"{metrics.FORMULAS['forgetting']}, a and z: -eval_loss"
    assert result["formulas"]["average_accuracy"] == metrics.FORMULAS["average_accuracy"]


@pytest.mark.parametrize("other", ["accuracy", "perplexity"])
def test_no_average_over_different_units(other):
    matrix = [[0.5, 4.0], [0.75, 3.5], [0.25, 0.5]]
    metric = {"a": "accuracy" if other == "perplexity" else "mse", "b": other}
    assert set(derive(matrix, ["a", "b"], continual=True, metrics=metric)) == {"tasks", "matrix", "formulas"}
    assert "average_accuracy" not in derive(matrix[:2], ["a", "b"], continual=False, metrics=metric)


@pytest.mark.parametrize(
    ("metric", "scores", "unit"),
    [
        ("accuracy", [0.5, None, 1.0], PERCENT),
        ("matthews", [-0.5, 0.5], PERCENT),
        ("bleu", [0.5, 23.0], Unit("bleu")),
        ("loss", [0.5], Unit("loss", -1)),
        ("token_error", [0.5], Unit("token_error", -1)),
        ("word_error_rate", [0.5], Unit("word_error_rate", -1)),
        ("neg_log_loss", [-0.5], PERCENT),
        ("negative_log_likelihood", [0.5], Unit("negative_log_likelihood", -1)),
        ("log_likelihood", [-3.0], Unit("log_likelihood")),
        (None, [2.0], Unit("score")),
        (None, [], PERCENT),
    ],
)
def test_units(metric, scores, unit):
    assert unit_of(metric, scores) == unit


def test_a_score_is_shown_in_its_unit():
    loss = Unit("loss", -1)
    assert [PERCENT.show(0.5), PERCENT.show(0.5, 2), PERCENT.show(0.5, plus="+"), PERCENT.show(None)] == [
        "50.0", "50.00", "+50.0", "-"
    ]  # fmt: skip
    assert [loss.show(3.71), loss.show(0.5, plus="+")] == ["3.7100", "+0.5000"]
    assert PERCENT.lost(0.25, 0.5) == (25.0, "points")
    assert loss.lost(0.25, 0.5) == (50.0, "% of the loss")
    assert loss.lost(0.25, 0.0) == (25.0, "% of the loss")

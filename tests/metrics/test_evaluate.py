"""The metric modules, loaded by `evaluate` from their folders."""

from pathlib import Path

import pytest

import hf_jumplora.metrics as metrics


evaluate = pytest.importorskip("evaluate")
FOLDER = Path(metrics.__file__).parent


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """One cache for all modules: `evaluate` imports them as parts of one package."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        yield lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(cache))


def test_exact_match(load):
    result = load("exact_match").compute(
        predictions=["Very  Positive", "bad", "Good", "Cafe\u0301"], references=["very positive", "Bad ", "Bad", "café"]
    )
    assert result == {"exact_match": pytest.approx(3 / 4)}


def test_continual(load):
    matrix = [[0.8, 0.1, 0.2], [0.6, 0.9, 0.3], [0.5, 0.7, 0.6]]
    result = load("continual").compute(predictions=matrix, references=["a", "b", "c"])
    assert result["average_accuracy"] == pytest.approx(0.6)
    assert result["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert result["forgetting"] == metrics.forgetting(matrix)
    assert result["learning_accuracy"] == metrics.learning_accuracy(matrix)
    with pytest.raises(ValueError, match="one score for each of the 2 tasks"):
        load("continual").compute(predictions=[[0.1], [0.2]], references=["a", "b"])

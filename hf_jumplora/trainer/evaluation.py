"""The old name of `scoring`, for one version."""

import warnings

from .scoring import evaluate_task, evaluate_text, generate_answers, own_adapter, score_labels


warnings.warn("hf_jumplora.trainer.evaluation is hf_jumplora.trainer.scoring now", FutureWarning, stacklevel=2)

__all__ = ["evaluate_task", "evaluate_text", "generate_answers", "own_adapter", "score_labels"]

"""Exact match as a module for `evaluate.load("hf_jumplora/metrics/exact_match")`: lower case, white space folded."""

import datasets
import evaluate

from hf_jumplora.metrics.text import exact_match


_DESCRIPTION = "Share of predictions that equal their reference but for case, white space and forms of accents."


class ExactMatch(evaluate.Metric):
    """The accuracy of the standard continual-learning benchmark (arXiv 2310.14152) on generated answers."""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of strings, equally long.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        hits = [exact_match(a, b) for a, b in zip(predictions, references, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}

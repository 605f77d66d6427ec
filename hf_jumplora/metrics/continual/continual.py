"""Metrics of continual learning as a module for `evaluate.load("hf_jumplora/metrics/continual")`."""

import datasets
import evaluate

from hf_jumplora import metrics


_DESCRIPTION = "Average accuracy, backward transfer, forgetting and learning accuracy of an accuracy matrix."


class Continual(evaluate.Metric):
    """The formulas of `hf_jumplora.metrics` on a matrix: row i = scores on all tasks after training task i."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION + "\n" + "\n".join(f"{k}: {v}" for k, v in metrics.FORMULAS.items()),
            citation="",
            inputs_description="predictions: the matrix, a list of T rows of T scores; references: the tasks' names.",
            features=datasets.Features({"predictions": row, "references": datasets.Value("string")}),
        )

    def _compute(self, predictions, references):
        a = [[float(score) for score in row] for row in predictions]
        if any(len(row) != len(references) for row in a):
            raise ValueError(f"every row needs one score for each of the {len(references)} tasks")
        names = ["average_accuracy", "learning_accuracy", *(["backward_transfer", "forgetting"] if len(a) > 1 else [])]
        return {name: getattr(metrics, name)(a) for name in names}

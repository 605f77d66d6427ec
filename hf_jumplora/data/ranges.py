"""Whether the numbers in the rows of a plain task, token ids and labels, are numbers that the model has a place for."""

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.compute as pc
from datasets import Dataset

from ..schema import short
from .tasks import Task


_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


def check_ranges(task: Task, model: Any) -> None:
    """Compare token ids with the embeddings of one of transformers' models, and labels with its classes: on a GPU a
    number outside is an assertion of the device. Rows that are streamed, or of a data set of another class than lists
    and `datasets.Dataset`, are not looked at.

    Raises:
        ValueError: a number without a place, or a class that is none; the message names task, column and number.
    """
    for split, rows in (("train", task.train_dataset), ("eval", task.eval_dataset)):
        where = f"task {task.name!r}, {split} rows: "
        if _has(rows, "input_ids") and (known := getattr(model.get_input_embeddings(), "num_embeddings", None)):
            for ids, _ in _values(rows, "input_ids"):
                _check(ids, known, f"{where}input_ids", f"the model has embeddings for {known} tokens")
        name, classes = type(model).__name__, _classes(model)
        columns = ("labels", "label", "label_ids") if name.endswith("SequenceClassification") else ("labels",)
        column = next((column for column in columns if _has(rows, column)), None)
        if column is None or classes is None:
            continue
        for labels, single in _values(rows, column):
            if single and not pyarrow.types.is_integer(labels.type) and not pyarrow.types.is_boolean(labels.type):
                raise ValueError(
                    f"{where}{column} holds {short(labels[0].as_py())} ({labels.type}), and a class of {name} is a "
                    "whole number: cast the column, or set the model's problem_type"
                )
            if single and labels.null_count:
                raise ValueError(f"{where}{column} is empty (None) in some: leave these rows out")
            kept = labels.filter(pc.not_equal(labels, -100)) if pyarrow.types.is_integer(labels.type) else labels
            what = "classes (num_labels)" if name.endswith("Classification") else "tokens"
            _check(kept, classes, f"{where}{column}", f"{name} has {classes} {what}, 0 to {classes - 1}")


def _classes(model: Any) -> int | None:
    """How many classes the labels of a model are of; None: its labels are something else, or it is not known."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith("Classification"):
        one = getattr(config, "problem_type", None) in (None, "single_label_classification")
        return config.num_labels if one and config.num_labels > 1 else None
    if name.endswith(_LANGUAGE_MODELS):
        return getattr(model.get_output_embeddings(), "out_features", None)
    return None


def _check(values: pyarrow.Array, known: int, what: str, why: str) -> None:
    if not pyarrow.types.is_integer(values.type) or not len(values):
        return
    found = pc.min_max(values).as_py()
    for number in (found["max"], found["min"]):
        if number is not None and not 0 <= number < known:
            raise ValueError(f"{what} has the number {number}, and {why}")


def _has(rows: Any, column: str) -> bool:
    if isinstance(rows, Dataset):  # a transform may make another column of it
        return column in rows.column_names and rows.format["type"] != "custom"
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and column in rows[0]


def _values(rows: Any, column: str) -> Iterator[tuple[pyarrow.Array, bool]]:
    """(the values of some rows, whether each row has a single one)."""
    if isinstance(rows, Dataset):
        batches = rows.select_columns(column).with_format("arrow").iter(10_000)
        parts: Any = (batch.column(column).combine_chunks() for batch in batches)
    else:
        found = [row[column].tolist() if hasattr(row[column], "tolist") else row[column] for row in rows]
        parts = [pyarrow.array(found)]
    for part in parts:
        values = part
        while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
            values = pc.list_flatten(values)
        yield values, values is part

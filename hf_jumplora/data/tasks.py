"""Tasks: what is trained on, what it is called, how a text becomes a prompt."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.ipc
from datasets import Dataset, IterableDataset

from ..metrics.text import TEXT_METRICS, fold
from ..schema import MAX_NAME, short


# JumpLoRA's names no data set. O-LoRA's (N-LoRA uses it too) does, at training and at test.
PROMPT_STYLES = {
    "jumplora": "Task Instruction: {instruction}\nOptions: {options}\nText: {text}\nAnswer:",
    "olora": "Task:{category}\nDataset:{dataset}\n{instruction}\nOption: {option_list} \n{text}\nAnswer:",
}
PROMPT = PROMPT_STYLES["jumplora"]
STREAMED_ROWS = 100
_PLACES = ("instruction", "options", "option_list", "text")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Task:
    """A task for any trainer class: data sets as that class takes them.

    name: unique in its stream; letters, digits, '-', '_', '.'.
    source: where the data is from, for the card; of an absolute path the last name is kept.
    train_dataset, eval_dataset: a streamed one, without a length, needs `max_steps`.
    compute_metrics: as for `Trainer`; `metric` names the key of its result that fills the accuracy matrix.
    preprocess_logits_for_metrics: as for `Trainer`, which otherwise keeps the logits of the whole eval set.
    held_out: not trained on; a run evaluates it before the first task and after each one (general ability).
    trainer_cls, args: where the task is trained by another trainer than the run's, or with other arguments. The class
    is made by `make_continual`; a `functools.partial` of it gives what else it takes (GRPO: `reward_funcs`).
    strategies: `Strategy` objects of this task alone, beside the run's; they remember nothing for later tasks.

    `metric="preference_accuracy"` scores rows of preferences ("prompt", "chosen", "rejected", as TRL's DPO takes them)
    without a trainer: how often the chosen answer is likelier than the rejected one.
    """

    name: str
    train_dataset: Any
    eval_dataset: Any = None
    compute_metrics: Callable | None = None
    metric: str = "accuracy"
    source: str = ""
    held_out: bool = field(default=False, kw_only=True)
    preprocess_logits_for_metrics: Callable | None = field(default=None, kw_only=True)
    trainer_cls: Callable[..., Any] | None = field(default=None, kw_only=True, repr=False)
    args: Any = field(default=None, kw_only=True, repr=False)
    strategies: Any = field(default=(), kw_only=True, repr=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or len(self.name) > MAX_NAME or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"task name {short(self.name)}: use letters, digits, '-', '_' and '.', starting with a letter or "
                f"digit, {MAX_NAME} at most"
            )
        for option in ("train_dataset", "eval_dataset"):
            if isinstance(getattr(self, option), Mapping):
                raise ValueError(
                    f"task {self.name!r}: {option} is a dict of {', '.join(map(short, getattr(self, option)))}: give "
                    'one data set, data["train"]; several that are scored apart are tasks with held_out=True'
                )
        if self.held_out:
            if self.eval_dataset is None:
                raise ValueError(f"task {self.name!r} is held out, so it needs an eval_dataset")
        elif row_count(self.train_dataset) == 0:
            raise ValueError(f"task {self.name!r} has no training example")
        if self.eval_dataset is not None and row_count(self.eval_dataset) == 0:
            raise ValueError(f"task {self.name!r} has an empty eval set; leave it out (None) if there is none")
        if Path(self.source).is_absolute():  # it is published on the card: no path of this machine
            self.source = Path(self.source).name

    def fingerprint(self) -> str:
        """Tells whether a restarted run sees the same task: options, size and rows. Of a streamed `IterableDataset`
        the first `STREAMED_ROWS` rows; of data sets of other classes the rows are not looked at."""
        return self._fingerprint(_hash_rows, STREAMED_ROWS)

    def former_fingerprint(self) -> str:
        """As earlier versions had it: with the data set's own fingerprint, which depends on how it was made."""
        return self._fingerprint(lambda digest, rows: digest.update(rows._fingerprint.encode()), 0)

    def _fingerprint(self, hash_rows: Callable, streamed: int) -> str:
        names = ("train_dataset", "eval_dataset", "source", "held_out", "compute_metrics", "trainer_cls", "args")
        skip = {*names, "strategies", "preprocess_logits_for_metrics"}
        options = {key: value for key, value in vars(self).items() if key not in skip and value is not None}
        digest = hashlib.sha256(json.dumps([options, row_count(self.train_dataset)], sort_keys=True).encode())
        for part in (self.train_dataset, self.eval_dataset):
            if isinstance(part, list):
                digest.update(json.dumps(part, sort_keys=True, default=str).encode())
            elif isinstance(part, Dataset):
                hash_rows(digest, part)
            elif isinstance(part, IterableDataset) and streamed:
                rows = list(itertools.islice(part.with_format(None), streamed))
                digest.update(json.dumps(rows, sort_keys=True, default=_plain).encode())
        return digest.hexdigest()[:16]

    def scoring(self) -> dict[str, Callable]:
        """What a Trainer needs for the task's own metric, by the names of its arguments."""
        named = {"preprocess_logits_for_metrics": self.preprocess_logits_for_metrics}
        if self.compute_metrics is not None:
            named["compute_metrics"] = _checked(self.name, self.compute_metrics)
        return {name: value for name, value in named.items() if value is not None}

    def describe(self) -> dict[str, Any]:
        """For the report: sizes, what is measured, and the prompt with what it gives away."""
        sizes = [None if rows is None else row_count(rows) for rows in (self.train_dataset, self.eval_dataset)]
        return {
            "name": self.name,
            "source": self.source,
            "train_examples": sizes[0],
            "eval_examples": sizes[1],
            "metric": self.metric,
            "prompt_style": "none",
            "prompt": None,
            "names_in_prompt": [],
            "held_out": self.held_out,
        }


@dataclass
class PastTask(Task):
    """A task of a stack whose data is not available: it is not evaluated, and strategies get None for its data.

    digest: its fingerprint, as the stack's run.json has it.
    """

    train_dataset: Any = None
    metric: Any = None
    digest: str = field(default="", kw_only=True)

    def __post_init__(self):
        pass

    def fingerprint(self) -> str:
        """As the stack's run.json has it."""
        return self.digest

    former_fingerprint = fingerprint


@dataclass
class LanguageModelTask(Task):
    """Plain text for causal models: the loss is on every token, and a text longer than `max_length` becomes several.

    train_dataset, eval_dataset: lists of rows (dicts) with a text, a string. Scored by the share of tokens that the
    model finds likeliest given those before them (token accuracy, in the matrix) and by their cross-entropy.
    """

    metric: str = "token_accuracy"
    text_column: str = "text"

    def __post_init__(self):
        super().__post_init__()
        if self.metric != "token_accuracy":
            raise ValueError(f"task {self.name!r}: plain text is scored by token_accuracy, not by {self.metric!r}")
        _check_rows(self, [self.text_column])

    def render(self, text: str) -> str:
        """What the model sees of a text: all of it."""
        return text.strip()

    def names_in_prompt(self) -> list[str]:
        """None: there is no prompt."""
        return []


@dataclass
class TextTask(Task):
    """Text-to-text tasks, for causal and seq2seq models.

    train_dataset, eval_dataset: lists of rows (dicts) with a text and an answer ("label"), both strings.
    labels: all answers; an evaluation by `score` chooses among them. Empty where answers are free text: then `metric`
    says how they are compared (a name of `TEXT_METRICS`), and they are generated whatever `eval_mode` says.
    max_answer: tokens of a free answer at most (64); longer ones are cut in training and evaluation.
    """

    labels: list[str] = field(default_factory=list)
    instruction: str = ""
    text_column: str = "sentence"
    label_column: str = "label"
    prompt: str = PROMPT
    max_answer: int | None = None

    def __post_init__(self):
        super().__post_init__()
        where = f"task {self.name!r}"
        if self.metric == "accuracy":
            if not self.labels:
                raise ValueError(
                    f"{where} has no labels; where answers are free text, a metric says how they are compared: "
                    f"{', '.join(TEXT_METRICS)}"
                )
            if self.max_answer is not None:
                raise ValueError(f"{where}: max_answer is for free answers; labels are as long as they are")
        elif self.metric not in TEXT_METRICS:
            raise ValueError(f"{where}: unknown metric {self.metric!r}; known: accuracy, {', '.join(TEXT_METRICS)}")
        elif self.labels:
            raise ValueError(f"{where}: metric {self.metric!r} compares free answers: leave the labels out")
        elif self.max_answer is None:
            self.max_answer = 64
        elif not isinstance(self.max_answer, int) or self.max_answer < 1:
            raise ValueError(f"{where}: max_answer is a positive number of tokens, got {self.max_answer!r}")
        if not all(isinstance(label, str) and label.strip() for label in self.labels):
            raise ValueError(f"{where}: labels must be strings that are not empty, got {self.labels}")
        if len({re.sub(r"^(-?\d+)\.0+$", r"\1", fold(label)) for label in self.labels}) != len(self.labels):
            raise ValueError(
                f"{where}: two labels differ only in case, spaces, Unicode form, or as 1 and 1.0: "
                f"{', '.join(map(ascii, self.labels))}"
            )
        if "{text}" not in self.prompt:
            raise ValueError(f"{where}: the prompt needs a place for '{{text}}', got {self.prompt!r}")
        if unknown := set(re.findall(r"\{(\w+)\}", self.prompt)) - set(_PLACES):
            known = ", ".join(f"{{{place}}}" for place in _PLACES)
            raise ValueError(f"{where}: the prompt has places for {known}, not for {sorted(unknown)[0]!r}")
        _check_rows(self, [self.text_column, self.label_column])
        for split, i, row in _rows(self) if self.labels else ():
            if row[self.label_column] not in self.labels:
                raise ValueError(
                    f"{where}, {split} row {i}: label {row[self.label_column]!r} is not among {self.labels}; in a "
                    "stream, labels: {label of the data: label in the prompt} says what each is called"
                )

    def render(self, text: str) -> str:
        """The prompt of one text. Plain replacement: braces in a text mean nothing."""
        parts = {
            "instruction": self.instruction,
            "options": " | ".join(self.labels),
            "option_list": ", ".join(self.labels),
            "text": text.strip(),
        }
        return re.sub(rf"\{{({'|'.join(_PLACES)})\}}", lambda match: parts[match[1]], self.prompt)

    def style(self) -> str:
        """Which of `PROMPT_STYLES` the prompt is, or "own"."""
        plain = re.sub(r"^Task:.*\nDataset:.*\n", "Task:{category}\nDataset:{dataset}\n", self.prompt)
        short = PROMPT_STYLES["olora"].replace("{instruction}\nOption: {option_list} \n", "")  # no instruction
        if plain in (PROMPT_STYLES["olora"], short):
            return "olora"
        return "jumplora" if self.prompt == PROMPT else "own"

    def describe(self) -> dict[str, Any]:
        """As [`Task.describe`]."""
        prompt = {"prompt_style": self.style(), "prompt": self.prompt, "names_in_prompt": self.names_in_prompt()}
        return super().describe() | prompt

    def names_in_prompt(self) -> list[str]:
        """Names of the data set (the task's own, the last part of its source) that every prompt holds, texts and
        options aside. Such a prompt tells the model which task it is."""
        fixed = re.sub(r"\{(options|option_list|text)\}", "", self.prompt).replace("{instruction}", self.instruction)
        words = fold(re.sub(r"\W+", " ", fixed))
        names = {self.name, self.source.rsplit("/", 1)[-1]} - {""}
        return sorted(n for n in names if f" {fold(re.sub(r'[^A-Za-z0-9_]+', ' ', n))} " in f" {words} ")


def _checked(task: str, compute_metrics: Callable) -> Callable:
    """`compute_metrics`, of which anything but a dict is an error that names the task."""

    @functools.wraps(compute_metrics)  # the Trainer looks at its arguments
    def checked(*args: Any, **options: Any) -> Any:
        found = compute_metrics(*args, **options)
        if not isinstance(found, dict) and options.get("compute_result", True):
            raise ValueError(
                f"task {task!r}: compute_metrics returned {short(found)}, not a dict such as {{'accuracy': 0.5}}"
            )
        return found

    return checked


def row_count(rows: Any) -> int | None:
    """How many rows a data set has; None for a streamed one, which does not know."""
    try:
        return 0 if rows is None else len(rows)
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    """Of an object what JSON has and another process finds again: numbers of an array, the type of all else."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _hash_rows(digest: Any, rows: Dataset) -> None:
    """Into a hash, the content of all rows: the same however the data set was made, read or cut into files."""
    for batch in rows.with_format("arrow").iter(1000):
        batch = batch.select(sorted(batch.column_names)).replace_schema_metadata(None)
        batch = batch.take(list(range(len(batch)))).combine_chunks()  # copied: no offsets of what it was a part of
        sink = BytesIO()
        with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_table(batch)
        digest.update(sink.getbuffer())


def _rows(task: Task):
    """(split, number, row) of every row of a task."""
    for split, rows in (("train", task.train_dataset), ("eval", task.eval_dataset)):
        for i, row in enumerate(rows or ()):
            yield split, i, row


def _check_rows(task: Task, columns: list[str]) -> None:
    if None in (row_count(task.train_dataset), row_count(task.eval_dataset)):
        raise ValueError(
            f"task {task.name!r}: a run encodes the texts of a task before it trains, so they cannot be streamed: give "
            "a list of rows or a Dataset"
        )
    for split, i, row in _rows(task):
        if not isinstance(row, Mapping):
            where = f"task {task.name!r}, {split} row {i}"
            raise ValueError(f"{where}: a row is a dict with {', '.join(columns)}, got {row!r}")
        for column in columns:
            if column not in row:
                raise ValueError(f"task {task.name!r}, {split} row {i}: no column {column!r}, only {sorted(row)}")
            if not isinstance(row[column], str):
                raise ValueError(
                    f"task {task.name!r}, {split} row {i}: no string in column {column!r}, but {short(row[column])}"
                )

"""Tasks and streams of tasks: what is trained on, what it is called, how a text becomes a prompt."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset


PROMPT = "Task Instruction: {instruction}\nOptions: {options}\nText: {text}\nAnswer:"  # JumpLoRA's: no data-set name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Task:
    """A task for any trainer class: data sets as that class takes them.

    name: unique in its stream; letters, digits, '-', '_', '.'.
    compute_metrics: as for `Trainer`; `metric` names the key of its result that fills the accuracy matrix.
    """

    name: str
    train_dataset: Any
    eval_dataset: Any = None
    compute_metrics: Callable | None = None
    metric: str = "accuracy"
    source: str = ""

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"task name {self.name!r}: use letters, digits, '-', '_' and '.', starting with a letter")
        if self.train_dataset is None or len(self.train_dataset) == 0:
            raise ValueError(f"task {self.name!r} has no training example")
        if self.eval_dataset is not None and len(self.eval_dataset) == 0:
            raise ValueError(f"task {self.name!r} has an empty eval set; leave it out (None) if there is none")

    def fingerprint(self) -> str:
        """Tells whether a restarted run sees the same task: options, size and, where rows can be read, the rows."""
        skip = {"train_dataset", "eval_dataset", "compute_metrics", "source"}
        options = {key: value for key, value in vars(self).items() if key not in skip}
        digest = hashlib.sha256(json.dumps([options, len(self.train_dataset)], sort_keys=True).encode())
        for part in (self.train_dataset, self.eval_dataset):
            if isinstance(part, list):
                digest.update(json.dumps(part, sort_keys=True, default=str).encode())
            elif isinstance(part, Dataset):
                digest.update(part._fingerprint.encode())
        return digest.hexdigest()[:16]


@dataclass
class TextTask(Task):
    """Text-to-text classification, for causal and seq2seq models.

    train_dataset, eval_dataset: lists of rows (dicts) with a text and a label, both strings.
    labels: all answers; an evaluation by `score` chooses among them.
    """

    labels: list[str] = field(default_factory=list)
    instruction: str = ""
    text_column: str = "sentence"
    label_column: str = "label"
    prompt: str = PROMPT

    def __post_init__(self):
        super().__post_init__()
        where = f"task {self.name!r}"
        if not self.labels:
            raise ValueError(f"{where} has no labels")
        if not all(isinstance(label, str) and label.strip() for label in self.labels):
            raise ValueError(f"{where}: labels must be strings that are not empty, got {self.labels}")
        if len(set(map(fold, self.labels))) != len(self.labels):
            raise ValueError(f"{where}: two labels are the same but for case or spaces: {self.labels}")
        if "{text}" not in self.prompt:
            raise ValueError(f"{where}: the prompt needs a place for '{{text}}', got {self.prompt!r}")
        for split, rows in (("train", self.train_dataset), ("eval", self.eval_dataset or [])):
            for i, row in enumerate(rows):
                for column in (self.text_column, self.label_column):
                    if not isinstance(row.get(column), str):
                        raise ValueError(
                            f"{where}, {split} row {i}: no string in column {column!r}, only {sorted(row)}"
                        )
                if row[self.label_column] not in self.labels:
                    raise ValueError(
                        f"{where}, {split} row {i}: label {row[self.label_column]!r} is not among {self.labels}"
                    )

    def render(self, text: str) -> str:
        """The prompt of one text. Plain replacement: braces in a text mean nothing."""
        parts = {"{instruction}": self.instruction, "{options}": " | ".join(self.labels), "{text}": text.strip()}
        return re.sub(r"\{instruction\}|\{options\}|\{text\}", lambda match: parts[match.group()], self.prompt)


def fold(text: str) -> str:
    """Lower case, white space folded: how answers are compared (the published metric)."""
    return " ".join(text.lower().split())


class Encoder:
    """Turns rows of text tasks into token ids for a tokenizer; cuts texts that are too long, and only texts.

    max_length: tokens of prompt and answer together (causal), of the prompt alone (seq2seq).
    truncated: how many prompts were cut, by task name.
    """

    def __init__(self, tokenizer, max_length: int, seq2seq: bool):
        self.tokenizer, self.max_length, self.seq2seq = tokenizer, max_length, seq2seq
        self.truncated: Counter[str] = Counter()

    def answer_ids(self, label: str) -> list[int]:
        """Tokens of an answer, with the end-of-sequence token."""
        if self.seq2seq:
            return self.tokenizer(text_target=label).input_ids
        return [*self.tokenizer(" " + label, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def prompt_ids(self, task: TextTask, text: str) -> list[int]:
        """Tokens of a prompt, its text cut so that any answer still fits.

        Raises:
            ValueError: instruction, options and answer alone are longer than max_length.
        """
        room = self.max_length
        if not self.seq2seq:
            room -= max(len(self.answer_ids(label)) for label in task.labels)
        ids = self.tokenizer(task.render(text)).input_ids
        if len(ids) <= room:
            return ids
        self.truncated[task.name] += 1
        pieces = self.tokenizer(text.strip(), add_special_tokens=False).input_ids
        keep = len(pieces)
        while len(ids) > room:
            if keep == 0:
                raise ValueError(
                    f"task {task.name!r}: instruction, options and answer take "
                    f"{self.max_length - room + len(ids)} tokens, max_length is {self.max_length}: raise it or shorten "
                    "them"
                )
            keep = max(0, keep - (len(ids) - room))
            ids = self.tokenizer(task.render(self.tokenizer.decode(pieces[:keep]))).input_ids
        return ids

    def train_rows(self, task: TextTask) -> Dataset:
        """input_ids and labels of every training row; in a causal model the loss is on the answer alone."""
        rows = []
        for row in task.train_dataset:
            prompt, answer = self.prompt_ids(task, row[task.text_column]), self.answer_ids(row[task.label_column])
            if self.seq2seq:
                rows.append({"input_ids": prompt, "labels": answer})
            else:
                rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return Dataset.from_list(rows)


def pad_rows(rows: list[list[int]], value: int, side: str = "right"):
    """Integer lists as one int64 tensor [rows, longest], padded with `value`."""
    import torch

    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)])


def collate(tokenizer, seq2seq: bool) -> Callable[[list[dict]], dict]:
    """Batches of [`Encoder.train_rows`], padded on the right."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def batch(rows: list[dict]) -> dict:
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad_rows(ids, pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            "labels": pad_rows([row["labels"] for row in rows], -100),
        }

    return batch


# ---- streams ------------------------------------------------------------------------------------------------------

_TASK_KEYS = {
    "name", "folder", "dataset", "config", "train_file", "eval_file", "train_split", "eval_split", "text", "label",
    "labels", "skip_labels", "instruction", "max_train", "max_eval",
}  # fmt: skip
_STREAM_KEYS = {"name", "prompt", "catalogue", "tasks", "max_train", "max_eval"}


def load_tasks(
    stream: str | Path, data_dir: str | Path | None = None, max_train: int | None = None, max_eval: int | None = None
) -> list[TextTask]:
    """Read a stream of text tasks from a YAML file (docs/streams.md describes every key).

    `tasks` holds the tasks, or names from the file that `catalogue` points to. Each task's rows come from `folder`
    (below `data_dir`, or below the file's own folder: `{train,test,labels}.json`), from `train_file` and `eval_file`
    (JSON, JSON lines, CSV, Parquet), or from the Hub data set `dataset`. With a `data_dir`, tasks of a folder are
    read from there and the Hub is not asked.

    Args:
        max_train, max_eval: at most so many rows a task (the first ones); overrides the file.

    Raises:
        ValueError: a malformed file (line and key are named), a missing column, an unknown label.
        FileNotFoundError: a file or folder that the stream names does not exist.
    """
    path, given = Path(stream), {"max_train": max_train, "max_eval": max_eval}
    _check_keys({key: value for key, value in given.items() if value is not None}, set(given), set(), "load_tasks")
    data, entries = _read_stream(path)
    described = path
    if "catalogue" in data:
        described, wanted = path.parent / data["catalogue"], entries
        _, listed = _read_stream(described)
        for where, entry in listed:
            _check_keys(entry, _TASK_KEYS, {"name"}, where)
        catalogue = {entry["name"]: (where, entry) for where, entry in listed}
        for where, name in wanted:
            if not isinstance(name, str) or name not in catalogue:
                raise ValueError(f"{where}: {described} has no task {name!r}, only {', '.join(catalogue)}")
        entries = [catalogue[name] for _, name in wanted]
    tasks = []
    for where, entry in entries:
        _check_keys(entry, _TASK_KEYS, {"name"}, where)
        limits = {key: given[key] or entry.get(key) or data.get(key) for key in given}
        tasks.append(_read_task(entry, data.get("prompt", PROMPT), described, data_dir, limits, where))
    return tasks


def _read_stream(path: Path) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The content of a stream file, and (file and line, entry) of each of its tasks."""
    if not path.is_file():
        raise FileNotFoundError(f"stream file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        data, root = yaml.safe_load(text), yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    _check_keys(data, _STREAM_KEYS, {"tasks"}, f"{path}")
    nodes = next(value.value for key, value in root.value if key.value == "tasks")
    return data, [(f"{path}, line {n.start_mark.line + 1}", e) for n, e in zip(nodes, data["tasks"], strict=True)]


def _check_keys(entry: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(entry).__name__} {entry!r}")
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
        if key == "tasks":
            fits, wanted = isinstance(value, list) and bool(value), "a list of tasks"
        elif key in ("max_train", "max_eval"):
            fits, wanted = type(value) is int and value > 0, "a number above 0"
        elif key in ("labels", "skip_labels"):
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            wanted = "a list of strings (in YAML, quote yes, no and numbers)"
        else:
            fits, wanted = isinstance(value, str), "a string"
        if not fits:
            raise ValueError(f"{where}: {key!r} must be {wanted}, found {value!r}")
    for key in required - set(entry):
        raise ValueError(f"{where}: key {key!r} is missing")


def _read_task(entry: dict, prompt: str, stream: Path, data_dir, limits: dict, where: str) -> TextTask:
    text, label = entry.get("text", "sentence"), entry.get("label", "label")
    labels = entry.get("labels")
    if "folder" in entry and (data_dir is not None or "dataset" not in entry):
        text, label = "sentence", "label"  # the layout's own columns; those of the entry are the Hub's
        folder = Path(data_dir or stream.parent) / entry["folder"]
        splits = {"train": folder / "train.json", "eval": folder / "test.json"}
        rows = {split: read_rows(file) for split, file in splits.items()}
        own, source = folder / "labels.json", str(entry["folder"])
        if own.is_file():
            labels = _read_json(own)
            _check_keys({"labels": labels}, {"labels"}, set(), str(own))
    elif "train_file" in entry:
        files = {"train": entry["train_file"], "eval": entry.get("eval_file")}
        root = Path(data_dir or stream.parent)
        rows = {split: read_rows(root / file) if file else [] for split, file in files.items()}
        source = str(entry["train_file"])
    elif "dataset" in entry:
        names = {"train": entry.get("train_split", "train"), "eval": entry.get("eval_split", "test")}
        rows = {
            split: _hub_rows(entry["dataset"], entry.get("config"), name, limits[f"max_{split}"], label, labels)
            for split, name in names.items()
        }
        source = f"hf://datasets/{entry['dataset']}"  # the card names it as a data set of the Hub
    else:
        raise ValueError(f"{where}: needs 'folder', 'train_file' or 'dataset'")
    for split in rows:
        part = [_text_row(row, text, label, f"{where}, {split} row {i}") for i, row in enumerate(rows[split])]
        part = [row for row in part if row["label"] not in entry.get("skip_labels", ())]
        rows[split] = part[: limits[f"max_{split}"]]
    if labels is None:
        labels = sorted({row["label"] for row in rows["train"]})
    try:
        return TextTask(
            name=entry["name"], train_dataset=rows["train"], eval_dataset=rows["eval"] or None, labels=labels,
            instruction=entry.get("instruction", ""), prompt=prompt, source=source,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _text_row(row: dict, text: str, label: str, where: str) -> dict[str, str]:
    """`text` is a column, or a template over columns such as 'Title: {title}\\nText: {content}'."""
    columns = re.findall(r"\{(\w+)\}", text)
    for column in [*(columns or [text]), label]:
        if row.get(column) is None:
            problem = "is empty" if column in row else "does not exist"
            raise ValueError(f"{where}: column {column!r} {problem}; there are {', '.join(sorted(row))}")
    value = re.sub(r"\{(\w+)\}", lambda match: str(row[match.group(1)]), text) if columns else str(row[text])
    return {"sentence": value, "label": str(row[label])}


def _hub_rows(dataset: str, config, split: str, limit: int | None, label: str, labels: list[str] | None) -> list[dict]:
    """Rows of a Hub data set; class numbers become the stream's labels, or the data set's own names.

    Shuffled with a fixed seed before the first `limit` are taken: many data sets are sorted by class.
    """
    part = load_dataset(dataset, config, split=split).shuffle(seed=0)
    if limit is not None:
        part = part.select(range(min(limit, len(part))))
    names, rows = labels or getattr(part.features.get(label), "names", None), part.to_list()
    if names is not None and rows and isinstance(rows[0].get(label), int):
        rows = [{**row, label: names[row[label]]} for row in rows if 0 <= row[label] < len(names)]
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON (a list), JSON lines, CSV or Parquet file, without a cache elsewhere.

    Raises FileNotFoundError, or ValueError naming the file (and the line) when it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ValueError(f"{path}: cannot read {kind!r}; use {', '.join(_READERS)}")
    rows = _READERS[kind](path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_json(path: Path, first_line: int = 1, text: str | None = None) -> Any:
    try:
        return json.loads(_read_text(path) if text is None else text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg})") from error


def _read_json_lines(path: Path) -> list[Any]:
    # Lines end with a line feed alone: JSON strings may hold the other characters that str.splitlines() splits at.
    lines = enumerate(_read_text(path).split("\n"), 1)
    return [_read_json(path, number, line) for number, line in lines if line.strip()]


def _read_csv(path: Path) -> list[dict[str, str]]:
    rows, reader = [], csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more fields than columns")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


_READERS = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}

"""Rows of data files (JSON, JSON lines, CSV, Parquet) and of data sets on the Hub."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, load_dataset

from ..schema import short


def hub_rows(dataset: str, config, split: str, limit: int | None, label: str | None) -> tuple[list[dict], list[str]]:
    """(rows of a Hub data set, all names of the column `label`); class numbers are their names in the data set.

    Shuffled with a fixed seed before the first `limit` are taken: many data sets are sorted by class. There are no
    names where the data set has none of its own.
    """
    part = load_dataset(dataset, config, split=split).shuffle(seed=0)
    if limit is not None:
        part = part.select(range(min(limit, len(part))))
    names = _class_names(part.features)
    return _named(part.to_list(), names), names.get(label, [])


def _class_names(features: Mapping[str, Any]) -> dict[Any, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _named(rows: list[dict], names: dict[Any, list[str]]) -> list[dict]:
    """Rows with the names of their classes in place of the numbers; one without a name (-1: no label) stays."""
    for column, known in names.items():
        name = dict(enumerate(known))
        for row in rows:
            row[column] = name.get(row[column], row[column])
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON (a list), JSON lines, CSV or Parquet file, without a cache elsewhere.

    Raises FileNotFoundError, or ValueError naming the file (and the line) when it cannot be read.
    """
    if len(path.name) > 255:  # what a file system takes; the error of this one would quote it whole
        raise FileNotFoundError(f"data file {path.parent / path.name[:100]}... does not exist: its name is too long")
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    kind = path.suffix.lower()
    if kind not in READERS:
        raise ValueError(f"{path}: cannot read {kind!r}; use {', '.join(READERS)}")
    rows = READERS[kind](path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path, first_line: int = 1, text: str | None = None) -> Any:
    text = read_text(path) if text is None else text
    try:
        data = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is no character, and no tokenizer takes it
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; lists in lists in lists
        raise ValueError(f"{path}, line {first_line} and on: not valid JSON for rows ({error})") from error
    return data


def _read_json_lines(path: Path) -> list[Any]:
    # Lines end with a line feed alone: JSON strings may hold the other characters that str.splitlines() splits at.
    lines = enumerate(read_text(path).split("\n"), 1)
    return [read_json(path, number, line) for number, line in lines if line.strip()]


def _read_csv(path: Path) -> list[dict[str, str]]:
    rows, reader = [], csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        names = reader.fieldnames or []
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(f"{path}, line 1: two columns are called {short(twice[0])}")
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
        return _named(pyarrow.parquet.read_table(path).to_pylist(), parquet_names(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def parquet_names(path: Path) -> dict[Any, list[str]]:
    """{column: names of its classes}, where the library `datasets` wrote a Parquet file.

    Raises:
        ValueError: what it wrote there is damaged.
    """
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return _class_names(Features.from_arrow_schema(schema))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: its features are damaged ({error!r})") from error


READERS = {".json": read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}

"""Rows of data files (JSON, JSON lines, CSV, Parquet) and of data sets on the Hub."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset


def hub_rows(dataset: str, config, split: str, limit: int | None, label: str | None, labels) -> list[dict]:
    """Rows of a Hub data set; class numbers become the stream's labels, or the data set's own names.

    Shuffled with a fixed seed before the first `limit` are taken: many data sets are sorted by class.
    """
    part = load_dataset(dataset, config, split=split).shuffle(seed=0)
    if limit is not None:
        part = part.select(range(min(limit, len(part))))
    names, rows = labels or getattr(part.features.get(label), "names", None), part.to_list()
    if label and names is not None and rows and isinstance(rows[0].get(label), int):
        rows = [{**row, label: names[row[label]]} for row in rows if 0 <= row[label] < len(names)]
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON (a list), JSON lines, CSV or Parquet file, without a cache elsewhere.

    Raises FileNotFoundError, or ValueError naming the file (and the line) when it cannot be read.
    """
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


READERS = {".json": read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}

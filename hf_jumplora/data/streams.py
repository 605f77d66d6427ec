"""Streams: YAML files that say which tasks, in which order, and where their rows are."""

import random
import re
from pathlib import Path
from typing import Any

from ..schema import read_yaml, short
from .readers import READERS, hub_rows, parquet_names, read_json, read_rows, read_text
from .tasks import PROMPT_STYLES, LanguageModelTask, TextTask


_TASK_KEYS = {
    "name", "folder", "dataset", "config", "train_file", "eval_file", "train_split", "eval_split", "text", "label",
    "labels", "skip_labels", "instruction", "max_train", "max_eval", "language_model", "metric", "max_answer",
}  # fmt: skip
_STREAM_KEYS = {"name", "prompt", "prompt_style", "catalogue", "tasks", "held_out", "max_train", "max_eval"}
GENERAL_ROWS = 1024  # rows that `general_text` reads: one half is measured, the other is for a strategy's `general`


def shipped_streams() -> Path:
    """The folder of the streams that come with the package: beside this package, or in a checkout's recipes."""
    packaged = Path(__file__).parents[1] / "streams"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes" / "streams"


def stream_path(stream: str | Path) -> Path:
    """A stream file, or the shipped one of that name (`order1`). Raises FileNotFoundError that lists the names."""
    path = Path(stream)
    if path.is_file():
        return path
    named = shipped_streams() / f"{stream}.yaml"
    if path.name == str(stream) and named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in shipped_streams().glob("*.yaml") if p.stem != "benchmark"))
    raise FileNotFoundError(f"stream file {path} does not exist; shipped streams, by name: {names}")


def load_tasks(
    stream: str | Path,
    data_dir: str | Path | None = None,
    max_train: int | None = None,
    max_eval: int | None = None,
    prompt_style: str | None = None,
    held_out: list[str] | None = None,
    general_text: str | None = None,
) -> list[Any]:
    """Read a stream of text tasks from a YAML file (docs/streams.md describes every key), or a shipped one by its name.

    `tasks` holds the tasks, or names from the file that `catalogue` points to. Each task's rows come from `folder`
    (below `data_dir`, or below the file's own folder: `{train,test,labels}.json`), from `train_file` and `eval_file`
    (JSON, JSON lines, CSV, Parquet), or from the Hub data set `dataset`. With a `data_dir`, tasks of a folder or of
    files are read from there and the Hub is not asked.

    Args:
        max_train, max_eval: at most so many rows a task, drawn with a fixed seed; overrides the file.
        prompt_style: a name of `PROMPT_STYLES`; overrides the file. "olora" names the data set in every prompt.
        held_out: names of tasks of this file or its catalogue that are evaluated and never trained on; they stand
            behind the others. Overrides the file's list.
        general_text: text of no task, to measure general ability on: a .txt, JSON, CSV or Parquet file, or a data set
            of the Hub, ID[:CONFIG], with a column "text".

    Returns:
        list of [`TextTask`] and [`LanguageModelTask`].

    Raises:
        ValueError: a malformed file (line and key are named), a missing column, an unknown label.
        FileNotFoundError: a file or folder that the stream names does not exist.
    """
    path, given = stream_path(stream), {"max_train": max_train, "max_eval": max_eval}
    _check_keys({key: value for key, value in given.items() if value is not None}, set(given), set(), "load_tasks")
    if isinstance(held_out, str):
        raise ValueError(f"held_out is a list of names, got {held_out!r}")
    data, entries, kept_out = read_stream(path)
    described, listed = path, entries
    if "catalogue" in data:
        described = path.parent / data["catalogue"]
        _, listed, _ = read_stream(described)
    for where, entry in listed:
        _check_keys(entry, _TASK_KEYS, {"name"}, where)
    catalogue = {entry["name"]: (where, entry) for where, entry in listed}

    def find(where: str, name: Any) -> tuple[str, dict]:
        if not isinstance(name, str) or name not in catalogue:
            raise ValueError(f"{where}: {described} has no task {name!r}, only {', '.join(catalogue)}")
        return catalogue[name]

    if "catalogue" in data:
        entries = [find(where, name) for where, name in entries]
    if held_out is not None:
        kept_out = [("held_out", name) for name in held_out]
    behind = [(where, entry) if isinstance(entry, dict) else find(where, entry) for where, entry in kept_out]
    for where, entry in behind:
        _check_keys(entry, _TASK_KEYS, {"name"}, where)
    names = {entry["name"] for _, entry in behind}
    tasks: list[Any] = []
    for where, entry in [pair for pair in entries if pair[1]["name"] not in names] + behind:
        entry = {key: value for key, value in entry.items() if (key, value) != ("metric", "accuracy")}  # of labels
        limits = {key: given[key] or entry.get(key) or data.get(key) for key in given}
        if prompt_style is None and "prompt" in data:
            prompt = data["prompt"]
        else:
            prompt = _styled(prompt_style or data.get("prompt_style", "jumplora"), entry, where)
        tasks.append(_read_task(entry, prompt, described, data_dir, limits, where, entry["name"] in names))
    return tasks if general_text is None else [*tasks, _general_task(general_text)]


def _general_task(source: str) -> LanguageModelTask:
    """Text of no task, for the cross-entropy before and after training: a held-out task called "general_text".

    source: a file (`.txt`, a text a line; or JSON, JSON lines, CSV, Parquet with a column "text"), or the train split
    of a Hub data set with such a column, `ID` or `ID:CONFIG`. Of its first 1024 texts, in the order of a fixed
    shuffle, every second one is measured; the others are what a strategy with `general=True` keeps.

    Raises:
        FileNotFoundError: neither a file nor an id. ValueError: no column "text", or fewer than two texts.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        rows: list[dict] = [{"text": line} for line in read_text(path).split("\n")]
    elif path.suffix.lower() in READERS:
        rows = read_rows(path)
    else:
        name, _, config = source.partition(":")
        rows, _ = hub_rows(name, config or None, "train", 16 * GENERAL_ROWS, None)
    texts = [_text_row(row, "text", None, f"general_text {source}, row {i}") for i, row in enumerate(rows)]
    texts = [row for row in texts if row["text"].strip()]
    random.Random(0).shuffle(texts)
    if len(texts) < 2:
        raise ValueError(f"general_text {source}: {len(texts)} texts; one is measured and one is kept, so 2 are needed")
    where = str(path) if path.suffix else f"hf://datasets/{source.partition(':')[0]}"
    measured, kept = texts[:GENERAL_ROWS:2], texts[1:GENERAL_ROWS:2]
    return LanguageModelTask("general_text", kept, measured, source=where, held_out=True)


def _styled(style: str, entry: dict, where: str) -> str:
    """The prompt of a style for a task. The names that O-LoRA's shows are those of the folder, CATEGORY/DATASET."""
    if style not in PROMPT_STYLES:
        raise ValueError(f"{where}: unknown prompt_style {style!r}; known: {', '.join(PROMPT_STYLES)}")
    prompt = PROMPT_STYLES[style]
    if "metric" in entry:  # free answers: there are no options
        prompt = prompt.replace("Options: {options}\n", "").replace("Option: {option_list} \n", "")
    if style == "olora":
        if not entry.get("instruction"):  # as published: such a task's text says everything
            prompt = prompt.replace("{instruction}\nOption: {option_list} \n", "").replace("{instruction}\n", "")
        category, _, dataset = entry.get("folder", f"{entry['name']}/{entry['name']}").rpartition("/")
        prompt = prompt.replace("{category}", category or dataset).replace("{dataset}", dataset)
    return prompt


def read_stream(path: Path) -> tuple[dict[str, Any], list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The content of a stream file, and (file and line, entry) of each of its tasks and of those held out."""
    if not path.is_file():
        raise FileNotFoundError(f"stream file {path} does not exist")
    data, root = read_yaml(path)
    _check_keys(data, _STREAM_KEYS, {"tasks"}, f"{path}")
    if "prompt" in data and "prompt_style" in data:
        raise ValueError(f"{path}: prompt and prompt_style both say what the prompt is; leave one out")
    nodes = {key.value: value.value for key, value in root.value}

    def entries(key: str) -> list[tuple[str, Any]]:
        lines = [f"{path}, line {node.start_mark.line + 1}" for node in nodes.get(key, ())]
        return list(zip(lines, data.get(key, ()), strict=True))

    return data, entries("tasks"), entries("held_out")


def _check_keys(entry: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(entry).__name__} {short(entry)}")
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {short(key)}; known: {', '.join(sorted(known))}")
        if key in ("tasks", "held_out"):
            fits, wanted = isinstance(value, list) and bool(value), "a list of tasks"
        elif key == "language_model":
            fits, wanted = value is True, "true, or be left out"
        elif key in ("max_train", "max_eval", "max_answer"):
            fits, wanted = type(value) is int and value > 0, "a number above 0"
        elif key in ("labels", "skip_labels"):
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            wanted = "a list of strings (in YAML, quote yes, no and numbers)"
            if key == "labels" and isinstance(value, dict):
                fits = all(type(known) in (str, int) and isinstance(label, str) for known, label in value.items())
                wanted = "a list of strings, or {label of the data: label in the prompt} (quote yes and no)"
        else:
            fits, wanted = isinstance(value, str), "a string"
        if not fits:
            raise ValueError(f"{where}: {short(key)} must be {wanted}, found {short(value)}")
    for key in required - set(entry):
        raise ValueError(f"{where}: key {short(key)} is missing")


def _read_task(entry: dict, prompt: str, stream: Path, data_dir, limits: dict, where: str, held_out: bool):
    text, label, labels = entry.get("text", "sentence"), entry.get("label", "label"), entry.get("labels")
    renamed: dict[str, str] = {}  # label in the data -> label in the prompt
    names: list[str] = []  # of the classes, where the data set has them
    if isinstance(labels, dict):
        renamed = {str(known): name for known, name in labels.items()}
        labels = list(dict.fromkeys(labels.values()))
    plain = "language_model" in entry
    if plain:
        text, label = entry.get("text", "text"), None
        if unused := {"label", "labels", "skip_labels", "instruction", "metric", "max_answer"} & set(entry):
            raise ValueError(f"{where}: plain text (language_model) has no {sorted(unused)[0]!r}")
    root = Path(data_dir or stream.parent)
    local = data_dir is not None or "dataset" not in entry
    if "folder" in entry and local:
        text, label = ("text", None) if plain else ("sentence", "label")  # the layout's own; those given are the Hub's
        folder = root / entry["folder"]
        paths = {"train": folder / "train.json", "eval": folder / "test.json"}
        if held_out and not paths["train"].is_file():
            del paths["train"]
        if data_dir is None and not folder.is_dir():
            raise FileNotFoundError(f"{where}: {folder} is not a folder; set data_dir (--data_dir)")
        rows = {split: read_rows(file) for split, file in paths.items()}
        own, source = folder / "labels.json", str(entry["folder"])
        if own.is_file() and not plain:
            labels, renamed = read_json(own), {}
            _check_keys({"labels": labels}, {"labels"}, set(), str(own))
    elif ("train_file" in entry or "eval_file" in entry) and local:
        files = {"train": entry.get("train_file"), "eval": entry.get("eval_file")}
        rows = {split: read_rows(root / file) for split, file in files.items() if file}
        source = str(entry.get("train_file") or entry["eval_file"])
        if source.lower().endswith(".parquet"):
            names = parquet_names(root / source).get(label, [])
    elif "dataset" in entry:
        splits = {"train": entry.get("train_split", "train"), "eval": entry.get("eval_split", "test")}
        if held_out and labels is not None:
            del splits["train"]
        rows = {}
        for split, name in splits.items():
            limit = limits[f"max_{split}"]
            rows[split], names = hub_rows(entry["dataset"], entry.get("config"), name, limit, label)
        source = f"hf://datasets/{entry['dataset']}"  # the card names it as a data set of the Hub
    else:
        raise ValueError(f"{where}: needs 'folder', 'train_file' or 'dataset'")
    skipped = entry.get("skip_labels", ())
    for split in rows:
        part = [_text_row(row, text, label, f"{where}, {split} row {i}") for i, row in enumerate(rows[split])]
        if plain:
            part = [row for row in part if row["text"].strip()]
        else:
            part = [{**row, "label": renamed.get(row["label"], row["label"])} for row in part]
            part = [row for row in part if row["label"] not in skipped]
        rows[split] = part
    train, found = rows.get("train"), rows.get("eval")
    try:
        if not plain and "metric" not in entry:
            names = [renamed.get(name, name) for name in names if name not in skipped]
            if labels is None:
                labels = sorted(set(names or (row["label"] for row in train or found or ())))
                if not names:  # those that a data set names are its classes
                    _check_found(labels, len(train or found or ()))
            elif missing := [name for name in names if name not in labels]:
                raise ValueError(
                    f"the data set's own labels are {names}, and {missing[0]!r} is not among the stream's, {labels}: "
                    "write what each is called, labels: {label of the data: label in the prompt}"
                )
        train, found = _drawn(train, limits["max_train"]), _drawn(found, limits["max_eval"])
        if plain:
            return LanguageModelTask(entry["name"], train, found, source=source, held_out=held_out)
        return TextTask(
            name=entry["name"], train_dataset=train, eval_dataset=found, labels=labels or [], held_out=held_out,
            instruction=entry.get("instruction", ""), prompt=prompt, source=source,
            metric=entry.get("metric", "accuracy"), max_answer=entry.get("max_answer"),
        )  # fmt: skip
    except ValueError as error:
        says = str(error)  # values of thousands of letters are not shown whole
        raise ValueError(f"{where}: {says if len(says) < 2000 else f'{says[:1000]} ... {says[-500:]}'}") from error


def _check_found(labels: list[str], rows: int) -> None:
    """Raise ValueError if what stands in the column of labels cannot be classes: one alone, which is always right, or
    nearly as many as there are rows."""
    if len(labels) == 1:
        raise ValueError(f"all {rows} rows have the label {short(labels[0])}, so that every answer is right")
    if len(labels) > max(100, rows // 2):
        raise ValueError(
            f"{len(labels)} different labels in {rows} rows, such as {short(labels[0])}: where answers are free text, "
            "metric says how they are compared; where they are classes, list them as labels"
        )


def _drawn(rows: list[dict] | None, limit: int | None) -> list[dict] | None:
    """At most `limit` rows: all in their order, or the first ones of a fixed shuffle (files are often sorted)."""
    if rows is None or limit is None or len(rows) <= limit:
        return rows
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[:limit]


def _text_row(row: dict, text: str, label: str | None, where: str) -> dict[str, str]:
    """`text` is a column, or a template over columns such as 'Title: {title}\\nText: {content}'."""

    def value(column: str) -> str:
        found = row.get(column)
        if found is None or found != found:  # pandas writes NaN for nothing
            problem = "is empty" if column in row else "does not exist"
            raise ValueError(
                f"{where}: column {short(column)} {problem}; there are {', '.join(map(short, sorted(row)))}"
            )
        if not isinstance(found, (str, int, float)):
            raise ValueError(
                f"{where}: column {short(column)} holds no text but a {type(found).__name__}, {short(found)}: name a "
                "column of texts, or turn it into text first"
            )
        return str(found)

    columns = re.findall(r"\{(\w+)\}", text)
    if label in columns:
        raise ValueError(f"{where}: the text shows the answer, column {short(label)}")
    written = re.sub(r"\{(\w+)\}", lambda match: value(match[1]), text) if columns else value(text)
    return {"sentence": written, "label": value(label)} if label else {"text": written}

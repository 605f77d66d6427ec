"""Files that appear whole or not at all, and stack.json's seal over those beside it.

stack.json lists the sha256 of the files that a run goes on from. A kill between such a file and stack.json must not
leave the two apart, so they are changed together: the new content is written as `.NAME.new`, then stack.json, which
lists its sha256 (the moment at which all of it is valid), then each takes its name. Readers take `.NAME.new` when it is
the one that stack.json lists.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .schema import read_json


MANIFEST = "stack.json"
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')


def bytes_sha256(content: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file so that it appears whole or not at all, and is on the disk before what comes next."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _whole(target) as temporary, source.open("rb") as before, temporary.open("wb") as file:
        shutil.copyfileobj(before, file, 1 << 22)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that killed runs leave no heap of them
    try:
        yield temporary
        os.replace(temporary, path)
    finally:  # after an error, such as a full disk, the file that was there stays
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path, files: bool = False) -> None:
    """Have the names in a folder, and with `files` the content of its files, on the disk before what comes next."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    for path in [*(sorted(folder.iterdir()) if files else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_text(data: Any) -> str:
    """As all JSON files of a run are written."""
    return json.dumps(data, indent=2) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that it appears whole or not at all."""
    write_atomic(path, json_text(data))


# ---- the seal -----------------------------------------------------------------------------------------------------


def sealed_text(data: dict[str, Any]) -> str:
    """JSON whose last key `sha256` is the hash of the text up to its own value: no byte can change unseen."""
    text = json_text({**data, "sha256": "0" * 64})
    head, tail = text[: -64 - 4], text[-4:]  # around the zeros
    return f"{head}{bytes_sha256(head.encode())}{tail}"


def check_seal(path: Path, content: bytes, data: dict[str, Any]) -> None:
    """Take `sha256` out of `data`, the JSON of `content`. Raises ValueError when it is not that of the bytes."""
    end, expected = _SEAL.search(content), data.pop("sha256", None)
    found = bytes_sha256(content[: end.start(1)]) if end else None
    if found is None or found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, it says itself {expected}")


def write_beside(folder: Path, name: str, data: Any) -> None:
    """Write a JSON file that stack.json lists: it takes its place with the next stack.json, or at once without one."""
    write_json(next_path(folder, name) if (folder / MANIFEST).is_file() else folder / name, data)


def sealed_path(folder: Path, name: str) -> Path:
    """Where the file is that stack.json lists under this name: in its place, or waiting for it after a kill.

    Raises:
        ValueError: it is missing, damaged or was changed. FileNotFoundError: there is none, and none is listed.
    """
    path, expected = folder / name, None
    for _ in range(3):  # a run may be writing both just now
        before, expected = expected, _listed(folder).get(name)
        if expected is None and path.is_file():  # old stacks do not list all
            return path
        for place in (path, next_path(folder, name)):
            with contextlib.suppress(FileNotFoundError):
                if file_sha256(place) == expected:
                    return place
        if before is not None and before == expected:
            break
    if expected is None:
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is missing; stack.json lists it")
    raise ValueError(
        f"{path} is damaged, or was changed since stack.json was written: its sha256 is {file_sha256(path)}, "
        f"stack.json says {expected}. Put the file back that was there; if a version of hf-jumplora that did not seal "
        "it yet was interrupted here, finish that run with that version"
    )


def read_sealed(folder: Path, name: str) -> Any:
    """The JSON of a file beside stack.json. Raises what [`sealed_path`] and `read_json` raise."""
    for _ in range(3):
        with contextlib.suppress(FileNotFoundError):  # it has taken its place since
            content = sealed_path(folder, name).read_bytes()
            return read_json(folder / name, content)
    raise FileNotFoundError(f"{folder / name} does not exist")


def waiting(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """{name: file} of those that wait for the next stack.json."""
    return {name: next_path(folder, name) for name in names if next_path(folder, name).is_file()}


def finish_sealed(folder: Path, names: tuple[str, ...]) -> None:
    """Give waiting files their name, if stack.json lists them; delete them if it does not: a killed process's."""
    for name, path in waiting(folder, names).items():
        if _listed(folder).get(name) == file_sha256(path):
            os.replace(path, folder / name)
            sync_folder(folder)
        else:
            path.unlink()


def next_path(folder: Path, name: str) -> Path:
    """Where a file waits for the next stack.json."""
    return folder / f".{name}.new"


def _listed(folder: Path) -> dict[str, str]:
    files = read_json(folder / MANIFEST).get("files", {}) if (folder / MANIFEST).is_file() else {}
    return files if isinstance(files, dict) else {}


@contextlib.contextmanager
def name_write_errors(target: Path) -> Iterator[None]:
    """Errors of writing below `target` become an OSError that names it; safetensors has one of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} cannot be written, nothing of it is left ({error})") from error

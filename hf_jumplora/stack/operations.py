"""Operations on stacks in folders: overlaps, parts of a stack, another order, differences between two."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..disk import copy_atomic, file_sha256, name_write_errors, sync_folder, write_atomic, write_json
from ..ops.sparse import pack_bits, unpack_bits
from ..schema import read_json
from .files import TaskFile
from .load import open_stack
from .manifest import Manifest, library_versions, stack_support_sha256, write_manifest
from .save import STRATEGIES
from .verify import task_description
from .weights import same_weight


_CHUNK = 1 << 20  # counts of so many entries are exact in float32


def open_tasks(
    path: str | os.PathLike,
    tasks: list[str] | dict[str, float] | slice | None = None,
    revision: str | None = None,
) -> tuple[Path, Manifest, list[TaskFile]]:
    """(folder, manifest, chosen tasks) of a folder or a Hub repository.

    Raises:
        FileNotFoundError, ValueError: as `load_stack`.
    """
    folder, manifest, chosen = open_stack(path, tasks, revision)
    return folder, manifest, [TaskFile(folder, entry, manifest) for entry in chosen]


def check_empty_folder(out: str | os.PathLike) -> Path:
    """`out`, absolute. Raises ValueError if it exists and is not an empty folder: asked before any work is done."""
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; nothing was written")
    return target


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: `out` exists and is not an empty folder. OSError: it cannot be made.
    """
    target = check_empty_folder(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OSError(f"{target} cannot be made; nothing was written ({error})") from error
    try:
        with name_write_errors(target):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for folder in [*(path for path in temporary.iterdir() if path.is_dir()), temporary]:
                sync_folder(folder, files=True)
            os.replace(temporary, target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def shared_entries(tasks: list[TaskFile]) -> tuple[torch.Tensor, int]:
    """(int64 [tasks, tasks]: |Si & Sj|, with |Si| on the diagonal; the number of entries of all layers)."""
    shared, entries = torch.zeros(len(tasks), len(tasks), dtype=torch.long), 0
    shapes = {layer: shape for task in tasks for layer, shape in task.shapes.items()}
    for layer, (out_features, in_features) in shapes.items():
        n = out_features * in_features
        empty = torch.zeros((n + 7) // 8, dtype=torch.uint8)
        packed = [pack_bits(task.support(layer)) if layer in task.shapes else empty for task in tasks]
        for start in range(0, n, _CHUNK):
            rows = torch.stack([unpack_bits(bits, start, min(start + _CHUNK, n)) for bits in packed]).float()
            shared += (rows @ rows.T).long()
        entries += n
    return shared, entries


def subset(path: str | os.PathLike, tasks: list[str], out: str | os.PathLike, revision: str | None = None) -> Manifest:
    """Write a stack of some of the tasks, in the order they have.

    Weights and supports are copied byte for byte. Folders get new numbers, and parents that are gone are taken out of
    the others' configs. What belongs to the whole stack is left out: metrics.json, and what a strategy remembers.

    Raises:
        ValueError: an unknown task, a stack whose tasks are not additive, or `out` is not empty.
    """
    if isinstance(tasks, dict):
        raise ValueError("a subset has its tasks as they are: give names; load_stack and merge_stack take weights")
    folder, manifest, chosen = open_tasks(path, tasks, revision)
    return write_stack(folder, manifest, [task.folder for task in chosen], out)


def remove(path: str | os.PathLike, tasks: list[str], out: str | os.PathLike, revision: str | None = None) -> Manifest:
    """Write a stack without some tasks; the rest as in [`subset`].

    Raises:
        ValueError: as [`subset`]; or no task would be left.
    """
    _, manifest, gone = open_stack(path, tasks, revision)
    names = {task["name"] for task in gone}
    rest = [name for name in manifest.task_names if name not in names]
    if not rest:
        raise ValueError(f"leaving out all of {', '.join(tasks)} chooses none of the tasks of {path}")
    return subset(path, rest, out, revision)


def reorder(path: str | os.PathLike, tasks: list[str], out: str | os.PathLike, revision: str | None = None) -> Manifest:
    """Write a stack with all its tasks in another order.

    Only for tasks whose supports have no entry in common (isolation="hard" makes such): then every entry gets at most
    one update and any order gives the same bits. Elsewhere the float32 sum depends on the order.

    Raises:
        ValueError: two tasks have entries in common, or `tasks` is not the same set of tasks.
    """
    folder, manifest, chosen = open_tasks(path, None, revision)
    if sorted(tasks) != sorted(manifest.task_names):
        raise ValueError(f"reorder needs each task once: {', '.join(manifest.task_names)}; got {', '.join(tasks)}")
    shared, _ = shared_entries(chosen)
    for i, task in enumerate(chosen):
        for j in range(i):
            if shared[i, j]:
                raise ValueError(
                    f"{task.name!r} and {chosen[j].name!r} both change {int(shared[i, j])} entries: their order "
                    "matters (the sum is rounded, and the later one was trained on top of the earlier), so it is kept"
                )
    by_name = {task.name: task.folder for task in chosen}
    return write_stack(folder, manifest, [by_name[name] for name in tasks], out)


def write_stack(
    source: Path,
    manifest: Manifest,
    folders: list[str],
    out: str | os.PathLike,
    change: Callable[[str, Path, dict[str, Any], dict[str, Any]], str] | None = None,
    base_model: dict[str, Any] | None = None,
    said: str = "are those of that stack, byte for byte",
) -> Manifest:
    """Copy these task folders, in this order, as a stack of their own.

    change: called with (folder, its copy, its adapter's config, its task.json); it rewrites the weights and these two
    in place, and returns what its card is to say of that. base_model: another one, as a manifest has it. said: of the
    updates, on the stack's card.
    """
    entries = {task["folder"]: task for task in manifest.tasks}
    old = [task["folder"] for task in manifest.tasks]
    result = Manifest(
        base_model or manifest.base_model,
        manifest.method,
        manifest.additive,
        versions=library_versions(),
        separate=manifest.separate, competing=manifest.competing,
    )  # fmt: skip
    infos = {name: task_description(source, entries[name]) for name in folders}

    def pair(name: str, other: str, key: str) -> float:
        later, earlier = sorted((name, other), key=old.index, reverse=True)
        return infos[later][key][old.index(earlier)]

    with new_folder(out) as temporary:
        for number, name in enumerate(folders):
            new = f"task_{number:03d}"
            target = temporary / new
            target.mkdir()
            info = {**infos[name], "folder": new, "index": number}
            info.pop("layers", None)  # its collisions are with the tasks of the whole stack
            for key in {"collision", "overlap"} & set(info):
                info[key] = [pair(name, other, key) for other in folders[:number]]
            config = read_json(source / name / "adapter_config.json")
            config["parent_adapters"] = [] if manifest.separate else [f"task_{k:03d}" for k in range(number)]
            for file in entries[name]["files"]:
                if file not in ("adapter_config.json", "task.json", "README.md", STRATEGIES):
                    copy_atomic(source / name / file, target / file)
            card = (source / name / "README.md").read_text("utf-8", "replace").replace(name, new)
            if change is not None:
                card += change(name, target, config, info)
            support = info["support_sha256"] = stack_support_sha256(config.get("support"))
            write_json(target / "adapter_config.json", config)
            write_json(target / "task.json", info)
            write_atomic(target / "README.md", card)
            files = {path.name: file_sha256(path) for path in sorted(target.iterdir())}
            kept = {key: value for key, value in entries[name].items() if key != "state"}
            result.tasks.append({**kept, "folder": new, "files": files, "support_sha256": support})
        write_atomic(temporary / "README.md", _readme(manifest, result, said))
        write_manifest(temporary, result)
    return result


def _readme(whole: Manifest, part: Manifest, said: str) -> str:
    order = ", ".join(part.task_names)
    return (
        "---\nlibrary_name: peft\ntags:\n- continual-learning\n- jumplora\n---\n\n# Adapter stack\n\n"
        f"Tasks: {order}. Made from a stack ({whole.method}) of: {', '.join(whole.task_names)}. The updates "
        f"{said}; its scores do not hold for this one and are left out.\n\n```python\n"
        "import hf_jumplora\n\nmodel = hf_jumplora.load_stack(path)\n```\n"
    )


def diff(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, Any]:
    """What differs between two stacks.

    Returns {"base": whether the bases differ, "method": [a, b], "only_first": [...], "only_second": [...],
    "order": whether the common tasks stand in another order, "tasks": {name: row}}; a row has `same` (equal bytes of
    weights and supports), and for others `update`: ||Ua - Ub|| / ||Ua|| over all layers, and `kept`:
    |Sa & Sb| / |Sa or Sb|.
    """
    (_, a, tasks_a), (_, b, tasks_b) = open_tasks(first), open_tasks(second)
    of_b = {task.name: task for task in tasks_b}
    names_a, names_b = {task.name for task in tasks_a}, set(of_b)
    bases = (a.base_model, b.base_model)
    keys = {"architecture", "layers", "probe", "config"} & bases[0].keys() & bases[1].keys()
    other = any(bases[0][key] != bases[1][key] for key in keys) or _other_weights(*bases)
    rows = {task.name: _compare(task, of_b[task.name]) for task in tasks_a if task.name in of_b}
    return {
        "base": other,
        "method": [a.method, b.method],
        "only_first": [name for name in a.task_names if name in names_a - names_b],
        "only_second": [name for name in b.task_names if name in names_b - names_a],
        "order": [name for name in a.task_names if name in rows] != [name for name in b.task_names if name in rows],
        "tasks": rows,
    }


def _other_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Of two bases; of one that quantised weights of the other, or was stored without them, nothing is known."""
    ours, theirs = a.get("weights", {}), b.get("weights", {})
    if not ours or not theirs:
        return False
    pairs = [(entry, theirs.get(name)) for name, entry in ours.items()]
    return ours.keys() != theirs.keys() or any(
        next((one[k] != two[k] for k in ("xxh3", "sha256") if one.get(k) and two.get(k)), not same_weight(one, two))
        for one, two in pairs
        if one and two
    )


def _compare(a: TaskFile, b: TaskFile) -> dict[str, Any]:
    if file_sha256(a.path) == file_sha256(b.path):
        return {"same": True, "update": 0.0, "kept": 1.0}
    if a.shapes != b.shapes:
        return {"same": False, "update": None, "kept": None}
    change, size, both, either = 0.0, 0.0, 0, 0
    for layer in a.shapes:
        update = a.update(layer)
        change += float((update - b.update(layer)).double().square().sum())
        size += float(update.double().square().sum())
        in_a, in_b = a.support(layer), b.support(layer)
        both += int((in_a & in_b).sum())
        either += int((in_a | in_b).sum())
    return {"same": False, "update": (change / size) ** 0.5 if size else None, "kept": both / either if either else 1.0}

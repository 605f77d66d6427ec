"""stack.json: what a stack holds, and what each of its files must hash to."""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn

from ..disk import MANIFEST, check_seal, file_sha256, finish_sealed, sealed_text, waiting, write_atomic
from ..schema import StackFile, check, read_json, short
from ..tuner import named_layers


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1: the same without `sha256` and `files`; still read
ROUTER = "router.safetensors"
TOP_FILES = ("README.md", "metrics.json", "report.md", "matrix.png", "overlap.png", "run.json", ROUTER)


@dataclass
class Manifest:
    """The content of stack.json.

    base_model: name_or_path, revision, architecture, dtype that it was trained in, what each weight is known by
    (`weights`, see `base.identity`), the `config` that shapes results, layers {name: [out, in]} that are adapted.
    method: name of the method. additive: True when the model is the base plus all tasks' updates; False when each
    folder holds the whole model after that task (seqlora) and only one can be loaded. separate: True when each folder
    is a model of its own for its task (perlora): one is loaded, by name. competing: True when the ranks of all tasks
    compete for each token (mora, smora): all folders are needed, and no weight is their sum.
    tasks: in order; each {"name", "folder", "files": {file: sha256}, "support_sha256"}, and "state": the sha256 of
    strategies.safetensors, if the method remembers something; only the last task's file is kept.
    files: {file: sha256} of the files beside stack.json; loading does not need them (but a router that is asked for),
    `verify_stack` checks them.

    In the file, a last key `sha256` is the hash of the file's bytes up to its own value: no byte can change unseen.
    """

    base_model: dict[str, Any]
    method: str
    additive: bool
    tasks: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    separate: bool = False
    competing: bool = False

    @property
    def task_names(self) -> list[str]:
        return [task["name"] for task in self.tasks]


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Read and check stack.json of a folder.

    Raises:
        FileNotFoundError: there is no stack.json.
        ValueError: it is damaged, or of a format this version does not know.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} holds no adapter stack (it is another folder, or that of a run which has "
            "not finished a task yet)"
        )
    content = path.read_bytes()
    data = read_json(path, content)
    if not isinstance(data, dict) or data.get("format_version") not in (1, FORMAT_VERSION):
        version = data.get("format_version") if isinstance(data, dict) else None
        raise ValueError(
            f"{path} is damaged, or of format version {short(version)}: this hf_jumplora reads up to {FORMAT_VERSION}"
        )
    if data["format_version"] > 1:
        check_seal(path, content, data)
    check(StackFile, path, data)
    if unknown := sorted(data.keys() - {field.name for field in fields(Manifest)}):
        raise ValueError(f"{path} has keys that this version of hf_jumplora does not know: {short(unknown)}")
    return Manifest(**data)


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write stack.json: the moment at which a task belongs to the stack. The files beside it are hashed as they are;
    those of [`write_beside`] take their place at the same moment."""
    folder = Path(folder)
    manifest.format_version = FORMAT_VERSION
    files = {name: folder / name for name in TOP_FILES} | waiting(folder, TOP_FILES)
    manifest.files = {name: file_sha256(files[name]) for name in TOP_FILES if files[name].is_file()}
    data = asdict(manifest)
    if not manifest.competing:  # as earlier versions know it, which must not read the others
        del data["competing"]
    try:
        write_atomic(folder / MANIFEST, sealed_text(data))
    except OSError:
        finish_sealed(folder, TOP_FILES)  # those that would have been valid with it are not
        raise
    try:
        finish_sealed(folder, TOP_FILES)
    except OSError as error:  # all of it is valid already: readers find the files where they wait
        logger.warning("%s: files get their names at the next start (%s)", folder, error)


def is_folder(name: str) -> bool:
    """Whether the name of a base model is a path and not an id of the Hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or PureWindowsPath(name).drive != ""


def portable(folder: str | os.PathLike, manifest: Manifest) -> tuple[Manifest, dict[str, str]]:
    """A stack as it may leave this machine: its manifest, and {path: content} of the files that then differ.

    A base that was loaded from a folder is named "./llama" in place of "/home/me/models/llama", here and in each
    task's adapter_config.json, which is the only other file of a task that PEFT writes the name into. The result is
    the same for a stack that has been on the Hub in between.
    """
    name = manifest.base_model["name_or_path"]
    if is_folder(name):
        name = f"./{PureWindowsPath(name).name}"
    tasks, changed = [], {}
    for task in manifest.tasks:
        path = f"{task['folder']}/adapter_config.json"
        if not (Path(folder) / path).is_file():
            raise ValueError(f"{Path(folder) / path} is missing; stack.json lists it")
        config = read_json(Path(folder) / path)
        if (config.get("base_model_name_or_path") or "") != name:
            changed[path] = json.dumps({**config, "base_model_name_or_path": name}, indent=2, sort_keys=True)
            digest = hashlib.sha256(changed[path].encode()).hexdigest()
            task = {**task, "files": {**task["files"], "adapter_config.json": digest}}
        tasks.append(task)
    return replace(manifest, base_model={**manifest.base_model, "name_or_path": name}, tasks=tasks), changed


def layer_shapes(model: nn.Module) -> dict[str, list[int]]:
    """{layer name: [out, in]} of the adapted layers."""
    return {name: [layer.out_features, layer.in_features] for name, layer in named_layers(model)}


def stack_support_sha256(support: dict[str, list] | None) -> str:
    """One sha256 over the supports of all layers of a task; that of nothing for a task without a gate."""
    digest = hashlib.sha256()
    for name, (_, sha256) in sorted((support or {}).items()):
        digest.update(f"{name}:{sha256}\n".encode())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": str(torch.__version__)}
    for package in ("hf-jumplora", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions

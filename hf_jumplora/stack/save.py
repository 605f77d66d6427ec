"""Writing one finished task: its folder first, complete and under its final name at once; the manifest last."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from ..disk import file_sha256, sync_folder, write_atomic, write_json
from ..tuner.lookup import adapter_config
from .manifest import stack_support_sha256


STRATEGIES = "strategies.safetensors"


def save_task(
    model: PeftModel,
    folder: str,
    name: str,
    stack: Path,
    info: dict[str, Any],
    card: str,
    states: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Write a finished adapter as `stack`/`folder` and return its manifest entry (without adding it).

    info: goes into task.json. card: README.md. states: what the strategies must remember, if anything; their file is no
    part of the task (see `drop_states`).
    The folder is written under a temporary name and moved, so that it appears whole or not at all. Folders of these
    names that the manifest does not list yet (left by a run that was killed) are replaced.
    """
    temporary = stack / f".{folder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # Without embeddings: they are never adapted, and PEFT would ask the Hub about them once per adapter.
        model.save_pretrained(str(temporary), selected_adapters=[folder], save_embedding_layers=False)
        support = stack_support_sha256(adapter_config(model, folder).support)
        write_json(
            temporary / folder / "task.json", {"name": name, "folder": folder, "support_sha256": support, **info}
        )
        write_atomic(temporary / folder / "README.md", card)
        files = {path.name: file_sha256(path) for path in sorted((temporary / folder).iterdir())}
        entry = {"name": name, "folder": folder, "files": files, "support_sha256": support}
        if states:
            save_file(states, temporary / folder / STRATEGIES)
            entry["state"] = file_sha256(temporary / folder / STRATEGIES)
        target = stack / folder
        if target.exists():
            shutil.rmtree(target)
        sync_folder(temporary / folder, files=True)
        os.replace(temporary / folder, target)
        sync_folder(stack)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return entry


def drop_states(stack: Path, tasks: list[dict[str, Any]]) -> None:
    """Delete what the strategies remembered after each task but the last, whose file holds all of it.

    One file a stack is enough to go on from, and for a 7B model it is 0.12 GiB of curvature.
    """
    for task in tasks[:-1]:
        if "state" in task:
            (stack / task["folder"] / STRATEGIES).unlink(missing_ok=True)

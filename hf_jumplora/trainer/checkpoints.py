"""The checkpoints of a task in training: which of them a restarted run can continue from."""

import contextlib
import logging
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from ..schema import read_json


logger = logging.getLogger(__name__)


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished task; what else is there, such as the event files of a tracker, stays."""
    for path in folder.glob("*/checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob("*"), folder):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a task. A process that is killed while it writes one, or a power cut soon
    after, leaves files missing, empty or cut: such a checkpoint does not count, and the one before it does."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if (problem := _incomplete(path)) is None:
            return path
        logger.warning("%s is not complete (%s): it is not used", path, problem)
    return None


def _incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to go on exactly where it was written; None if nothing."""
    try:
        if not read_json(checkpoint / TRAINER_STATE_NAME):  # written last
            return f"{TRAINER_STATE_NAME} is empty"
    except (ValueError, OSError) as error:
        return str(error)
    needed = ["rng_state*.pth"]
    if not any(checkpoint.glob("global_step*")):  # DeepSpeed keeps the optimizer's state there
        needed += ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors"]
    for pattern in needed:
        if not any(checkpoint.glob(pattern)):
            return f"{pattern} is missing"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            return f"{path.name}: {error}"
    for path in sorted(checkpoint.rglob("*.pt*")):
        if path.is_file() and not _whole_zip(path):
            return f"{path.name} is damaged, cut or empty"
    return None


def _whole_zip(path: Path) -> bool:
    """Whether a file of torch.save is whole: it is a zip archive with a check sum of each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return False

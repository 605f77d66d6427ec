"""What the processes of one run have to agree on: their settings, what is on the disk, and errors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import is_in_notebook


def on_main(work: Callable[[], Any]) -> None:
    """Do something on the main process while the others wait.

    Raises:
        Exception: what `work` raised. RuntimeError: in the other processes, with its message.
    """
    failed = None
    if PartialState().is_main_process:
        try:
            work()
        except Exception as error:
            failed = error
    message = broadcast_object_list([None if failed is None else f"{type(failed).__name__}: {failed}"])[0]
    if failed is not None:
        raise failed
    if message is not None:
        raise RuntimeError(f"the main process stopped: {message}")


def quiet(args: Any) -> bool:
    """Whether this process shows no progress bar: in a log file it would be thousands of fragments."""
    seen = sys.stderr.isatty() or is_in_notebook()
    return args.disable_tqdm or not seen or not PartialState().is_main_process


def check_same_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError in every process, naming what differs, unless all processes have the same settings."""
    everybody = gather_object([{key: str(value) for key, value in settings.items()}])
    for rank, theirs in enumerate(everybody):
        first = everybody[0]
        differ = [
            f"{key}: {first.get(key)!r} in process 0, {theirs.get(key)!r} in process {rank}"
            for key in sorted({*first, *theirs})
            if first.get(key) != theirs.get(key)
        ]
        if differ:
            raise ValueError(
                f"the processes of this run have different settings ({'; '.join(differ)}): start all of them with the "
                "same command, files and versions"
            )


def check_shared_folder(path: Path) -> None:
    """Raise ValueError in every process unless all of them see a file that the main process has written."""
    missing = [rank for rank, there in enumerate(gather_object([path.is_file()])) if not there]
    if missing:
        raise ValueError(
            f"processes {missing} do not see {path}, which process 0 has written: output_dir must be on a file system "
            "that all machines share"
        )

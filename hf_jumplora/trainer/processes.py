"""What the processes of one run have to agree on: their settings, what is on the disk, and errors."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env


def on_main(work: Callable[[], Any]) -> None:
    """Do something on the main process while the others wait.

    Raises:
        Exception: what `work` raised. RuntimeError: in the other processes, with its message.
    """
    state, failed = PartialState(), None
    if state.is_main_process:
        try:
            work()
        except Exception as error:
            if state.num_processes == 1:
                raise
            failed = error
    if state.num_processes == 1:
        return
    message = broadcast_object_list([None if failed is None else f"{type(failed).__name__}: {failed}"])[0]
    if failed is not None:
        raise failed
    if message is not None:
        raise RuntimeError(f"the main process stopped: {message}")


def check_same_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError in every process, naming what differs, unless all processes have the same settings."""
    if PartialState().num_processes == 1:
        return
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


def check_compiler(args: Any) -> None:
    """Raise RuntimeError when DeepSpeed would have to compile an extension and cannot.

    On a CPU its communication is one, compiled when the first process group is made and then kept in
    TORCH_EXTENSIONS_DIR; without a compiler that ends in a traceback of ninja's.
    """
    wanted = args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if not wanted or torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"DeepSpeed compiles an extension for training on a CPU, and {' and '.join(missing)} cannot be found: "
            "install a C++ compiler and ninja (apt install g++; pip install ninja), name the compiler in the "
            "environment variable CXX, or train without DeepSpeed (recipes/accelerate/cpu2.yaml)"
        )


_FSDP_OPTIONS = {
    "FSDP_VERSION": ("2", "fsdp_version: 1 mixes frozen and trained weights in one tensor: use fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params is not supported: use recipes/accelerate/zero3_offload.yaml"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "true", "fsdp_reshard_after_forward: false leaves copies in which merged tasks would be missing: use true"
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false", "fsdp_cpu_ram_efficient_loading leaves the base empty in all processes but one: use false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false", "fsdp_activation_checkpointing is not supported: use gradient_checkpointing=True"
    ),
}  # fmt: skip


def take_fsdp(args: Any) -> bool:
    """Whether `accelerate launch` asks for FSDP2. From here on the run cuts the frozen base itself, and transformers
    and accelerate train the adapters with DDP: their own way would cut the adapters too, once and for the first task
    alone.

    Raises:
        ValueError: an option of FSDP that cannot be had.
    """
    if args.fsdp:
        raise ValueError("the argument fsdp is not supported: start with recipes/accelerate/fsdp2.yaml")
    if "FSDP_VERSION" not in os.environ:  # `accelerate launch` sets it for FSDP alone
        return False
    for name, (wanted, why) in _FSDP_OPTIONS.items():
        if os.environ.get(name, wanted).lower() != wanted:
            raise ValueError(why)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def sharding(args: Any) -> str:
    """How the model and its training are spread: "none" (one process), "ddp", "zero1" to "zero3" or "fsdp2"."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    if getattr(args, "cut_base", False):
        return "fsdp2"
    return "ddp" if args.world_size > 1 else "none"

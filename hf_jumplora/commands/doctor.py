"""Say what is installed, which backend a run would use here, and what will not work and why.

    hf-jumplora doctor

Exit code 0 if runs work, 1 if a library is too old.
"""

import argparse
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version


REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
# package -> what does not work without it
OPTIONAL = {
    "trl": "ContinualSFTTrainer, and TRL's other trainers",
    "triton": "the Triton kernels on a GPU (`blocked` runs instead, slower)",
    "deepspeed": "ZeRO",
    "bitsandbytes": "bases in 4 or 8 bits",
    "lm_eval": "`hf-jumplora eval --lm_eval`",
    "matplotlib": "pictures in reports",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`hf-jumplora doctor` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print what is there; returns the exit code."""
    import torch

    from .._compat import LOWEST, PEFT, PEFT_FOR_NATIVE, TRANSFORMERS
    from ..ops.dispatch import BACKEND_VARIABLE, choose_backend

    print(f"Python {platform.python_version()} on {platform.platform()}")
    for name in REQUIRED:
        print(f"  {name} {version(name)}")
    devices = [torch.device("cpu"), *(torch.device("cuda", k) for k in range(torch.cuda.device_count()))]
    for device in devices:
        what = "processor" if device.type == "cpu" else torch.cuda.get_device_name(device)
        try:
            backend = choose_backend(None, device, (torch.float32, torch.bfloat16))
        except ValueError as error:  # the environment asks for one that cannot run here
            backend = f"none: {error}"
        print(f"{device} ({what}): backend {backend}")
    bad = [f"{name} {found}: {why}; install {name}>={low}" for name, found, low, why in LOWEST if found < low]
    missing = []
    for name, what in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            missing.append(f"{what}: pip install {name.replace('_', '-')}")
        else:
            print(f"  {name} {_version(name)}")
    if PEFT < PEFT_FOR_NATIVE:
        missing.append(
            f"model.add_adapter of transformers {TRANSFORMERS}, which needs PEFT {PEFT_FOR_NATIVE}: use "
            "peft.get_peft_model"
        )
    if len(devices) == 1:
        print(
            f"no GPU: torch {torch.__version__} sees none, so runs use the CPU ({BACKEND_VARIABLE} chooses the backend)"
        )
    print(
        "\n".join(["will not work:", *(f"  {line}" for line in bad + missing)])
        if bad + missing
        else "everything is available"
    )
    return 1 if bad else 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(unknown version)"

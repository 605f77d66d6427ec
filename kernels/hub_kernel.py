"""Lay the kernels out as a repository of the Hugging Face kernel hub, which `kernels.get_kernel` loads.

    python kernels/hub_kernel.py build/hub_kernel

The folder has what the library loads (`build/torch-universal`: Triton compiles on the user's machine, so one build is
for every torch and GPU) and the sources as `kernel-builder` takes them (`build.toml`, `torch-ext`).
Format: https://huggingface.co/docs/kernels/kernel-requirements, as of `kernels` 0.17.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path


NAME, VERSION, LICENSE = "jumplora-kernels", 0, "apache-2.0"  # 0: the functions may still change
PACKAGE = Path(__file__).parent / NAME.replace("-", "_")
BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cuda", "rocm"]

[torch-noarch]
"""


def write_hub_kernel(out: Path) -> None:
    """Write the repository, whole or not at all.

    Raises:
        FileExistsError: `out` is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or name another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    variant = partial / "build" / "torch-universal"
    for folder in (variant, partial / "torch-ext" / PACKAGE.name):
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in sorted(variant.glob("*.py"))}
    metadata = {
        "name": NAME,
        # A module of this name is imported, so that several versions can be loaded at once.
        "id": f"_{PACKAGE.name}_{hashlib.sha256(b''.join(digests.values())).hexdigest()[:7]}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},  # one has to be named; the folder's name is what decides
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (partial / "build.toml").write_text(BUILD_TOML, encoding="utf-8")
    partial.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    try:
        write_hub_kernel(parser.parse_args().out)
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}")

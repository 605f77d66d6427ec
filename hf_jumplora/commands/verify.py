"""Check every file of a stack against the sha256 in stack.json, and stack.json against its own."""

import argparse
from pathlib import Path

from ..stack.load import verify
from ..stack.manifest import read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora verify`."""
    parser.add_argument("stack", help="folder of a stack")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError that names the first file which is missing or damaged."""
    manifest = read_manifest(args.stack)
    for task in manifest.tasks:
        verify(Path(args.stack), task)
    print(f"{args.stack}: {len(manifest.tasks)} tasks, every file is whole")

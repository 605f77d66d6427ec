"""Show what a stack holds: base model, method, tasks."""

import argparse

from ..stack.manifest import read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora inspect`."""
    parser.add_argument("stack", help="folder of a stack")


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    manifest = read_manifest(args.stack)
    print(f"{args.stack}: {len(manifest.tasks)} tasks, method {manifest.method}")
    print(f"base model: {manifest.base_model['name_or_path']} ({manifest.base_model['architecture']})")
    for task in manifest.tasks:
        print(f"  {task['folder']}  {task['name']}")

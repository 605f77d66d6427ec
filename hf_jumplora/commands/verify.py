"""Check every file of a stack: stack.json against its own sha256, all others against those in stack.json.

hf-jumplora verify runs/mine
"""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora verify`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError, which names the first missing or damaged file."""
    from ..stack.load import open_stack
    from ..stack.verify import verify_stack

    if os.path.isdir(args.stack) and args.revision is None:
        manifest, which = verify_stack(args.stack), "all files"
    else:
        manifest, which = open_stack(args.stack, revision=args.revision)[1], "all files that loading needs"
    print(f"{args.stack}: {len(manifest.tasks)} tasks ({', '.join(manifest.task_names)}), {which} are intact")

"""Write a stack of some of the tasks. Their weights and supports are copied byte for byte.

    hf-jumplora subset runs/mine --tasks tickets invoices --out runs/part

metrics.json is not copied, because its scores are those of the whole stack.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora subset`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", required=True, help="tasks to keep")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")


def run(args: argparse.Namespace) -> None:
    """Write the stack and say what it contains."""
    from ..stack.operations import subset

    part = subset(args.stack, args.tasks, args.out, args.revision)
    print(f"{args.out}: {', '.join(part.task_names)}")

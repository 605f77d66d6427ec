"""Write a stack with its tasks in another order, where order does not matter.

    hf-jumplora reorder runs/mine --tasks invoices tickets --out runs/reordered

Order does not matter if no two tasks change the same entry, as with isolation="hard". Otherwise the command refuses:
the sum of updates is rounded in the order of the stack, and a later task was trained on top of the earlier ones.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora reorder`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", required=True, help="all tasks, in the new order")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")


def run(args: argparse.Namespace) -> None:
    """Write the stack and say its order."""
    from ..stack.operations import reorder

    result = reorder(args.stack, args.tasks, args.out, args.revision)
    print(f"{args.out}: {', '.join(result.task_names)}")

"""Write a stack without some tasks.

    hf-jumplora remove runs/mine --tasks tickets --out runs/without_tickets

The result is bit for bit the stack to which their updates were never added. It is not the stack
that would have been trained without them: later tasks were trained on top of them and may depend on them.
Under isolation="hard" the entries of a removed task return to the base model's values, and no other task has used them.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora remove`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", required=True, help="tasks to take out")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")


def run(args: argparse.Namespace) -> None:
    """Write the rest, and say what was removed and what was not."""
    from ..stack.load import open_stack
    from ..stack.operations import remove
    from ..stack.verify import task_description

    _, manifest, gone = open_stack(args.stack, args.tasks, args.revision)
    rest = remove(args.stack, args.tasks, args.out, args.revision)
    names = [task["name"] for task in gone]
    print(f"{args.out}: {', '.join(rest.task_names)}; bit for bit as if {', '.join(names)} had never been added")
    if bare := [t["name"] for t in rest.tasks if task_description(Path(args.out), t).get("reused") in names]:
        print(f"Nothing serves {', '.join(bare)} any more: not trained, because the adapter of a removed task served.")
    first = manifest.task_names.index(names[0])
    later = [name for name in manifest.task_names[first + 1 :] if name not in names]
    if later:
        print(
            f"Not undone: {', '.join(later)} were trained with {names[0]} in place. Their updates are unchanged "
            "and may depend on it; to remove its influence entirely, train them again."
        )

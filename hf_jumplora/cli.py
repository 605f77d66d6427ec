"""`hf-jumplora`: train, evaluate and inspect stacks of adapters. Each command is a module in `commands/`."""

import argparse
import importlib
import sys

import hf_jumplora

from .escape import terminal


# command -> its line in --help; the module of the chosen one alone is imported
COMMANDS = {
    "train": "train on a stream of tasks, configured by a YAML file",
    "report": "write report.html, a page about one run or several",
    "check": "SHIP or DON'T SHIP: whether a run lost more than the limits allow",
    "eval": "evaluate a stack on the tasks of a stream, or of lm-eval",
    "methods": "the names for --method, and the papers they come from",
    "doctor": "what is installed, and what will not work",
    "estimate": "the memory that training needs, per process",
    "bench": "compare methods on a stream of tasks",
    "inspect": "what a stack contains: tasks, densities, overlaps, sizes",
    "verify": "check every file of a stack against its sha256",
    "diff": "what differs between two stacks",
    "subset": "write a stack with some of the tasks",
    "remove": "write a stack without some of the tasks",
    "reorder": "write a stack in another order, where order does not matter",
    "squeeze": "write a stack whose tasks have a lower rank",
    "merge": "write a plain model with the updates merged in",
    "push": "bring a stack on the Hub up to date: one commit and one tag per task",
    "export": "write a LoRA adapter or sparse values for other software",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0, `check` 1 too), or 2 after an error, which is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="hf-jumplora", description="Train, evaluate and inspect runs and stacks of JumpLoRA adapters."
    )
    parser.add_argument("--version", action="version", version=f"hf-jumplora {hf_jumplora.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if argv[:1] == [name]:
            module = importlib.import_module(f"{__package__}.commands.{name}")
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"hf-jumplora: {terminal(' '.join(str(error).split()))}", file=sys.stderr)
        return 2

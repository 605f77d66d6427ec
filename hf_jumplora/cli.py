"""`hf-jumplora`: train, evaluate and inspect stacks of adapters. Each command is a module in `commands/`."""

import argparse
import importlib
import sys
from typing import NoReturn

import hf_jumplora

from .commands import COMMANDS
from .escape import one_line


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, where argparse would print the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, or 1 where `check` or `doctor` says no. An error (2) and an
    interruption (130) are one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        prog="hf-jumplora", description="Train, evaluate and inspect runs and stacks of JumpLoRA adapters."
    )
    parser.add_argument("--version", action="version", version=f"hf-jumplora {hf_jumplora.__version__}")
    chosen = parser
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if argv[:1] == [name]:
            module = importlib.import_module(f"{__package__}.commands.{name}")
            chosen = command
            chosen.description = module.__doc__
            chosen.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(chosen)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        first = {"eval": "; the stack comes first", "train": "; the YAML file comes first"}.get(argv[0], "")
        chosen.error(f"not understood: {' '.join(unknown)}{first}")
    try:
        return module.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"hf-jumplora: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # Ctrl-C says nothing; SIGTERM in a run, what is safe
        print(f"hf-jumplora: {one_line(error) or 'interrupted'}", file=sys.stderr)
        return 130

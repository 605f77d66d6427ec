"""Train the router of a finished stack and put it into the stack (after Brainstacks, arXiv 2604.01152).

On training rows of all tasks it is measured which tasks lower the loss of each; a linear layer learns to tell that from
the prompt alone. Printed are mean losses of these rows without any task, with all, and by the router; what it is worth
shows on others: evaluate with and without it.

    hf-jumplora router runs/demo --stream my_stream.yaml
    hf-jumplora eval runs/demo --stream my_stream.yaml --route learned
"""

import argparse
from dataclasses import dataclass, field


@dataclass
class RouterArguments:
    """How the router is trained."""

    base_model: str | None = field(default=None, metadata={"help": "Folder or Hub id; None: the one the stack names."})
    examples: int = field(default=200, metadata={"help": "Training rows of each task."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer."})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora router`."""
    parser.add_argument("stack", help="folder of a stack")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="`router STACK --help` lists them")


def option_classes() -> tuple[type, ...]:
    """What the options are declared by."""
    from ..options import StreamArguments

    return RouterArguments, StreamArguments


def run(args: argparse.Namespace) -> None:
    """Print a line for each task."""
    from ..options import parse_recipe
    from ..stack.load import find_manifest
    from ..trainer.router import train_router

    options, stream = parse_recipe(option_classes(), args.options, prog="hf-jumplora router STACK")
    if stream.stream is None:
        raise ValueError("--stream is missing: a file, or the name of a shipped one (docs/streams.md)")
    find_manifest(args.stack)  # a wrong folder is named before data is loaded
    rows = train_router(
        args.stack, stream.load(), options.base_model, examples=options.examples, batch_size=options.batch_size,
        max_length=options.max_length,
    )  # fmt: skip
    for name, row in rows.items():
        print(
            f"{name:<24} loss {row['base']:.4f} without any task, {row['stack']:.4f} with all, {row['routed']:.4f} "
            f"routed; {row['tasks']:.1f} tasks act on a row"
        )

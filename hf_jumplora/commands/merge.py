"""Merge a stack into a plain model folder that loads without this package.

    hf-jumplora merge runs/mine --out merged

The base's safetensors files are copied and each adapted weight is rewritten in the copy: base + float32 sum of the
updates, rounded once to the base's dtype. Memory: a few copies of one layer, whatever the size of the model.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora merge`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="some of the tasks; default: all")
    parser.add_argument("--base_model", help="folder or Hub id of the base; default: the one the stack names")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")


def run(args: argparse.Namespace) -> None:
    """Merge, and say where the model is."""
    from ..stack.merge import merge_stack

    layers = merge_stack(args.stack, args.out, args.base_model, args.tasks, args.revision)
    print(f"{args.out}: a plain model; {layers} layers hold the updates")

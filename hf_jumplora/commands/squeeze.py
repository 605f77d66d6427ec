"""Write a stack whose tasks have a lower rank: LoRA-Squeeze (arXiv 2602.10993), after training.

Supports stay as they are; the values change, and the command prints how much. Scores are not copied.

    hf-jumplora squeeze runs/demo --rank 4 --out runs/demo-small
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora squeeze`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")
    parser.add_argument("--rank", type=int, help="rank of every layer, at most its current one")
    parser.add_argument("--prefix", action="store_true", help="the first ranks of nested ones (method dylora)")
    parser.add_argument("--energy", type=float, help="fraction of each layer's ||BA||^2 to keep, e.g. 0.99")
    parser.add_argument("--min-energy", type=float, default=0.9, help="refuse a task that keeps less (default 0.9)")
    parser.add_argument("--force", action="store_true", help="write the stack anyway")


def run(args: argparse.Namespace) -> None:
    """Write the smaller stack, and print ranks and retained energy of each task."""
    from ..stack.squeeze import squeeze

    rows = squeeze(
        args.stack, args.out, args.rank, args.energy, args.revision, args.min_energy, args.force, args.prefix
    )
    for name, layers in rows.items():
        ranks, kept = [rank for rank, _ in layers.values()], [energy for _, energy in layers.values()]
        span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        print(f"{name:<24} rank {span:<8} retained energy of a layer: {min(kept):.2%} to {max(kept):.2%}")
    print(f"{args.out}: a stack of {len(rows)} tasks")

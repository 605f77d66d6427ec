"""Say what differs between two stacks: base, method, tasks, and how far apart tasks of the same name are.

hf-jumplora diff runs/mine runs/last_month
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora diff`."""
    parser.add_argument("first", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("second", help="folder of another stack, or a repository on the Hub")


def run(args: argparse.Namespace) -> None:
    """Print the differences, one per line."""
    from ..stack.operations import diff

    result = diff(args.first, args.second)
    first, second = result["method"]
    lines = ["base model: different"] if result["base"] else []
    if first != second:
        lines.append(f"method: {first} / {second}")
    lines += [f"only in {args.first}: {name}" for name in result["only_first"]]
    lines += [f"only in {args.second}: {name}" for name in result["only_second"]]
    if result["order"]:
        lines.append("order: different")
    for name, row in result["tasks"].items():
        if row["same"]:
            continue
        if row["kept"] is None:
            lines.append(f"{name}: adapts different layers")
        else:
            change = "-" if row["update"] is None else f"{row['update']:.3g}"
            lines.append(f"{name}: update differs by {change} of its norm, supports agree in {row['kept']:.1%}")
    print("\n".join(lines) or "no difference: both compute the same")

"""List the methods: their names for `--method`, how their adapters follow one another, and the papers they come from.

hf-jumplora methods
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora methods`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from ..methods import METHODS

    rows = [
        {"name": name, "gate": method.adapter.get("gate") is True, "mode": method.mode, "paper": method.paper}
        for name, method in METHODS.items()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']:<16} {'gated' if row['gate'] else 'dense':<6} {row['mode']:<12} {row['paper']}")

"""List the methods: their names for `--method`, how their adapters follow one another, the papers they come from, and
what `--strategy` can set.

    hf-jumplora methods
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora methods`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from ..methods import METHODS, strategy_name

    rows: list[dict[str, Any]] = [
        {
            "name": name, "gate": method.adapter.get("gate") is True, "mode": method.mode, "paper": method.paper,
            "options": [f"{strategy_name(make)}.{option}" for make in method.strategies for option in _options(make)],
        }
        for name, method in METHODS.items()
    ]  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']:<18} {'gated' if row['gate'] else 'dense':<6} {row['mode']:<12} {row['paper']}")
        if row["options"]:
            print(f"{'':<18} --strategy {', '.join(row['options'])}")


def _options(make: Callable[..., Any]) -> list[str]:
    strategy = make()
    return [f.name for f in dataclasses.fields(strategy) if f.init] if dataclasses.is_dataclass(strategy) else []

"""SHIP or DON'T SHIP: whether a run lost more than the limits allow, and why. Exit code 0, 1, or 2 after an error.

    hf-jumplora check runs/mine --against runs/last_month --max_forgetting 3

With stored predictions it counts the rows that went from right to wrong, and a paired test on the same rows (McNemar,
exact) says whether a difference is more than noise. Whatever was not measured is listed and does not affect
the verdict.
"""

import argparse
import json
from dataclasses import fields
from typing import Any

from ..report.folder import read_run
from ..report.verdict import Limits, judge, verdict_text
from ..schema import read_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora check`."""
    parser.add_argument("run", help="output_dir of a run")
    parser.add_argument("--against", metavar="RUN", help="another run on the same tasks")
    parser.add_argument(
        "--limits", metavar="YAML", help="a file with the limits below as keys; options take precedence"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    for item in fields(Limits):
        names = [f"--{item.name}", *([f"--{item.name.replace('_', '-')}"] if "_" in item.name else [])]
        parser.add_argument(*names, type=float, metavar="X", help=f"{item.metadata['help']} (default {item.default:g})")


def run(args: argparse.Namespace) -> int:
    """Print the verdict; returns the exit code."""
    given = {item.name: value for item in fields(Limits) if (value := getattr(args, item.name)) is not None}
    limits = Limits(**{**(_read_limits(args.limits) if args.limits else {}), **given})
    result = judge(read_run(args.run), read_run(args.against) if args.against else None, limits)
    print(json.dumps(result, indent=2) if args.json else verdict_text(result))
    return 0 if result["ship"] else 1


def _read_limits(path: str) -> dict[str, Any]:
    values = read_yaml(path)[0] or {}
    known = [item.name for item in fields(Limits)]
    if not isinstance(values, dict) or set(values) - set(known):
        raise ValueError(f"{path}: expected keys of {', '.join(known)}")
    return values

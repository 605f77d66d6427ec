"""Write report.html: one self-contained page about one run, or several runs side by side.

hf-jumplora report runs/mine runs/last_month --output compare.html
"""

import argparse
from pathlib import Path

from ..report.folder import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first run's folder")


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    from ..report.page import write_page

    path = Path(args.output) if args.output else Path(args.runs[0]) / "report.html"
    write_page(path, [read_run(run) for run in args.runs])
    print(path)

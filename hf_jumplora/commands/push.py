"""Push every task that the repository on the Hub lacks: one commit and one tag each.

    hf-jumplora push runs/mine --repo me/stack

The token is taken from HF_TOKEN or from `hf auth login`.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora push`."""
    parser.add_argument("stack", help="folder of a stack")
    parser.add_argument("--repo", help="owner/name; default: where the folder was pushed before")
    parser.add_argument("--revision", default=None, help="branch; default: main, or the branch used before")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--template", help="a Jinja file to use instead of the packaged model_card_template.md")


def run(args: argparse.Namespace) -> None:
    """Raises what [`push_stack`] raises, and ValueError if no repository is known."""
    from ..hub.push import RECORD, push_stack, read_record

    record = Path(args.stack) / RECORD
    before = read_record(record) if record.is_file() else {}
    repo = args.repo or before.get("repo_id")
    if repo is None:
        raise ValueError(f"{args.stack} has never been pushed: give --repo owner/name")
    revision = args.revision or (before.get("revision") if repo == before.get("repo_id") else None) or "main"
    pushed = push_stack(args.stack, repo, private=args.private, revision=revision, template=args.template)
    print(f"{repo} ({revision}) holds {len(pushed)} tasks: {', '.join(pushed)}")

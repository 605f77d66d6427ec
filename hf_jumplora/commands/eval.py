"""Evaluate a stack on the tasks of a stream: the accuracy, or the task's own measure, of each.

    hf-jumplora eval runs/mine --stream my_stream.yaml --max_eval 200

The updates are merged into the base model first. Of plain text the cross-entropy in nats a token is given too.
"""

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

from ..options import StreamArguments, parse_recipe


@dataclass
class EvalArguments:
    """What is evaluated, and how."""

    tasks: list[str] | None = field(default=None, metadata={"help": "Some of the stack's tasks; None: all of them."})
    base_model: str | None = field(default=None, metadata={"help": "Folder or Hub id; None: the one the stack names."})
    revision: str | None = field(default=None, metadata={"help": "Of the repository; tag task-002: after that task."})
    eval_mode: str = field(default="generate", metadata={"help": "'generate' (greedy answers) or 'score' (labels)."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})

    def __post_init__(self):
        if self.eval_mode not in ("generate", "score"):
            raise ValueError(f"eval_mode is 'generate' or 'score', got {self.eval_mode!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora eval`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="`eval STACK --help` lists them")


def merged_and_encoder(
    stack: str, base_model: str | None, tasks: list[str] | None, revision: str | None, max_length: int = 512
) -> tuple[Any, Any]:
    """(base model with a stack's updates merged in, [`Encoder`] with its tokenizer and at most `max_length` tokens).

    Raises:
        ValueError, OSError: as `load_stack`.
    """
    from transformers import AutoTokenizer

    from ..data import Encoder
    from ..stack.load import load_stack, open_stack

    _, manifest, _ = open_stack(stack, tasks, revision)
    model: Any = load_stack(stack, base_model, tasks, revision, merge=True)
    named = {} if base_model else {"revision": manifest.base_model["revision"]}
    tokenizer = AutoTokenizer.from_pretrained(base_model or manifest.base_model["name_or_path"], **named)
    length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    return model, Encoder(tokenizer, length, model.config.is_encoder_decoder)


def run(args: argparse.Namespace) -> None:
    """Print the scores, a line for each task."""
    from ..data import LanguageModelTask, TextTask
    from ..trainer.scoring import evaluate_task, evaluate_text

    options, stream = parse_recipe((EvalArguments, StreamArguments), args.options, prog="hf-jumplora eval STACK")
    if stream.stream is None:
        raise ValueError("--stream is missing: a file, or the name of a shipped one (docs/streams.md)")
    tasks = [task for task in stream.load() if task.eval_dataset is not None]
    if not tasks:
        raise ValueError(f"{stream.stream}: no task has an eval set")
    model, encoder = merged_and_encoder(
        args.stack, options.base_model, options.tasks, options.revision, options.max_length
    )
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        if isinstance(task, LanguageModelTask):
            accuracy, loss = evaluate_text(model, encoder, task, options.batch_size)
            scores[task.name] = {task.metric: accuracy, "cross_entropy": loss}
        elif isinstance(task, TextTask):
            score = evaluate_task(model, encoder, task, options.eval_mode, options.batch_size)
            scores[task.name] = {task.metric: score}
        if not options.json:
            shown = [
                f"{k} {v:.4f}" if k == "cross_entropy" else f"{k} {100 * v:.1f} %" for k, v in scores[task.name].items()
            ]
            print(f"{task.name:<24} {', '.join(shown)}", flush=True)
    if options.json:
        print(json.dumps(scores, indent=2))

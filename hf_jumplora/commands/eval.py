"""Evaluate a stack on the tasks of a stream, or on tasks of lm-eval: accuracy, or each task's own measure.

    hf-jumplora eval runs/mine --stream my_stream.yaml --max_eval 200
    hf-jumplora eval runs/mine --lm_eval hellaswag arc_easy --limit 200 --each_task

The updates are merged into the base model first; with `--route learned` the stack's router chooses among them for each
prompt. Plain text also gets its cross-entropy in nats per token. Tasks of lm-eval (extra `eval`) are evaluated on the
base model too and, with `--each_task`, on the model after each task; one model is in memory at a time. The scores
of a whole run are kept in its lm_eval.json, and its report.html shows them.
"""

import argparse
import functools
import gc
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..report.folder import HARNESS


@dataclass
class EvalArguments:
    """What to evaluate, and how."""

    tasks: list[str] | None = field(default=None, metadata={"help": "Some of the stack's tasks; None: all of them."})
    base_model: str | None = field(default=None, metadata={"help": "Folder or Hub id; None: the one the stack names."})
    revision: str | None = field(default=None, metadata={"help": "Of the repository; tag task-002: after that task."})
    route: str | None = field(default=None, metadata={"help": "'learned': by the stack's router, not merged."})
    eval_mode: str = field(default="generate", metadata={"help": "'generate' (greedy answers) or 'score' (labels)."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer."})
    lm_eval: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-eval, by name."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with lm-eval tasks of your own (YAML)."})
    limit: int | None = field(default=None, metadata={"help": "At most this many rows of each lm-eval task."})
    each_task: bool = field(default=False, metadata={"help": "lm-eval after each of the tasks, not only the last."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})

    def __post_init__(self):
        if self.eval_mode not in ("generate", "score"):
            raise ValueError(f"eval_mode is 'generate' or 'score', got {self.eval_mode!r}")
        if not self.lm_eval and (self.include_path is not None or self.limit is not None or self.each_task):
            raise ValueError("--include_path, --limit and --each_task are for --lm_eval (rows of a stream: --max_eval)")
        if self.lm_eval and self.route is not None:
            raise ValueError("--route goes with --stream alone: lm-eval gives the model prompt and answer as one text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora eval`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="`eval STACK --help` lists them")


def option_classes() -> tuple[type, ...]:
    """What the options are declared by."""
    from ..options import StreamArguments

    return EvalArguments, StreamArguments


def merged_and_encoder(
    stack: str,
    base_model: str | None,
    tasks: list[str] | None,
    revision: str | None,
    max_length: int = 512,
    route: str | None = None,
) -> tuple[Any, Any]:
    """(base model with a stack's updates merged in, routed or competing, [`Encoder`] with its tokenizer and at most
    `max_length` tokens).

    Raises:
        ValueError, OSError: as `load_stack`.
    """
    from transformers import AutoTokenizer

    from ..data import Encoder
    from ..stack.load import load_stack, named_base, open_stack

    _, manifest, _ = open_stack(stack, tasks, revision)
    merge = route is None and not manifest.competing
    model: Any = load_stack(stack, base_model, tasks, revision, merge=merge, route=route)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ValueError(
            f"{stack} stands on a {type(model).__name__}, and text tasks are scored with language models: evaluate it "
            "with a Trainer of your own"
        )
    named = {} if base_model else {"revision": manifest.base_model["revision"]}
    tokenizer = AutoTokenizer.from_pretrained(base_model or named_base(manifest, stack), **named)
    length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    return model, Encoder(tokenizer, length, model.config.is_encoder_decoder)


def harness(model: Any, encoder: Any, options: EvalArguments) -> dict[str, float]:
    """{"task metric": score} of a model on the tasks `options.lm_eval`, evaluated by lm-eval.

    Raises:
        ValueError: lm-eval does not know one of the tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = options.lm_eval or []
    manager = _task_manager(tuple(names), options.include_path)
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    lm = HFLM(
        model, backend=backend, tokenizer=encoder.tokenizer, max_length=encoder.max_length,
        batch_size=options.batch_size,
    )  # fmt: skip
    found = simple_evaluate(
        lm, tasks=names, limit=options.limit, task_manager=manager, log_samples=False, bootstrap_iters=0
    )
    return {
        f"{task} {key.removesuffix(',none')}": value
        for task, scores in found["results"].items()
        for key, value in scores.items()
        if isinstance(value, float) and "_stderr," not in key
    }


@functools.cache
def _task_manager(names: tuple[str, ...], include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    for everything in (False, True):  # the index of lm-eval's own tasks takes a quarter of a minute
        manager = TaskManager(include_path=include_path, include_defaults=everything)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise ValueError(f"lm-eval has no task {', '.join(unknown)}; --include_path DIR finds tasks of your own")


def run(args: argparse.Namespace) -> None:
    """Print the scores, a line for each task."""
    from ..options import parse_recipe
    from ..stack.load import find_manifest

    options, stream = parse_recipe(option_classes(), args.options, prog="hf-jumplora eval STACK")
    if stream.stream is None and not options.lm_eval:
        raise ValueError("--stream is missing: a file, or the name of a shipped one (docs/streams.md); or --lm_eval")
    if options.lm_eval and find_spec("lm_eval") is None:
        raise ValueError("--lm_eval needs lm-eval: pip install lm-eval")
    _, manifest = find_manifest(args.stack, options.revision)
    if options.each_task and (manifest.separate or manifest.competing or not manifest.additive):
        raise ValueError(
            f"--each_task adds up the updates of the tasks, which is not how {manifest.method!r} makes its models; "
            "evaluate the stack without it"
        )
    tasks = [task for task in stream.load() if task.eval_dataset is not None] if stream.stream else []
    if stream.stream and not tasks:
        raise ValueError(f"{stream.stream}: no task has an eval set")
    model, encoder = merged_and_encoder(
        args.stack, options.base_model, options.tasks, options.revision, options.max_length, options.route
    )
    scores = _stream_scores(model, encoder, tasks, options)
    if options.lm_eval:
        after = harness(model, encoder, options)
        del model  # the base is loaded next: one model in memory at a time
        gc.collect()
        scores |= _harness_scores(args.stack, after, encoder, options)
    if options.json:
        print(json.dumps(scores, indent=2))


def _stream_scores(model: Any, encoder: Any, tasks: list, options: EvalArguments) -> dict[str, dict[str, float]]:
    from ..data import LanguageModelTask, TextTask
    from ..trainer.scoring import evaluate_task, evaluate_text

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
    return scores


def _harness_scores(
    stack: str, after: dict[str, float], encoder: Any, options: EvalArguments
) -> dict[str, dict[str, Any]]:
    """{"task metric": {"base", "stack"}} by lm-eval, and "each", the scores after each task, if asked for; saved in
    the run's folder if all its tasks were evaluated.

    after: the scores of the stack.
    """
    from ..disk import write_json
    from ..stack.load import load_base, load_stack, open_stack

    folder, manifest, chosen = open_stack(stack, options.tasks, options.revision)
    names = [task["name"] for task in chosen]
    before = harness(load_base(manifest, options.base_model, str(folder)), encoder, options)
    scores: dict[str, dict[str, Any]] = {key: {"base": before[key], "stack": after[key]} for key in after}
    if options.each_task:
        each = []
        for n in range(1, len(names)):
            gc.collect()  # the model before
            model = load_stack(stack, options.base_model, names[:n], options.revision, merge=True)
            each.append(harness(model, encoder, options))
            del model
        for key, row in scores.items():
            row["each"] = [found[key] for found in [*each, after]]
    if not options.json:
        for key, row in scores.items():
            print(f"{key:<40} {row['base']:.4f} before training, {row['stack']:.4f} with the stack")
            for name, score in zip(names, row.get("each", []), strict=False):
                print(f"  after {name:<32} {score:.4f}")
    if options.tasks is None and (Path(stack) / "metrics.json").is_file():
        from ..report.folder import read_run
        from ..report.page import write_page

        write_json(Path(stack) / HARNESS, {"after": len(manifest.tasks), "limit": options.limit, "scores": scores})
        write_page(Path(stack) / "report.html", [read_run(stack)])
    return scores

"""Export a stack for software that does not know this package.

    hf-jumplora export runs/mine --format lora --rank 16 --out exported

--format lora: the sum of the tasks' masked updates as a plain LoRA adapter of best rank k (randomised SVD). This is
an approximation: the retained energy of each layer is printed, and with --stream the change in accuracy.
--format sparse: the values of the sum and their columns, row by row, in one safetensors file.
"""

import argparse
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora export`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="some of the tasks; default: all")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")
    parser.add_argument("--format", choices=("lora", "sparse"), required=True)
    parser.add_argument("--rank", type=int, help="lora: rank of every layer")
    parser.add_argument("--energy", type=float, help="lora: fraction of each layer's ||update||^2 to keep, e.g. 0.99")
    parser.add_argument("--min-energy", type=float, default=0.9, help="lora: refuse to keep less overall (default 0.9)")
    parser.add_argument("--force", action="store_true", help="lora: write it anyway")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="sparse: of the values"
    )
    parser.add_argument("--stream", help="lora: stream file; its eval sets show what the export costs")
    parser.add_argument("--data_dir", help="lora: folder with the stream's data")
    parser.add_argument("--max_eval", type=int, help="lora: at most this many eval rows per task")
    parser.add_argument("--base_model", help="lora with --stream: folder or Hub id of the base")


def run(args: argparse.Namespace) -> None:
    """Export, and print what it costs.

    Raises:
        ValueError: options of the other format, or as `export_lora` and `export_sparse`.
    """
    import torch

    from ..stack.export import export_lora, export_sparse

    of_stream = [name for name in ("data_dir", "max_eval", "base_model") if getattr(args, name) is not None]
    if args.format == "sparse":
        given = [*of_stream, *(name for name in ("rank", "energy", "stream") if getattr(args, name) is not None)]
        if given or args.force:
            raise ValueError(f"--{(given or ['force'])[0]} has no meaning for --format sparse")
        sizes = export_sparse(args.stack, args.out, args.tasks, args.revision, getattr(torch, args.dtype))
        print(
            f"{args.out}/sparse.safetensors: {int(sizes['kept']):,} values, {int(sizes['bytes']):,} bytes, "
            f"{sizes['bytes_per_nonzero']:.2f} bytes per value"
        )
        return
    if of_stream and not args.stream:
        raise ValueError(f"--{of_stream[0]} has no meaning without --stream")
    scores = _prepare(args) if args.stream else None
    rows = export_lora(
        args.stack, args.out, args.rank, args.energy, args.tasks, args.revision, args.min_energy, args.force
    )
    for layer, (rank, energy) in rows.items():
        print(f"{layer:<50} rank {rank:>4}  retained energy {energy:.4%}")
    for name, before, after in scores() if scores else ():
        print(
            f"{name:<24} accuracy {100 * before:.2f} % with the stack, {100 * after:.2f} % with the LoRA export "
            f"({100 * (after - before):+.2f})"
        )
    print(f"{args.out}: a LoRA adapter for stock PEFT")


def _prepare(args: argparse.Namespace) -> Callable[[], list[tuple[str, float, float]]]:
    """A function for after the export: (task, accuracy of the stack, accuracy of the export) of each task with an eval
    set. What can be wrong with stream, base and texts shows here, before anything is written."""
    from peft import PeftModel

    from ..data import TextTask, load_tasks
    from ..stack.load import load_base, open_stack
    from ..trainer.scoring import evaluate_task
    from .eval import merged_and_encoder

    # All training rows: where the stream lists no labels, they are those of these rows.
    stream = load_tasks(args.stream, args.data_dir, max_eval=args.max_eval)
    tasks = [task for task in stream if isinstance(task, TextTask) and task.eval_dataset]
    if not tasks:
        raise ValueError(f"{args.stream}: no task with answers has an eval set")
    folder, manifest, _ = open_stack(args.stack, args.tasks, args.revision)
    model, encoder = merged_and_encoder(args.stack, args.base_model, args.tasks, args.revision)
    for task in tasks:
        for row in task.eval_dataset:
            encoder.prompt_ids(task, row[task.text_column])

    def scores() -> list[tuple[str, float, float]]:
        before = [evaluate_task(model, encoder, task, "score", 8) for task in tasks]
        lora = PeftModel.from_pretrained(load_base(manifest, args.base_model, str(folder)), args.out).eval()
        after = [evaluate_task(lora, encoder, task, "score", 8) for task in tasks]
        return [(task.name, a, b) for task, a, b in zip(tasks, before, after, strict=True)]

    return scores

"""Estimate the memory of a training run, per process (GPU), under DDP, ZeRO, FSDP2 and over a 4-bit base.

    hf-jumplora estimate llama-2-7b --processes 8

MODEL is llama-2-7b, llama-2-13b, llama-2-70b, a folder or a Hub id; only its config.json is read. Weights
and activations are counted by running the model's code without weights. Not counted: the CUDA context and
fragmentation (1 to 2 GiB), and evaluation (generating keeps keys and values of all tokens of a batch).
"""

import argparse
import json

from ..schema import UNDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora estimate`."""
    parser.add_argument("model", help="llama-2-7b, llama-2-13b, llama-2-70b, a folder, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository")
    parser.add_argument("--processes", type=int, default=1, help="GPUs in all (default 1)")
    parser.add_argument("--batch", type=int, default=8, help="per_device_train_batch_size (default 8)")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default 512)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--method", default="jumplora", help="one that trains an adapter per task: jumplora, inclora, ella, kfac, ..."
    )
    parser.add_argument("--r", type=int, default=8, help="rank (default 8)")
    parser.add_argument("--target_modules", nargs="+", help="adapted layers; default: query and value; or all-linear")
    parser.add_argument("--isolation", choices=("none", "hard"), help="default: the method's")
    parser.add_argument("--tasks", type=int, default=0, help="finished tasks below the one in training (default 0)")
    parser.add_argument("--density", type=float, help="a task's; default: as many entries as A and B have parameters")
    parser.add_argument("--under", nargs="+", choices=UNDER, default=list(UNDER), help="default: all")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: a number that cannot be, or as `estimate`.
    """
    import torch

    from ..memory import Plan, estimate, model_config
    from ..methods import get_method

    for name, least in (("processes", 1), ("batch", 1), ("length", 2), ("tasks", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is at least {least}, got {getattr(args, name)}")
    if args.density is not None and not 0 < args.density <= 1:
        raise ValueError(f"--density is a fraction between 0 and 1, got {args.density}")
    targets = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    method = get_method(args.method)
    adapter = method.adapter_config({"r": args.r, "target_modules": targets, "isolation": args.isolation})
    if args.density is None:
        args.density = adapter.target_density
    plan = Plan(
        args.processes, args.batch, args.length, getattr(torch, args.dtype), args.gradient_checkpointing, args.tasks,
        args.density, args.method,
    )  # fmt: skip
    config = model_config(args.model, args.revision)
    rows = {name: row for name, row in estimate(config, adapter, plan).items() if name in args.under}
    print(json.dumps(rows, indent=2) if args.json else text(args, rows))


def text(args: argparse.Namespace, rows: dict[str, dict[str, int]]) -> str:
    """The table for a terminal, in GiB."""
    how = ", gradient checkpointing" if args.gradient_checkpointing else ""
    columns = list(next(iter(rows.values())))
    lines = [
        f"{args.model}, {args.dtype}, {args.method} after {args.tasks} tasks, {args.processes} processes, "
        f"{args.batch} x {args.length} tokens each{how}",
        "GiB per process; host: CPU memory per process, in addition",
        "",
        f"{'':<13}" + "".join(f"{column:>12}" for column in columns),
    ]
    for name, row in rows.items():
        lines.append(f"{name:<13}" + "".join(f"{row[column] / 2**30:>12.2f}" for column in columns))
    return "\n".join(lines)

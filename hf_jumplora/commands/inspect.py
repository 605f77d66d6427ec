"""Show what a stack contains: base model, method, tasks, densities, sizes, and how much the tasks overlap.

    hf-jumplora inspect runs/mine

Overlap of two tasks: |Si & Sj| / min(|Si|, |Sj|), Si the entries that task i changes.
Sizes: the adapter's file, compared with a float32 LoRA adapter of the same rank plus the encoded support.
"""

import argparse
import json
from typing import Any

from ..metrics import overlap


SHADES = " ░▒▓█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora inspect`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    result = describe(args.stack, args.revision)
    print(json.dumps(result, indent=2) if args.json else text(result))


def describe(path: str, revision: str | None = None) -> dict[str, Any]:
    """What `inspect` shows, as JSON can hold it."""
    from ..stack.operations import open_tasks, shared_entries

    _, manifest, tasks = open_tasks(path, None, revision)
    shared, entries = shared_entries(tasks)
    kept = shared.diagonal().tolist()
    rows = [{"name": task.name, "folder": task.folder, "r": task.config.r, **task.sizes()} for task in tasks]
    return {
        "stack": str(path),
        "base_model": {k: manifest.base_model[k] for k in ("name_or_path", "revision", "architecture")},
        "method": manifest.method,
        "additive": manifest.additive,
        "separate": manifest.separate,
        "competing": manifest.competing,
        "layers": len(manifest.base_model["layers"]),
        "entries": entries,
        "tasks": [{**row, "density": k / entries} for row, k in zip(rows, kept, strict=True)],
        "overlap": [
            [overlap(n, kept[i], kept[j]) for j, n in enumerate(line)] for i, line in enumerate(shared.tolist())
        ],
    }


def text(result: dict[str, Any]) -> str:
    """The description for a terminal."""
    base, tasks = result["base_model"], result["tasks"]
    revision = f", revision {base['revision']}" if base["revision"] else ""
    lines = [
        f"{result['stack']}: {len(tasks)} tasks, method {result['method']}"
        + (" (each folder is a separate model for its task)" if result["separate"] else "")
        + (" (the ranks of all tasks compete for each token)" if result["competing"] else "")
        + ("" if result["additive"] or result["separate"] else " (each folder holds the whole model after its task)"),
        f"base model: {base['name_or_path'] or '(no name)'} ({base['architecture']}{revision})",
        f"{result['layers']} adapted layers, {result['entries']:,} entries",
        "",
        "task                        r  density     file KiB  / LoRA + support  support / entropy",
    ]
    for number, task in enumerate(tasks):
        ratio = task["file"] / (task["factors"] + task["support"])
        code = f"{task['support'] / task['entropy']:.2f}" if task["entropy"] else "-"
        lines.append(
            f"{number:>3}  {task['name'][:20]:<20} {task['r']:>4} {100 * task['density']:>7.2f}%"
            f" {task['file'] / 1024:>12,.1f} {ratio:>17.3f} {code:>18}"
        )
    if len(tasks) > 1:
        lines += ["", f"overlap (' ' under 20 %, then {', '.join(SHADES[1:])} for each 20 % more)", ""]
        lines.append("     " + " ".join(f"{j:>3}" for j in range(len(tasks))))
        for i, row in enumerate(result["overlap"]):
            cells = " ".join(SHADES[min(4, int(5 * value))] * 3 for value in row)
            lines.append(f"{i:>3}  {cells}  {tasks[i]['name'][:20]}")
        if len(tasks) <= 12:
            lines.append("")
            lines += [
                f"{i:>3}  " + " ".join(f"{100 * value:>5.1f}" for value in row[:i])
                for i, row in enumerate(result["overlap"])
                if i
            ]
    return "\n".join(lines)

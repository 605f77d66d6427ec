"""`make bench`: the settings of docs/performance.md (about 5 minutes on 2 cores), then a table and a plot of them.

python benchmarks/run.py [--rounds 7] [--table]      --table: no measurements, only the table and the plot
"""

import argparse
import json
from pathlib import Path

import layer
import pieces
import torch
from common import RESULTS


COLUMNS = ("size", "hidden", "r", "tokens", "mix", "density", "dtype", "entries")


def measure(rounds: int) -> None:
    """The default settings."""
    layer.run(4096, 8, 512, 0.7, 0.02, "float32", rounds)
    for mix, density in ((0.0, 0.02), (1.0, 0.004), (1.0, 0.016), (1.0, 0.1)):
        layer.run(4096, 8, 512, mix, density, "float32", rounds, only=("frozen", "lora", "blocked"))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        layer.run(4096, 8, 512, 0.7, 0.02, "bfloat16", rounds)
    else:
        print("bf16 is left out: this CPU has no bf16 products, and torch's emulation takes minutes for one layer")
    for density in (0.05, 0.08, 0.13, 1.0):
        pieces.penalty(density, rounds)
    pieces.quantile(rounds)
    pieces.model(rounds)
    layer.memory()


def table() -> str:
    """Markdown: the latest row of every benchmark, setting and provider."""
    latest: dict[tuple, dict] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        key = (row["benchmark"], *(row.get(column) for column in COLUMNS), row.get("provider"))
        latest.pop(key, None)
        latest[key] = row
    lines = [
        "| benchmark | setting | provider | median ms [min, max] | ratio [min, max] | against | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    memory = [
        "",
        "| one step's memory, setting | provider | peak growth MiB | kept for backward MiB |",
        "|---|---|---|---|",
    ]
    for row in latest.values():
        setting = ", ".join(f"{c} {row[c]}" for c in COLUMNS if c in row)
        if row["benchmark"] == "memory":
            memory.append(f"| {setting} | {row['provider']} | {row['peak_mib']} | {row['saved_mib']} |")
        elif "min_ms" in row:
            lines.append(
                f"| {row['benchmark']} | {setting} | {row['provider']} | {row['median_ms']:.1f} "
                f"[{row['min_ms']:.1f}, {row['max_ms']:.1f}] | {row['ratio']:.2f} "
                f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}] | {row['baseline']} | {row['commit']} |"
            )
    return "\n".join(lines + memory) + "\n"


def plot(path: Path) -> None:
    """Bars of the layer's latest settings against the frozen layer. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, dict[str, float]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        shown = row["benchmark"] == "layer" and "density" in row  # those of a GPU have a table of their own
        if shown and row["baseline"] == "frozen" and row["size"] == 4096 and row["r"] == 8:
            title = f"{row['dtype']}\nf = {row['mix']:g}, {100 * row['density']:g} %"
            groups.setdefault(title, {})[row["provider"]] = row["ratio"]
    figure, axes = plt.subplots(figsize=(9, 4))
    providers = list(dict.fromkeys(p for ratios in groups.values() for p in ratios))
    for number, provider in enumerate(providers):
        bars = [(i, ratios[provider]) for i, ratios in enumerate(groups.values()) if provider in ratios]
        offset = 0.8 * ((number + 0.5) / len(providers) - 0.5)
        axes.bar([i + offset for i, _ in bars], [v for _, v in bars], 0.8 / len(providers), label=provider)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel("time / frozen layer")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        measure(args.rounds)
    folder = Path(__file__).parent
    (folder / "table.md").write_text(table())
    print(table())
    try:
        plot(folder.parent / "docs" / "performance.png")
    except ImportError:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()

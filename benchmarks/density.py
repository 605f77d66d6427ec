"""What the published threshold does to the density, and what a held density does to accuracy: a small study.

    python benchmarks/density.py --data_dir CL_BENCHMARK --output_dir runs/density

Runs recipes/encoder_cl.py on order 1 once per setting (finished ones are not repeated) and prints a Markdown table:
density after each task, average accuracy, backward transfer and collision of the last two tasks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
HELD = ["--threshold_update", "density", "--target_density"]
SETTINGS = {
    "published": [],
    "held at 5 %": [*HELD, "0.05"],
    "held at 5 % of each layer": [*HELD, "0.05", "--threshold_scope", "layer"],
    "held at 1 %": [*HELD, "0.01"],
    "held at 20 %": [*HELD, "0.2"],
    "50 % to 5 %, cubic": [*HELD, "0.05", "--initial_density", "0.5", "--density_schedule", "cubic"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="Folder in the layout of the CL benchmark (SC/, TC/, ...).")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=60, help="Optimizer steps a task.")
    parser.add_argument("--batch", type=int, default=32, help="Examples a step.")
    parser.add_argument("--max_eval", type=int, default=200, help="Test examples a task.")
    parser.add_argument("--max_length", type=int, default=512, help="Tokens of a text.")
    args = parser.parse_args()
    print("| setting | density after each task, % | AA, % | BWT, points | collision of the last two, % |")
    print("|---|---|---|---|---|", flush=True)
    for name in args.settings:
        folder = args.output_dir / name.replace(" ", "_").replace("%", "percent").replace(",", "")
        command = [
            sys.executable, str(ROOT / "recipes/encoder_cl.py"), "--stream", str(ROOT / "recipes/streams/order1.yaml"),
            "--data_dir", args.data_dir, "--output_dir", str(folder), "--method", "jumplora", "--eval_tasks", "seen",
            "--max_train", str(args.batch * args.steps), "--max_eval", str(args.max_eval),
            "--max_length", str(args.max_length), "--per_device_train_batch_size", str(args.batch),
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant",
            "--num_train_epochs", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true",
            *SETTINGS[name],
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        result = json.loads((folder / "metrics.json").read_text())
        densities = " / ".join(f"{100 * task['density']:.1f}" for task in result["trained"])
        print(
            f"| {name} | {densities} | {100 * result['average_accuracy']:.1f} | "
            f"{100 * result['backward_transfer']:+.1f} | {100 * result['trained'][-1]['collision'][-1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

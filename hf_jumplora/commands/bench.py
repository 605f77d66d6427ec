"""Compare methods on a stream: same data, prompts, seeds and effective batch, tuned by one protocol (docs/bench.md).

    hf-jumplora bench --stream my_stream.yaml --methods inclora jumplora-best --seeds 3 --output_dir runs/bench

Each run is a separate process and one file below OUTPUT_DIR/cells. After an interruption the same command continues
where it stopped; it may then name more methods or seeds. table.md, results.json and accuracy.png are updated after
every run.
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora bench`."""
    parser.add_argument("--stream", required=True, help="a stream file, or the name of a shipped one (order1, ...)")
    parser.add_argument("--output_dir", required=True, type=Path, help="where cells, table and plot are written")
    parser.add_argument("--data_dir", help="folder with the data; without it: as the stream says")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help="names of methods; default: all of them (many hours)"
    )
    parser.add_argument("--variants", type=Path, help="YAML file of methods with other options, for ablations")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (3)")
    parser.add_argument(
        "--budget",
        default="small",
        help="small (default; texts of 32 tokens), untuned-gpu-256, or another of docs/bench.md",
    )
    parser.add_argument("--setting", default="encoder", help="encoder (a sentence encoder, default), causal or smollm2")
    parser.add_argument("--model_name_or_path", help="folder or Hub id; without it: all-MiniLM-L6-v2, or a tiny Llama")
    parser.add_argument("--prompt_style", help="jumplora or olora (data set named in the prompt); no encoder")
    parser.add_argument("--held_out", nargs="+", metavar="NAME", help="tasks that are evaluated but never trained on")
    parser.add_argument("--general_text", help="text that belongs to no task: a file, or a Hub data set; no encoder")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--threads", type=int, help="threads per run (default: cores divided by jobs)")
    parser.add_argument("--prefix", default="", help="words to put before each run's command, such as 'nice -n 5'")
    parser.add_argument("--retry_failed", action="store_true", help="repeat runs that ended with an error")


def run(args: argparse.Namespace) -> None:
    """Run what is missing and print the table."""
    from ..bench.protocol import chosen_methods, read_variants
    from ..bench.runner import Bench

    variants = read_variants(args.variants) if args.variants else {}
    methods = chosen_methods(args.methods, variants)
    if args.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {args.seeds}")
    bench = Bench(
        args.stream, args.output_dir, args.data_dir, args.budget, args.setting, args.model_name_or_path,
        args.prompt_style, args.held_out, args.general_text, args.jobs, args.threads, args.prefix, variants,
    )  # fmt: skip
    print(bench.run(methods, args.seeds, args.retry_failed))
    finals = [bench.cells / f"final-{method}-s{seed}.json" for method in methods for seed in range(args.seeds)]
    errors = [json.loads(path.read_text())["error"] for path in finals]
    if all(errors):
        raise ValueError(f"no run ended well: {errors[0]}")

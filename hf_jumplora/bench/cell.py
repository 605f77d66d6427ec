"""One run of a bench, in a process of its own: `python -m hf_jumplora.bench.cell SPEC.json`.

The spec says what to run and which file to write; the file appears when the run has ended, well or with an error.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, TrainerCallback

from .. import metrics as formulas
from ..data import Task
from ..disk import write_json
from ..methods import get_method
from ..stack.manifest import library_versions
from ..strategies import Strategy
from ..trainer import ContinualRun, ContinualTrainingArguments
from .data import bench_tasks
from .encoder import encoder_setting
from .protocol import Budget, next_point, tuned_option


class _Clock(TrainerCallback):
    """Seconds of each step, and bytes that the strategies and the model hold when a task starts.

    On a CPU the process's CPU time counts: other runs on the same machine do not show in it.
    """

    def __init__(self, strategies: list[Strategy]):
        self.strategies = strategies
        self.seconds: list[float] = []
        self.state_bytes: list[int] = []
        self.model_bytes: list[int] = []

    def _now(self, device: torch.device) -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state_bytes.append(tensor_bytes([vars(strategy) for strategy in self.strategies]))
        self.model_bytes.append(tensor_bytes([*model.parameters(), *model.buffers()]))

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now(args.device) - self.start)


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists, tuples and dataclasses; shared storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


def base_method(spec: dict[str, Any]) -> str:
    """The method that a spec runs: its own, or that of its variant."""
    return spec.get("variant", spec)["method"]


def strategies_of(method: str, weight: float | None, options: list[str] | None = None) -> list[Strategy]:
    """The method's strategies with these options, the tuned one at `weight` (None: as it is without tuning)."""
    option = tuned_option(method)
    tuned = [] if option is None or weight is None else [f"{option[0]}={weight!r}"]
    return get_method(method).make_strategies([*(options or ()), *tuned] or None)


def run_cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate as the spec says; returns what the cell's file holds beside the spec."""
    budget, tune = Budget(**spec["budget"]), spec["stage"] == "tune"
    general = {key: spec.get(key) for key in ("held_out", "general_text")}
    texts = bench_tasks(spec["stream"], spec["data_dir"], spec["prompt_style"], budget, tune, **general)
    name, variant = base_method(spec), spec.get("variant", {})
    method, strategies = get_method(name), strategies_of(name, spec["weight"], variant.get("strategy"))
    for strategy in strategies:
        strategy.seed = spec["seed"]  # what a strategy draws differs between the seeds of the table too
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model: Any
    tasks: list[Task]
    if spec["setting"] == "encoder":
        encoder = AutoModel.from_pretrained(spec["model"])
        model, tasks = encoder_setting(encoder, tokenizer, texts, max_length=budget.max_length)
        targets, collator = ["query", "value"], DataCollatorWithPadding(tokenizer)
    else:
        dtype = spec.get("dtype") or "auto"
        model, tasks = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype), [*texts]
        targets, collator = ["q_proj", "v_proj"], None
    steps = budget.tune_steps if tune else budget.steps
    adapter = method.adapter_config({"target_modules": targets, **variant.get("adapter", {})})
    count = sum(not task.held_out for task in tasks)
    clock = _Clock(strategies)
    with tempfile.TemporaryDirectory() as folder:
        args = ContinualTrainingArguments(
            folder,
            max_steps=steps * (count if method.mode == "joint" else 1),
            per_device_train_batch_size=budget.batch,
            per_device_eval_batch_size=64,
            learning_rate=spec["rate"],
            lr_scheduler_type="constant",
            max_length=spec["max_length"],
            eval_mode="score",
            eval_tasks="seen" if tune else budget.eval_tasks,
            seed=spec["seed"],
            save_strategy="no",
            logging_steps=max(1, steps // 5),
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **variant.get("training", {}),
        )
        run = ContinualRun(
            model, tasks, name, args, tokenizer, data_collator=collator, strategies=strategies, callbacks=[clock],
            adapter_config=adapter,
        )  # fmt: skip
        result = run.train().metrics
    rows = result["matrix"][1:]
    seen = range(count - len(rows) + 1, count + 1)  # joint training has one row, of all tasks
    return {
        "metrics": result,
        "learning_curve": [formulas.average_accuracy([row[:n]]) for n, row in zip(seen, rows, strict=True)],
        "step_seconds": statistics.median(clock.seconds),
        "state_bytes": clock.state_bytes,
        "model_bytes": clock.model_bytes,
    }


def portable(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without the paths of this machine: cells are published, and resumed elsewhere."""
    kept = {key: value for key, value in spec.items() if key not in ("data_dir", "general_text")}
    return {**kept, "stream": Path(spec["stream"]).stem, "model": Path(spec["model"]).name}


def finish_cell(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run a cell and write its file, with the error if it failed; returns the file's content."""
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"error": None, **run_cell(spec)}
    except Exception as error:  # what a method cannot do belongs in the table
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result |= {"seconds": round(time.perf_counter() - start, 1), "peak_rss": peak, "threads": torch.get_num_threads()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result |= {"versions": library_versions(), "commit": commit(), "device": device, "spec": portable(spec)}
    write_json(path, result)
    return result


def score(cell: dict[str, Any]) -> float | None:
    """What tuning maximises: the average accuracy on the dev rows, or None for a cell that failed."""
    return None if cell["error"] else cell["metrics"]["average_accuracy"]


def tune(spec: dict[str, Any], folder: Path) -> None:
    """Run a method's points one after the other, each into a file of its own; finished ones are not repeated."""
    name, budget = spec["method"], Budget(**spec["budget"])
    while (point := next_point(base_method(spec), budget, points(folder, name))) is not None:
        finish_cell({**spec, **point}, next_file(folder, name))


def points(folder: Path, method: str) -> list[dict[str, Any]]:
    """The finished points of a method's tuning: [{"rate", "weight", "score"}], in the order of their running."""
    cells = [json.loads(path.read_text()) for _, path in _tuning_files(folder, method)]
    return [{"rate": c["spec"]["rate"], "weight": c["spec"]["weight"], "score": score(c)} for c in cells]


def next_file(folder: Path, method: str) -> Path:
    """The file of the next point of a method's tuning."""
    number = max((number for number, _ in _tuning_files(folder, method)), default=-1) + 1
    return folder / f"tune-{method}-p{number}.json"


def _tuning_files(folder: Path, method: str) -> list[tuple[int, Path]]:
    files = ((p.stem.removeprefix(f"tune-{method}-p"), p) for p in folder.glob(f"tune-{method}-p*.json"))
    return sorted((int(number), p) for number, p in files if number.isdigit())  # others are a variant's


def commit() -> str:
    """The commit of the checkout this package lies in, with `-dirty` if it was changed; "" outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def main(argv: list[str]) -> None:
    """`SPEC.json`: {"spec": ..., "path": where to write} of a run, or {"spec": ..., "folder": ...} of a tuning."""
    job = json.loads(Path(argv[0]).read_text())
    torch.set_num_threads(job["spec"]["threads"])
    if "folder" in job:
        tune(job["spec"], Path(job["folder"]))
    else:
        finish_cell(job["spec"], Path(job["path"]))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some libraries print pages or wait when the interpreter ends

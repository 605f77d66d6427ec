"""One process of a run over the toy tasks: `worker.py JOBS.json`, under accelerate launch or torchrun.

JOBS.json is a list of runs, done one after the other in the same processes: {"base", "output_dir", and what
`toy.make_run` takes}, and
    "strategies": {name of a strategy's class: its options}
    "kill": [folder of a task, step, ranks]: these ranks kill themselves there, as `kill -9` does; with "SIGTERM" behind
        them by that signal
    "rank 1": what is different in process 1
    "own trainer": training arguments of the second of two plain tasks, which has a trainer class of its own too
    "fails": true if an error is expected: its text goes to `output_dir`.rank.error, and the next job is begun.
Every process leaves `output_dir`.rank.json: what it was, losses and scores.
"""

import dataclasses
import gc
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))
import toy
from transformers import TrainerCallback

import hf_jumplora.trainer.task as task_module
from hf_jumplora import ContinualTrainer, Task, strategies
from hf_jumplora.stack.load import merge_finished
from hf_jumplora.tuner.sharded_parameters import full_shape, piece


class Record(TrainerCallback):
    """Loss, threshold and density after every step; what the process holds at the start of each task."""

    def __init__(self):
        self.logs: list[dict] = []
        self.usage: list[list[int]] = []  # at the start of each task: bytes, open files, objects

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()
        process = psutil.Process()
        self.usage.append([process.memory_info().rss, process.num_fds(), len(gc.get_objects())])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append({"task": Path(args.output_dir).name, "step": state.global_step, **logs})


def watched_trainer(seen: list) -> type:
    """A trainer that records the class of the module that every step of training runs."""

    class Watched(ContinualTrainer):
        def training_step(self, model, *args, **kwargs):
            kind = type(model).__name__
            if kind == "DeepSpeedEngine":
                kind = f"DeepSpeedEngine {model.zero_optimization_stage()}"
            if not seen or seen[-1] != kind:
                seen.append(kind)
            return super().training_step(model, *args, **kwargs)

    return Watched


def watch_merging(peaks: list[int]) -> None:
    """Records the bytes that each merge needs on top of what is there before or after it (Linux)."""
    clear = Path("/proc/self/clear_refs")

    def watched(*args):
        before = psutil.Process().memory_info().rss
        if clear.exists():
            clear.write_text("5")  # the peak starts again
        merge_finished(*args)
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1] if clear.exists() else "0"
        peaks.append((int(status.split()[0]) << 10) - max(before, psutil.Process().memory_info().rss))

    task_module.merge_finished = watched


class Kill(TrainerCallback):
    def __init__(self, folder: str, step: int, ranks: list[int], name: str = "SIGKILL"):
        self.folder, self.step, self.ranks, self.signal = folder, step, ranks, getattr(signal, name)

    def on_step_end(self, args, state, control, **kwargs):
        if (
            args.process_index in self.ranks
            and args.output_dir.endswith(self.folder)
            and state.global_step == self.step
        ):
            os.kill(os.getpid(), self.signal)


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    import hf_jumplora.report.report as report

    report.draw_matrix = report.draw_overlap = lambda result, path: None
    for job in jobs:
        if os.environ.get("RANK") == "1":
            job = {**job, **job.get("rank 1", {})}
        try:
            one(job)
        except Exception as error:
            if not job.get("fails"):
                raise
            place = f"{job.get('errors', job['output_dir'])}.{os.environ['RANK']}.error"
            Path(place).write_text(f"{type(error).__name__}: {error}")


def one(job: dict) -> None:
    record, engines, peaks = Record(), [], []
    watch_merging(peaks)
    count = job.get("tasks", 2)
    tasks = toy.tasks(min(count, 4), job.get("train", 32), job.get("evaluate", 7))
    tasks += [dataclasses.replace(tasks[k % 4], name=f"{tasks[k % 4].name}{k}") for k in range(4, count)]
    if "own trainer" in job:
        rows = [{"input_ids": [8 + k % 4, 9], "labels": [8 + k % 4, 9]} for k in range(32)]
        own = toy.arguments(job["output_dir"], **job["own trainer"])
        tasks = [Task("a", rows), Task("b", rows, trainer_cls=type("Own", (watched_trainer(engines),), {}), args=own)]
    callbacks = [record, Kill(*job["kill"])] if "kill" in job else [record]
    named = [getattr(strategies, name)(**options) for name, options in job.get("strategies", {}).items()]
    run = toy.make_run(
        job["base"], job["output_dir"], job.get("method", "jumplora"), tasks, job.get("adapter"), callbacks,
        watched_trainer(engines), named or None, **{"logging_steps": 1, **job.get("options", {})},
    )  # fmt: skip
    result = run.train().metrics
    base = [p for name, p in run.model.named_parameters() if ".jumplora_" not in name]
    held = sum(piece(p).numel() for p in base) / sum(full_shape(p).numel() for p in base)
    out = {
        "held": held,
        "world_size": run.args.world_size,
        "rank": run.args.process_index,
        "type": str(run.args.distributed_state.distributed_type),
        "engines": engines,
        "logs": record.logs,
        "usage": record.usage,
        "matrix": result["matrix"],
        "merge_peaks": peaks,
    }
    Path(f"{job['output_dir']}.{run.args.process_index}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Runs the cells of a bench that are missing, each in a process of its own, and brings the table up to date."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..data.streams import stream_path
from ..disk import write_json
from .cell import base_method, next_file, points, portable
from .data import bench_tasks, tokens_around_text
from .encoder import default_encoder
from .protocol import BUDGETS, Budget, best_point, next_point, untuned_point
from .smollm2 import smollm2
from .table import write_table
from .tiny_llama import build_tiny_llama


SETTINGS = "bench.json"


@dataclasses.dataclass
class Bench:
    """One table: what is the same in all of its cells.

    setting: "encoder" (label-embedding classifier on a sentence encoder), "causal" (a causal language model, answers
    scored by their likelihood) or "smollm2" (the same with SmolLM2-135M-Instruct).
    model: folder or Hub id; None: all-MiniLM-L6-v2, or a tiny Llama pre-trained on the stream's own training text.
    held_out, general_text: what general ability is measured on, see [`load_tasks`]; general_text not for "encoder".
    jobs: cells at once, `threads` threads each (None: the cores divided by the jobs).
    prefix: words put before each cell's command, such as "nice -n 5".
    variants: methods with other options ([`read_variants`]), which may be run beside the methods.

    Raises:
        ValueError: an unknown budget or setting, or the folder holds a bench of other settings.
    """

    stream: str
    output_dir: Path
    data_dir: str | None = None
    budget: str = "small"
    setting: str = "encoder"
    model: str | None = None
    prompt_style: str | None = None
    held_out: list[str] | None = None
    general_text: str | None = None
    jobs: int = 1
    threads: int | None = None
    prefix: str = ""
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.budget not in BUDGETS:
            raise ValueError(f"unknown budget {self.budget!r}; known: {', '.join(BUDGETS)}")
        if self.setting not in ("encoder", "causal", "smollm2"):
            raise ValueError(f"setting is 'encoder', 'causal' or 'smollm2', got {self.setting!r}")
        if self.setting == "smollm2" and self.model is not None:
            raise ValueError(f"the setting 'smollm2' has its model: leave it out, or take 'causal', got {self.model!r}")
        if self.setting == "encoder" and self.prompt_style is not None:
            raise ValueError("the encoder reads texts without a prompt: prompt_style is for the setting 'causal'")
        if self.setting == "encoder" and self.general_text is not None:
            raise ValueError("the encoder is no language model: general_text is for the setting 'causal'")
        if self.jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {self.jobs}")
        self.output_dir = Path(self.output_dir).absolute()
        self.cells = self.output_dir / "cells"
        self.lock = threading.Lock()

    @property
    def limits(self) -> Budget:
        """The budget's numbers."""
        return BUDGETS[self.budget]

    def run(self, methods: list[str], seeds: int, retry_failed: bool = False) -> str:
        """Run what is missing for these methods and seeds 0 to `seeds` - 1; returns the table (in table.md too).

        A cell whose file is there is never repeated; with `retry_failed` those that hold an error are.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "logs").mkdir(exist_ok=True)
        self._prepare()
        if retry_failed:
            for path in self.cells.glob("*.json"):
                if json.loads(path.read_text())["error"]:
                    path.unlink()
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._tune, dict.fromkeys(self._tuned_as(method) for method in methods)))
            list(pool.map(lambda job: self._final(*job), [(m, s) for s in range(seeds) for m in methods]))
        return write_table(self.output_dir)

    def _prepare(self) -> None:
        """Check the folder's settings and the data; make the model if there is none."""
        general: dict[str, Any] = {"held_out": self.held_out, "general_text": self.general_text}
        tasks = bench_tasks(self.stream, self.data_dir, self.prompt_style, self.limits, tune=False, **general)
        for task in tasks if self.setting == "encoder" else ():
            if not getattr(task, "labels", None):
                raise ValueError(f"task {task.name!r} has no labels: the setting 'encoder' needs them, take 'causal'")
        held, tasks = [t for t in tasks if t.held_out], [t for t in tasks if not t.held_out]
        model = self.model
        if model is None and self.setting == "encoder":
            model = default_encoder()
        elif self.setting == "smollm2":
            model = str(smollm2())
        elif model is None:
            texts = [task.render(row[task.text_column]) for task in tasks for row in task.train_dataset]
            model = str(build_tiny_llama(texts, self.output_dir / "cache"))
        self.spec = {
            "setting": self.setting,
            "model": model,
            "stream": str(stream_path(self.stream).absolute()),
            "data_dir": self.data_dir and str(Path(self.data_dir).absolute()),
            "prompt_style": self.prompt_style,
            "budget": dataclasses.asdict(self.limits),
            **general,
            "max_length": self.limits.max_length + self._room(model, [*tasks, *held]),
            "threads": self.threads or max(1, (os.cpu_count() or 1) // self.jobs),
            "dtype": "bfloat16" if self.setting != "encoder" and torch.cuda.is_available() else None,
        }
        # These may differ from machine to machine, or follow from the rest.
        own = ("data_dir", "stream", "threads", "model", "general_text", "max_length")
        same: dict[str, Any] = {key: value for key, value in self.spec.items() if key not in own}
        if self.setting != "encoder":
            same["max_length"] = self.spec["max_length"]
        same |= {"stream": Path(self.stream).stem, "model": Path(model).name}
        same["tasks"] = [
            {
                "name": t.name,
                "train_examples": len(t.train_dataset),
                "test_examples": len(t.eval_dataset),
                "fingerprint": t.fingerprint(),
                "names_in_prompt": t.names_in_prompt() if self.setting != "encoder" else [],
                **({} if t.metric == "accuracy" else {"metric": t.metric}),
            }
            for t in tasks
        ]
        same["variants"] = self.variants
        same["held_out"] = [
            {"name": t.name, "test_examples": len(t.eval_dataset), "fingerprint": t.fingerprint()} for t in held
        ] or None
        same, path = json.loads(json.dumps(same)), self.output_dir / SETTINGS
        if path.is_file():
            before = json.loads(path.read_text())
            known = before.get("variants", {})
            same["variants"] = known | self.variants
            differ = [key for key in same if key != "variants" and before.get(key) != same[key]]
            differ += ["variants"] if any(same["variants"][name] != value for name, value in known.items()) else []
            if differ:
                shown = "; ".join(f"{key}: {before.get(key)!r} there, {same[key]!r} now" for key in differ)
                raise ValueError(f"{self.output_dir} holds a bench of other settings ({shown}): use another output_dir")
        write_json(path, same)

    def _room(self, model: str, tasks: list[Any]) -> int:
        """Tokens of prompt and answer, which a language model reads and the budget does not count."""
        return tokens_around_text(AutoTokenizer.from_pretrained(model), tasks) if self.setting != "encoder" else 0

    def _spec(self, name: str) -> dict[str, Any]:
        variant = self.variants.get(name, {})
        spec = {**self.spec, "method": name} | ({"variant": variant} if variant else {})
        if "rates" in variant:
            spec["budget"] = {**self.spec["budget"], "rates": variant["rates"]}
        return spec

    def _tuned_as(self, method: str) -> str:
        return self.variants.get(method, {}).get("tuned_as", method)

    def _tune(self, method: str) -> None:
        spec = {**self._spec(method), "stage": "tune", "seed": 1000}
        base, limits = base_method(spec), Budget(**spec["budget"])
        if next_point(base, limits, points(self.cells, method)) is None:
            return
        code = self._process(f"tune-{method}", {"spec": spec, "folder": str(self.cells)})
        point = next_point(base, limits, points(self.cells, method))
        while code and point is not None:  # the process died: what it was at has failed
            write_json(
                next_file(self.cells, method),
                {"error": f"the process ended with code {code}", "spec": portable({**spec, **point})},
            )
            point = next_point(base, limits, points(self.cells, method))

    def _final(self, method: str, seed: int) -> None:
        path = self.cells / f"final-{method}-s{seed}.json"
        if path.is_file():
            return
        tuned = self._tuned_as(method)
        spec = {**self._spec(method), "stage": "final", "seed": seed}
        limits = Budget(**spec["budget"])
        best = best_point(points(self.cells, tuned)) if limits.tune_steps else untuned_point(limits)
        if not best:
            errors = sorted({json.loads(p.read_text())["error"] for p in self.cells.glob(f"tune-{tuned}-p*.json")})
            write_json(path, {"error": f"tuning failed: {'; '.join(errors)}", "spec": portable(spec)})
        else:
            spec |= {"rate": best["rate"], "weight": best["weight"]}
            code = self._process(path.stem, {"spec": spec, "path": str(path)})
            if not path.is_file():
                write_json(path, {"error": f"the process ended with code {code}", "spec": portable(spec)})
        with self.lock:
            write_table(self.output_dir)

    def _process(self, name: str, job: dict[str, Any]) -> int:
        file = self.output_dir / "logs" / f"{name}.job.json"
        write_json(file, job)
        threads = str(self.spec["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        command = [*shlex.split(self.prefix), sys.executable, "-m", "hf_jumplora.bench.cell", str(file)]
        print(f"bench: {name}", flush=True)
        with open(self.output_dir / "logs" / f"{name}.log", "w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        file.unlink()
        return code

"""Shared by the benchmarks: interleaved rounds, medians, and one row a measurement in results.jsonl."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results.jsonl"


def machine() -> str:
    """The GPU's name, or the CPU's with its widest instructions."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(providers: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each provider in each of `rounds` rounds after one warm-up; providers take turns within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + 1):
        for name, step in providers.items():
            elapsed = _seconds(step)
            if number:
                seconds[name].append(elapsed)
    return seconds


def report(benchmark: str, setting: dict, seconds: dict[str, list[float]], baseline: str) -> None:
    """Print ratios against a baseline of the same run, and append one row a provider to results.jsonl."""
    print(f"\n{benchmark} {setting}")
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder).stdout
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[baseline], strict=True)]
        row = {
            "benchmark": benchmark, **setting, "provider": name, "baseline": baseline,
            "median_ms": round(1e3 * statistics.median(times), 2),
            "min_ms": round(1e3 * min(times), 2), "max_ms": round(1e3 * max(times), 2),
            "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3), "rounds": len(times), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "peft": version("peft"), "transformers": version("transformers"),
            "python": platform.python_version(), "machine": machine(), "commit": commit.strip(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(
            f"  {name:<12} {row['median_ms']:9.1f} ms   "
            f"{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]",
            flush=True,
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


def append(benchmark: str, setting: dict, **values) -> None:
    """Print and append a row that is not a time."""
    row = {"benchmark": benchmark, **setting, **values, "torch": torch.__version__, "machine": machine()}
    print(f"\n{benchmark} {setting}: {values}", flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(field)


def peak_growth(step: Callable[[], None]) -> int:
    """MiB by which the peak of this process during one step exceeds what was resident before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    step()
    return round(_resident("VmHWM") - before)

"""Starts worker.py in two processes, as a user would: accelerate launch with the shipped configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path


HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"


def environment(**more: str) -> dict[str, str]:
    """One thread a process, this tree's code, nothing left over from another launch."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_")) and k not in ("RANK",)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    return {**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def accelerate(config: Path | str, script: Path | str, *arguments: str) -> list[str]:
    """The command line `accelerate launch` of this Python."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    script = [HERE / "without_extension.py", script] if Path(config).stem.startswith("zero") else [script]
    return [*launch, *map(str, script), *map(str, arguments)]


def start(jobs: list[dict], folder: Path, config: Path | str, **env: str) -> subprocess.Popen:
    """The launcher of worker.py over these jobs; its output goes to `folder`/log."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = accelerate(config, HERE / "worker.py", str(path))
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(**env))


def results(job: dict, processes: int = 2) -> list[dict]:
    """What every process has left of a job."""
    return [json.loads(Path(f"{job['output_dir']}.{rank}.json").read_text()) for rank in range(processes)]


def run(jobs: list[dict], folder: Path, config: Path | str, timeout: float = 300, **env: str) -> str:
    """Start and wait; the log. Raises AssertionError, with the end of the log, if it did not end with 0."""
    process = start(jobs, folder, config, **env)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    log = (folder / "log").read_text()
    assert code == 0, log[-6000:]
    return log

"""Killed runs of two processes: of all, or of one; and another number of processes afterwards."""

import json
import shutil
import time

import launch
import psutil
import pytest
import toy
from test_run import files

from hf_jumplora import ContinualTrainer
from hf_jumplora.stack import read_manifest, verify_stack


# Checkpoints after every third step. Held thresholds are not the optimizer's: they must come back all the same.
OPTIONS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
HELD = {"threshold_update": "density", "initial_density": 0.3, "lora_dropout": 0.1}
CASES = {"cpu2": HELD, "zero2": HELD, "zero3": {}, "fsdp2": {}}


def job(base: str, folder, config: str, **more) -> dict:
    return {"base": base, "output_dir": str(folder), "adapter": CASES[config], "options": OPTIONS, **more}


def die(jobs: list[dict], folder, config: str) -> float:
    """Seconds from a process's death to the launcher's end, which must be an error and leave nobody behind."""
    launcher = launch.start(jobs, folder, launch.CONFIGS / f"{config}.yaml")
    watched, workers, dead = psutil.Process(launcher.pid), [], None
    end = time.monotonic() + 240
    while launcher.poll() is None and time.monotonic() < end:
        workers = workers if len(workers) == 2 else watched.children()
        if dead is None and len(workers) == 2 and not all(map(alive, workers)):
            dead = time.monotonic()
        time.sleep(0.05)
    code, took = launcher.poll(), time.monotonic() - (dead or 0)
    for process in [launcher, *(w for w in workers if alive(w))] if code is None else []:
        process.kill()
    log = (folder / "log").read_text()
    assert "-9" in log, log[-3000:]
    assert code not in (0, None)
    assert not any(map(alive, workers))
    return took


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ("zero3", [0, 1]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("fsdp2", [1]), ("cpu2", [0, 1]), ("cpu2", [0]), ("zero2", [1]))
        ),
    ],
)
def test_killed(config, ranks, toy_base, tmp_path, capsys):
    """kill -9 in the second task, of all processes or of one: the same command again gives the same bytes."""
    straight = job(toy_base, tmp_path / "straight", config, train=24)
    killed = job(toy_base, tmp_path / "killed", config, train=24, kill=["task_001", 5, ranks])
    took = die([straight, killed], tmp_path, config)
    assert took < 60
    assert read_manifest(tmp_path / "killed").task_names == ["size"]
    verify_stack(tmp_path / "killed")
    del killed["kill"]
    launch.run([killed], tmp_path, launch.CONFIGS / f"{config}.yaml")
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    again = launch.results(killed)[0]["logs"]
    assert [log["step"] for log in again] == [4, 5, 6]  # it went on at the checkpoint of step 3
    assert [p.name for p in (tmp_path / "killed").iterdir() if p.name.startswith(".")] == []
    with capsys.disabled():
        print(f"\n{config}, {ranks} killed: all gone after {took:.1f} s")


@pytest.mark.slow
def test_sigterm_of_one_process(toy_base, tmp_path):
    """All save a checkpoint after that step and end with the error; the same command again gives the same bytes."""
    options = {**OPTIONS, "enable_jit_checkpoint": True}
    straight = job(toy_base, tmp_path / "straight", "cpu2") | {"options": options}
    stopped = job(toy_base, tmp_path / "stopped", "cpu2", kill=["task_001", 5, [1], "SIGTERM"]) | {"options": options}
    launcher = launch.start([straight, stopped], tmp_path, launch.CONFIGS / "cpu2.yaml")
    assert launcher.wait(240) not in (0, None)
    log = (tmp_path / "log").read_text()
    assert log.count("interrupted by SIGTERM at step 5 of 8 of a task: finished tasks and checkpoints are safe") == 2
    assert read_manifest(tmp_path / "stopped").task_names == ["size"]
    del stopped["kill"]
    launch.run([stopped], tmp_path, launch.CONFIGS / "cpu2.yaml")
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    assert [log["step"] for log in launch.results(stopped)[0]["logs"]] == [6, 7, 8]  # went on at that step's checkpoint


@pytest.mark.slow
def test_other_number_of_processes(toy_base, tmp_path):
    """Allowed between tasks, and recorded. Inside a task it is refused, with what to do."""
    folder = tmp_path / "run"
    die([job(toy_base, folder, "cpu2", kill=["task_001", 5, [0, 1]])], tmp_path, "cpu2")
    # The trainer class counts too, by its name: the worker's.
    one = {"stream": toy.tasks(2, 32, 7), "adapter": HELD, "trainer_cls": type("Watched", (ContinualTrainer,), {})}
    options = {**OPTIONS, "per_device_train_batch_size": 4}
    alone = toy.make_run(toy_base, folder, **one, **options)
    with pytest.raises(ValueError, match=r"interrupted inside a task \(args.world_size: 2 there, 1 now.*or delete"):
        alone.train()
    assert read_manifest(folder).task_names == ["size"]
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="per_device_train_batch_size: 2 there, 4 now"):
        toy.make_run(toy_base, folder, **one, **options).train()
    toy.make_run(toy_base, folder, **one, **OPTIONS).train()
    infos = [json.loads((folder / task / "task.json").read_text()) for task in ("task_000", "task_001")]
    assert [(i["processes"], i["sharding"], i["effective_batch"]) for i in infos] == [(2, "ddp", 4), (1, "none", 2)]

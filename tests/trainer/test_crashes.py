"""A run that is killed at random, or finds no room on the disk: the same command again gives the same stack."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import toy
from peft import PeftModel
from safetensors import SafetensorError
from test_run import RESTART, files

import hf_jumplora.stack.manifest as manifest_module
from hf_jumplora.stack import load_stack, read_manifest
from hf_jumplora.stack.verify import verify


def start(*arguments):
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server imports toy once, every process starts from there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    process = context.Process(target=toy.run_once, args=arguments)
    process.start()
    return process


def finish(process):
    process.join(300)
    assert process.exitcode == 0


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, toy_base, hub, tmp_path, capsys):
    """kill -9 in training, evaluation, writing or pushing: same adapters and matrix, one commit and one tag a task."""
    options = {**RESTART, "push_to_hub": True, "hub_token": hub.token}
    finish(start(toy_base, str(tmp_path / "warm"), RESTART))
    began = time.perf_counter()
    finish(start(toy_base, str(tmp_path / "straight"), {**options, "hub_model_id": "me/straight"}, hub.url))
    duration = time.perf_counter() - began
    expected, moments = files(tmp_path / "straight"), random.Random(kills)
    found = []
    number = 0
    while len(found) < kills:
        number += 1
        folder, repo = tmp_path / f"run{number}", f"me/stack{number}"
        arguments = (toy_base, str(folder), {**options, "hub_model_id": repo}, hub.url)
        # one part of the run after the other, so that each is hit: [0, 1/kills), [1/kills, 2/kills), ...
        moment = duration * (len(found) + moments.random()) / kills
        began, process = time.perf_counter(), start(*arguments)
        process.join(moment)
        process.kill()
        process.join(60)
        if process.exitcode == 0:  # the machine has become faster: the run had ended
            duration = 0.95 * (time.perf_counter() - began)
            continue
        done = read_manifest(folder).tasks if (folder / "stack.json").is_file() else []
        for task in done:
            verify(folder, task)
        assert process.exitcode == -signal.SIGKILL
        found.append(f"{moment:.2f} s ({len(done)} tasks)")
        finish(start(*arguments))
        assert files(folder) == expected, found[-1]
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
        pushed = [commit.title for commit in hub.repos[repo].history()]
        assert pushed == ["task-002: mood", "task-001: light", "task-000: size", "initial commit"]
        assert set(hub.repos[repo].tags) == {"task-000", "task-001", "task-002"}
    with capsys.disabled():
        print(f"\n{kills} of {kills} kills recovered; a run takes {duration:.2f} s; killed after {'; '.join(found)}")


@pytest.fixture(scope="module")
def straight(toy_base, tmp_path_factory):
    """Files of a run over two tasks that nothing has happened to."""
    folder = tmp_path_factory.mktemp("straight")
    toy.make_run(toy_base, folder, stream=toy.tasks(2)).train()
    return files(folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "metrics.json", "stack.json"])
def test_full_disk(file, straight, toy_base, monkeypatch, tmp_path):
    """While the second task is written: the error says what is left, the first task loads, and it goes on."""
    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(2))
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if file.endswith(".safetensors"):

            def save_pretrained(model, folder, selected_adapters, **kwargs):
                if selected_adapters == ["task_001"]:
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                return original(model, folder, selected_adapters=selected_adapters, **kwargs)

            original = PeftModel.save_pretrained
            patch.setattr(PeftModel, "save_pretrained", save_pretrained)
        else:

            def fsync(handle):
                path = os.readlink(f"/proc/self/fd/{handle}")
                if file in path and path.endswith(".tmp") and (tmp_path / "task_001").exists():
                    raise full
                return sync(handle)

            sync = os.fsync
            patch.setattr(manifest_module.os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device.*task 'light' could not be written"):
            run.train()
    assert read_manifest(tmp_path).task_names == ["size"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    load_stack(tmp_path)
    toy.make_run(toy_base, tmp_path, stream=toy.tasks(2)).train()
    assert files(tmp_path) == straight


def test_read_only_folder(toy_run, toy_base, monkeypatch, tmp_path):
    """An error that names the file, before anything is trained; the stack that is there loads."""

    def refuse(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, mode, *args, **kwargs)

    opened = manifest_module.Path.open
    monkeypatch.setattr(manifest_module.Path, "open", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: .*run\.json"):
        toy.make_run(toy_base, tmp_path / "new", stream=toy.tasks(1)).train()
    with pytest.raises(OSError, match="Read-only file system"):
        toy.make_run(toy_base, toy_run.output_dir, stream=toy.tasks(4)).train()
    monkeypatch.undo()
    assert read_manifest(toy_run.output_dir).task_names == ["size", "light", "mood"]
    load_stack(toy_run.output_dir)

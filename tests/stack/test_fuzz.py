"""Mutated stacks, streams, checkpoints, Hub answers: refused by an error that names the file, or the same bits.

Seeded: a failure names its seed. 200 cases; `-m slow` tries 10,000.
"""

import contextlib
import faulthandler
import hashlib
import json
import random
import resource
import shutil
import sys

import pytest
import torch
import toy

from hf_jumplora import load_stack, load_tasks
from hf_jumplora.cli import main
from hf_jumplora.disk import file_sha256
from hf_jumplora.hub import push_stack
from hf_jumplora.stack import merge_stack, read_manifest, write_manifest
from hf_jumplora.stack.files import total_update
from hf_jumplora.stack.operations import open_tasks
from hf_jumplora.trainer.checkpoints import newest_checkpoint
from hf_jumplora.trainer.from_stack import check_stack


VALUES = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "\0", "\ud800", "\x1b[2J",
    "../x", "/etc/passwd", "$\\frac{", "<script>", "(.|.)*!", "x" * 100_000, [], [[]], [None], {}, {"a": 1}, {"": None},
    ["task_000"] * 1000,
]  # fmt: skip
TEXTS = ["*a", "&a [*a]", "- " * 500, "[" * 5000, "{" * 5000, "!!python/object:os.system x", "9" * 5000, "2020-99-99",
         "\0", "<<: ",         "\ud7ff", "? [1]\n", "null", "~", "%TAG", "name: ", "tasks: ", "\t"]  # fmt: skip


@contextlib.contextmanager
def bounded(seconds: float = 120, mebibytes: int = 300):
    """Ends the process when the block hangs; fails when it takes memory that no file of a few kilobytes is worth."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024


def damage(rng: random.Random, content: bytes) -> bytes:
    """A flipped bit, a cut, bytes that are gone, repeated, or others."""
    place, size = rng.randrange(len(content) + 1), rng.choice([1, 8, 64, 4096])
    kind = rng.randrange(5)
    if kind == 0 and content:
        place %= len(content)
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place + size :]
    if kind == 3:
        return content[:place] + content[place : place + size] * 2 + content[place + size :]
    return content[:place] + rng.randbytes(size) + content[place + size :]


def craft(rng: random.Random, data):
    """JSON with one value, somewhere in it, that is another one, twice there, or gone."""
    if isinstance(data, (dict, list)) and data and rng.random() < 0.85:
        key = rng.choice(sorted(data) if isinstance(data, dict) else range(len(data)))
        kind = rng.randrange(8)
        if kind == 0:
            del data[key]
        elif kind == 1 and isinstance(data, list):
            data.append(data[key])
        elif kind == 1:
            data[rng.choice(["x", "task 7", "args.hub_token", "../x", key + "x"])] = data[key]
        else:
            data[key] = craft(rng, data[key])
        return data
    return rng.choice(VALUES)


def bits(stack) -> str:
    """Everything that a stack adds to its base, and what a run would go on from."""
    check_stack(stack)
    _, manifest, tasks = open_tasks(stack)
    digest = hashlib.sha256(json.dumps(manifest.task_names).encode())
    for layer in manifest.base_model["layers"]:
        digest.update(total_update(tasks, layer).numpy().tobytes())
    return digest.hexdigest()


def check_words(error: Exception, folder) -> None:
    """An error of ours, of a length that one reads, which says what file it is about."""
    assert str(folder) in str(error), f"names no file: {error}"
    assert not isinstance(error, (json.JSONDecodeError, UnicodeError))
    assert len(str(error)) < 5000


def reseal(stack):
    """As somebody who makes a stack: every hash is right, where stack.json can still be read."""
    with contextlib.suppress(ValueError, OSError):
        manifest = read_manifest(stack)
        for task in manifest.tasks:
            task["files"] = {name: file_sha256(stack / task["folder"] / name) for name in task["files"]}
        write_manifest(stack, manifest)


def one_stack(seed, source, folder, good, toy_base):
    """One mutated copy through every way in."""
    rng = random.Random(seed)
    stack = shutil.copytree(source, folder / "stack")
    files = [*stack.glob("*.json"), *stack.glob("task_*/*.json"), *stack.glob("task_*/*.safetensors")]
    path, resealed = rng.choice(sorted(files)), rng.random() < 0.6
    if path.suffix == ".json" and rng.random() < 0.7:
        text = json.dumps(craft(rng, json.loads(path.read_text())), indent=2)
        if path.name == "stack.json":
            text = seal(text)
        path.write_text(text)
    elif rng.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(damage(rng, path.read_bytes()))
    if resealed:
        reseal(stack)
    try:
        found = bits(stack)
    except (ValueError, OSError) as error:
        check_words(error, stack)
        found = None
    if found == good or (resealed and found) or path.name == "stack.json":
        # What was not refused is one model, whichever way it is read.
        with contextlib.suppress(ValueError, OSError):
            merged = load_stack(stack, toy_base, merge=True).state_dict()
            merge_stack(stack, folder / "out", toy_base)
            written = toy.load_base(folder / "out").state_dict()
            same = [torch.allclose(written[n], merged[n], rtol=0, atol=0, equal_nan=True) for n in written]
            assert all(same)
    else:
        assert found is None, f"{path.name} was changed and is believed"
    if seed % 10 == 0:
        assert main(["inspect", str(stack)]) in (0, 2)


def seal(text: str) -> str:
    """Give the text of a stack.json the sha256 that it should have, if it is the text of one at all."""
    head, found, _ = text.rpartition('"sha256": "')
    if not found:
        return text
    return f'{head}{found}{hashlib.sha256((head + found).encode()).hexdigest()}"\n}}\n'


def cases(count):
    return pytest.mark.parametrize(
        "seeds", [range(count), pytest.param(range(count, 50 * count), marks=pytest.mark.slow)], ids=["some", "many"]
    )


@cases(140)
def test_stacks(seeds, toy_run, toy_base, tmp_path, capsys):
    small = tmp_path / "source"
    shutil.copytree(toy_run.output_dir, small, ignore=shutil.ignore_patterns("*.png", "checkpoints"))
    good = bits(small)
    for seed in seeds:
        folder = tmp_path / str(seed)
        with bounded():
            try:
                one_stack(seed, small, folder, good, toy_base)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)


STREAM = """
name: mine
prompt: "{instruction} {options} : {text} ="
tasks:
  - {name: one, train_file: one.json, eval_file: one.json, labels: [a, b], max_train: 3}
  - name: two
    train_file: two.csv
    text: sentence
"""


@cases(30)
def test_streams(seeds, tmp_path):
    rows = [{"sentence": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]
    for seed in seeds:
        rng = random.Random(seed)
        (tmp_path / "one.json").write_text(json.dumps(rows))
        (tmp_path / "two.csv").write_text("sentence,label\n" + "\n".join(f"text {i},x" for i in range(4)))
        (tmp_path / "s.yaml").write_text(STREAM)
        path = tmp_path / rng.choice(["s.yaml", "s.yaml", "one.json", "two.csv"])
        content = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.5:
            path.write_text(json.dumps(craft(rng, rows)))
            rows = json.loads(content)
        elif rng.random() < 0.5:
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + rng.choice(TEXTS).encode() + content[place:])
        else:
            path.write_bytes(damage(rng, content))
        with bounded():
            try:
                for task in load_tasks(tmp_path / "s.yaml"):
                    json.dumps([task.train_dataset, task.eval_dataset], ensure_ascii=False).encode()
            except (ValueError, OSError) as error:
                check_words(error, tmp_path)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@cases(20)
def test_checkpoints(seeds, toy_base, tmp_path):
    """Of torch's own files and the headers of safetensors; of values inside the latter nobody keeps a sum."""

    class Interrupt(toy.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    run = toy.make_run(
        toy_base, tmp_path / "run", stream=toy.tasks(1), callbacks=[Interrupt()], save_strategy="steps", save_steps=2
    )
    with contextlib.suppress(KeyboardInterrupt):
        run.train()
    (saved,) = (tmp_path / "run" / "checkpoints" / "task_000").iterdir()
    assert newest_checkpoint(saved.parent) == saved
    for seed in seeds:
        rng = random.Random(seed)
        path = saved / rng.choice(["optimizer.pt", "scheduler.pt", "rng_state.pth"])
        content = path.read_bytes()
        changed = rng.choice([damage(rng, content)[: len(content) - 1], content[: rng.randrange(len(content))], b""])
        path.write_bytes(changed)
        with bounded():
            assert newest_checkpoint(saved.parent) is None, f"seed {seed}"
        path.write_bytes(content)


@cases(10)
def test_answers_of_the_hub(seeds, toy_run, hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    small = shutil.copytree(toy_run.output_dir, tmp_path / "source", ignore=shutil.ignore_patterns("*.png", "hub.json"))
    push_stack(small, "me/stack")
    commit = hub.repos["me/stack"].resolve("main")
    names = sorted(n for n in commit.files if n == "stack.json" or (n.startswith("task_") and not n.endswith(".md")))
    for seed in seeds:
        rng = random.Random(seed)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"cache{seed}"))
        name = rng.choice(names)
        content = commit.files[name]
        commit.files[name] = damage(rng, content)
        with bounded(), contextlib.suppress(ValueError, OSError):
            open_tasks("me/stack")
            assert commit.files[name] == content, f"seed {seed}: {name} was changed and is believed"
        commit.files[name] = content
        shutil.rmtree(tmp_path / f"cache{seed}", ignore_errors=True)

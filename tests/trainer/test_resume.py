"""Adding tasks to a finished stack: in its folder, in another, and on a machine that has nothing but the repository."""

import hashlib
import json
import shutil

import pytest
import toy
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_jumplora import ContinualRun
from hf_jumplora.hub import push_stack
from hf_jumplora.stack import load_stack, read_manifest, verify_stack
from hf_jumplora.strategies import Ella


QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": []}


def adapters(folder):
    """Configs, and the hashes of the weights. A base that is a folder has another name after it was on the Hub."""
    found = {}
    for path in sorted(folder.glob("task_*/adapter_*")):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("base_model_name_or_path")
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[f"{path.parent.name}/{path.name}"] = content
    return found


def matrix(folder):
    return json.loads((folder / "metrics.json").read_text())["matrix"]


def fits(found, expected):
    """Every score that is there is the uninterrupted run's."""
    for row, other in zip(found, expected, strict=True):
        assert all(a is None or a == b for a, b in zip(row, other, strict=True))


@pytest.fixture(scope="module")
def two(toy_base, tmp_path_factory):
    """A finished run over the first two toy tasks. Read only."""
    folder = tmp_path_factory.mktemp("two")
    toy.make_run(toy_base, folder, stream=toy.tasks(2)).train()
    return folder


@pytest.fixture
def local_hub(hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_longer_list_in_the_same_folder(two, toy_run, toy_base, tmp_path):
    """The column of the new task: before any training, after the last old task, and from then on."""
    folder = shutil.copytree(two, tmp_path / "run")
    toy.make_run(toy_base, folder).train()
    assert adapters(folder) == adapters(toy_run.output_dir)
    expected = matrix(toy_run.output_dir)
    expected[1][2] = None  # nobody can know it any more
    assert matrix(folder) == expected
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    toy.make_run(toy_base, folder).train()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    result = json.loads((folder / "metrics.json").read_text())
    whole = json.loads((toy_run.output_dir / "metrics.json").read_text())
    for key in ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer_gem"):
        assert result[key] == whole[key]


def test_only_at_the_end(two, toy_base, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    stream = toy.tasks(3)
    with pytest.raises(ValueError, match=r"task 1: 'light .*' there, 'mood .*tasks can be added at the end"):
        toy.make_run(toy_base, folder, stream=[stream[0], stream[2], stream[1]]).train()
    joint = tmp_path / "joint"
    toy.make_run(toy_base, joint, "mtl", stream=toy.tasks(2)).train()
    with pytest.raises(ValueError, match="all its tasks at once"):
        toy.make_run(toy_base, joint, "mtl").train()
    with pytest.raises(ValueError, match="on all tasks at once"):
        ContinualRun.from_stack(joint, toy.tasks(3)[2:], joint)


@pytest.mark.parametrize(
    "method", ["jumplora-ella", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jumplora", "seqlora"))]
)
def test_from_the_hub_on_a_fresh_machine(method, local_hub, toy_base, tmp_path):
    """Same adapter as the uninterrupted run, same scores of the tasks at hand, one commit more in the repository."""
    straight, first = tmp_path / "straight", tmp_path / "first"
    toy.make_run(toy_base, straight, method).train()
    toy.make_run(toy_base, first, method, stream=toy.tasks(2)).train()
    push_stack(first, "me/stack")
    shutil.rmtree(first)

    def run():
        return ContinualRun.from_stack(
            "me/stack", toy.tasks(3)[2:], tmp_path / "fresh", base_model=toy_base, push_to_hub=True, **QUIET
        )

    run().train()
    assert adapters(tmp_path / "fresh") == adapters(straight)
    scores, expected = matrix(tmp_path / "fresh"), matrix(straight)
    assert [row[2] for row in scores] == [expected[0][2], None, expected[2][2], expected[3][2]]
    assert scores[3][:2] == [None, None]  # their data is not here
    fits(scores, expected)
    repo = local_hub.repos["me/stack"]
    assert [c.title for c in repo.history()][:2] == ["task-002: mood", "task-001: light"]
    assert set(repo.tags) == {"task-000", "task-001", "task-002"}
    run().train()  # again, as after an interruption
    assert len(repo.history()) == 4
    load_stack(tmp_path / "fresh", toy_base)


def test_old_tasks_given_again_are_evaluated(two, toy_run, toy_base, tmp_path):
    """Then nothing is missing but what nobody can know."""
    ContinualRun.from_stack(two, toy.tasks(3), tmp_path / "new", base_model=toy_base, **QUIET).train()
    expected = matrix(toy_run.output_dir)
    expected[1][2] = None
    assert matrix(tmp_path / "new") == expected
    assert adapters(tmp_path / "new") == adapters(toy_run.output_dir)


def test_from_a_tag(local_hub, toy_run, toy_base, tmp_path):
    """The stack as it was after an earlier task goes on with the planned tasks, or with others."""
    push_stack(toy_run.output_dir, "me/stack")
    options = {"base_model": toy_base, "revision": "task-001", **QUIET}
    ContinualRun.from_stack("me/stack", toy.tasks(3), tmp_path / "planned", **options).train()
    assert adapters(tmp_path / "planned") == adapters(toy_run.output_dir)
    assert matrix(tmp_path / "planned") == matrix(toy_run.output_dir)
    ContinualRun.from_stack("me/stack", toy.tasks(4)[3:], tmp_path / "other", **options).train()
    assert read_manifest(tmp_path / "other").task_names == ["size", "light", "pace"]
    assert [len(row) for row in matrix(tmp_path / "other")] == [3] * 4
    run = ContinualRun.from_stack(
        "me/stack", toy.tasks(4)[3:], tmp_path / "other", push_to_hub=True, hub_model_id="me/stack", **options
    )
    with pytest.raises(ValueError, match="holds another stack"):
        run.train()


def test_what_a_method_remembers(local_hub, toy_base, tmp_path):
    """Is kept after the newest task alone. A tag that was pushed in time has it, and a late one says it has not."""
    folder, name = tmp_path / "run", "strategies.safetensors"
    toy.make_run(toy_base, folder, "kfac", stream=toy.tasks(2)).train()
    push_stack(folder, "me/stack")
    toy.make_run(toy_base, folder, "kfac").train()
    assert [path.parent.name for path in folder.glob(f"task_*/{name}")] == ["task_002"]
    push_stack(folder, "me/stack")
    tags = [local_hub.repos["me/stack"].resolve(tag).files for tag in ("task-000", "task-001", "task-002")]
    held = [[path for path in files if path.endswith(name)] for files in tags]
    assert held == [[], [f"task_001/{name}"], [f"task_002/{name}"]]
    options = {"base_model": toy_base, **QUIET}
    again = tmp_path / "again"
    ContinualRun.from_stack("me/stack", toy.tasks(3), again, revision="task-001", **options).train()
    assert adapters(again) == adapters(folder)
    assert (again / "task_002" / name).read_bytes() == (folder / "task_002" / name).read_bytes()
    with pytest.raises(ValueError, match=rf"task_000/{name} is missing.*take a newer one"):
        ContinualRun.from_stack("me/stack", toy.tasks(3), tmp_path / "late", revision="task-000", **options)

    (folder / "task_001" / name).write_bytes(b"left by a kill before it was deleted")
    toy.make_run(toy_base, folder, "kfac").train()
    assert not (folder / "task_001" / name).exists()
    verify_stack(folder)
    damaged = bytearray((folder / "task_002" / name).read_bytes())
    damaged[-1] ^= 1
    (folder / "task_002" / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"task_002/{name} is damaged"):
        verify_stack(folder)
    (folder / "task_002" / name).unlink()
    shutil.rmtree(again)
    local_hub.repos.clear()
    with pytest.raises(ValueError, match=rf"task_002/{name} is missing"):
        push_stack(folder, "me/stack")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 0.02}, r"args\.learning_rate: 0\.01 there, 0\.02 now"),
        ({"strategies": [Ella(1.0)]}, r"strategies: \[\] there"),
        ({"revision": "main"}, "is for a repository"),
    ],
)
def test_conflicts_are_named(options, named, two, toy_base, tmp_path):
    with pytest.raises(ValueError, match=named):
        ContinualRun.from_stack(two, toy.tasks(3)[2:], tmp_path, base_model=toy_base, **QUIET, **options).train()
    assert len(read_manifest(two).tasks) == 2


def test_another_task_under_an_old_name(two, toy_base, tmp_path):
    stream = toy.tasks(2)
    stream[0].instruction = "other"
    with pytest.raises(ValueError, match=r"task 0: 'size .* there"):
        ContinualRun.from_stack(two, stream, tmp_path, base_model=toy_base, **QUIET).train()


def test_what_cannot_go_on(two, toy_run, toy_base, tmp_path):
    new = toy.tasks(3)[2:]
    with pytest.raises(FileNotFoundError, match="holds no adapter stack"):
        ContinualRun.from_stack(tmp_path, new, tmp_path / "a")
    with pytest.raises(ValueError, match="holds another stack: use"):
        ContinualRun.from_stack(toy_run.output_dir, new, shutil.copytree(two, tmp_path / "b"), base_model=toy_base)
    damaged = shutil.copytree(two, tmp_path / "c")
    (damaged / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        ContinualRun.from_stack(damaged, new, tmp_path / "d", base_model=toy_base)
    other = AutoModelForCausalLM.from_pretrained(toy_base)
    other.get_input_embeddings().weight.data.add_(1.0)
    with pytest.raises(ValueError, match="this base has other weights"):
        ContinualRun.from_stack(two, new, tmp_path / "d", base_model=other)
    assert not (tmp_path / "d").exists()

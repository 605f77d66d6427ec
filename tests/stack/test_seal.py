"""What stack.json lists beside the tasks is what a run goes on from: changed by hand, by a kill or by others."""

import contextlib
import json
import shutil
import time

import pytest
import safetensors.torch
import torch
import toy

from hf_jumplora import ContinualRun, load_stack
from hf_jumplora.disk import file_sha256, read_sealed, write_beside
from hf_jumplora.hub import push_stack
from hf_jumplora.hub.push import RECORD, Pusher, read_record
from hf_jumplora.stack import export_sparse, merge_stack, read_manifest, subset, verify_stack, write_manifest
from hf_jumplora.trainer.checkpoints import newest_checkpoint
from hf_jumplora.trainer.record import in_use


QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}


@pytest.fixture
def stack(toy_run, tmp_path):
    """A copy of a finished stack of three tasks."""
    return shutil.copytree(toy_run.output_dir, tmp_path / "stack")


def more(stack, folder, **options):
    tasks = toy.tasks(4)[3:]
    return ContinualRun.from_stack(stack, tasks, folder, processing_class=toy.tokenizer(), **{**QUIET, **options})


def change(path, key, value):
    data = json.loads(path.read_text())
    data[key] = value
    path.write_text(json.dumps(data))


def reseal(stack):
    """As somebody who makes a stack: every hash is right."""
    manifest = read_manifest(stack)
    for task in manifest.tasks:
        task["files"] = {name: file_sha256(stack / task["folder"] / name) for name in task["files"]}
    write_manifest(stack, manifest)


# ---- the seal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value"), [("run.json", "args.learning_rate", 0.5), ("metrics.json", "method", "x")]
)
def test_a_changed_file_is_believed_by_nobody(name, key, value, stack, hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    change(stack / name, key, value)
    match = rf"{name} is damaged, or was changed since stack\.json"
    with pytest.raises(ValueError, match=match):
        more(stack, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    with pytest.raises(ValueError, match=match):
        toy.make_run(read_manifest(stack).base_model["name_or_path"], stack, stream=toy.tasks(4)).train()
    with pytest.raises(ValueError, match=match):
        push_stack(stack, "me/stack")
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        verify_stack(stack)


def test_files_and_stack_json_change_together(stack, monkeypatch):
    """Killed between the two, the folder is the one before; killed after stack.json, it is the new one."""
    manifest, before = read_manifest(stack), read_sealed(stack, "metrics.json")
    write_beside(stack, "metrics.json", {**before, "method": "new"})
    assert read_sealed(stack, "metrics.json") == before
    monkeypatch.setattr("hf_jumplora.stack.manifest.finish_sealed", lambda *args: None)
    write_manifest(stack, manifest)
    assert json.loads((stack / "metrics.json").read_text()) == before
    assert read_sealed(stack, "metrics.json")["method"] == "new"
    monkeypatch.undo()
    write_manifest(stack, manifest)
    assert not list(stack.glob(".*"))
    assert json.loads((stack / "metrics.json").read_text())["method"] == "new"
    verify_stack(stack)


def test_hub_json(stack, hub, monkeypatch):
    hub.patch(monkeypatch)
    push_stack(stack, "me/stack")
    assert read_record(stack / RECORD)["repo_id"] == "me/stack"
    text = (stack / RECORD).read_text()
    for wrong in ("[]", text.replace("me/stack", "me/other"), "{"):
        (stack / RECORD).write_text(wrong)
        with pytest.raises(ValueError, match=r"hub\.json is damaged"):
            read_record(stack / RECORD)


# ---- other people's folders and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "run.json", "task_001/adapter_model.safetensors", "task_009/mine"])
def test_somebodys_files_are_kept(name, stack, tmp_path):
    mine = tmp_path / "more" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which would be replaced"):
        more(stack, tmp_path / "more")
    assert mine.read_text() == "mine"
    assert [path for path in (tmp_path / "more").rglob("*") if path.is_file()] == [mine]


def test_a_copy_that_was_killed_goes_on(stack, tmp_path):
    """What is there already is the stack's own."""
    (tmp_path / "more").mkdir()
    shutil.copytree(stack / "task_000", tmp_path / "more" / "task_000")
    more(stack, tmp_path / "more")
    assert verify_stack(tmp_path / "more").task_names == ["size", "light", "mood"]


def test_a_folder_at_work_is_left_alone(stack, tmp_path):
    more(stack, tmp_path / "more")
    before = (tmp_path / "more" / "run.json").read_bytes()
    with in_use(tmp_path / "more"), pytest.raises(RuntimeError, match=r"another (run|process)"):
        more(stack, tmp_path / "more")
    assert (tmp_path / "more" / "run.json").read_bytes() == before


def test_settings_that_a_stack_may_not_bring(stack, tmp_path):
    for key, value in (("args.hub_token", "x"), ("args.output_dir", "/x"), ("args.deepspeed", {}), ("base_dtype", 5)):
        copy = shutil.copytree(stack, tmp_path / key)
        change(copy / "run.json", key, value)
        reseal(copy)
        with pytest.raises(ValueError, match=rf"run\.json.*{key.removeprefix('args.')}") as error:
            more(copy, tmp_path / "more", hub_token="hf_SECRET")
        assert "SECRET" not in str(error.value)


def test_only_what_stack_json_lists_is_downloaded(stack, hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    push_stack(stack, "me/stack")
    repo = hub.repos["me/stack"]
    repo.add(
        "main", "junk", {**repo.resolve("main").files, "task_000/junk": b"x", "task_009/adapter_config.json": b"x"}
    )
    hub.requests.clear()
    more("me/stack", tmp_path / "more", base_model=read_manifest(stack).base_model["name_or_path"])
    assert not [path for _, path in hub.requests if "junk" in path or "task_009" in path]


def test_a_card_edited_on_the_hub_stays(stack, hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    manifest = read_manifest(stack)
    first = shutil.copytree(stack, tmp_path / "first")
    manifest.tasks = manifest.tasks[:1]
    write_manifest(first, manifest)
    push_stack(first, "me/stack")
    repo = hub.repos["me/stack"]
    mine = repo.resolve("main").files["README.md"] + b"by hand\n"
    repo.add("main", "by hand", {**repo.resolve("main").files, "README.md": mine})
    push_stack(stack, "me/stack")
    assert repo.resolve("task-001").files["README.md"] == repo.resolve("task-002").files["README.md"] == mine
    assert "README.md" not in json.loads(repo.resolve("main").files["stack.json"])["files"]


def test_ctrl_c_does_not_wait_for_the_hub(stack, hub, monkeypatch):
    hub.patch(monkeypatch)
    hub.fail(503, "/commit/", retry_after=300)
    pusher = Pusher(stack, "me/stack")
    pusher.start()
    pusher.push()
    while not hub.count("POST", "/commit/"):
        time.sleep(0.01)
    began = time.monotonic()
    pusher.end(KeyboardInterrupt)
    assert time.monotonic() - began < 8


# ---- what a file with right hashes may hold -----------------------------------------------------------------------


KEY = "base_model.model.model.layers.0.self_attn.q_proj.jumplora_"
CRAFTED = {
    "half precision": lambda t: t.update({f"{KEY}A": t[f"{KEY}A"].half()}),
    "integers": lambda t: t.update({f"{KEY}B": t[f"{KEY}B"].int()}),
    "a layer less": lambda t: [t.pop(key) for key in list(t) if key.startswith(KEY)],
    "a weight of the base": lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
    "another task's": lambda t: t.update({f"{KEY}A.task_000": torch.zeros(2, 32)}),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_tensors_that_are_not_the_tasks(name, stack, tmp_path):
    path = stack / "task_001" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    CRAFTED[name](tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    reseal(stack)
    for use in (load_stack, lambda s: merge_stack(s, tmp_path / "out"), lambda s: more(s, tmp_path / "more")):
        with pytest.raises(ValueError, match=r"task_001.adapter_model\.safetensors does not fit"):
            use(stack)


def test_one_layer_list_for_all(stack, tmp_path):
    """A layer that stack.json does not name is not left out by a merge and loaded by `load_stack`."""
    manifest = read_manifest(stack)
    manifest.base_model["layers"].pop("model.layers.0.self_attn.q_proj")
    write_manifest(stack, manifest)
    for use in (load_stack, lambda s: merge_stack(s, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"does not fit: missing .*, unexpected"):
            use(stack)


def test_a_size_that_is_only_claimed(stack):
    """Nothing of the size that a config claims is made before the file's own header says the same."""
    data = json.loads((stack / "task_001" / "adapter_config.json").read_text())
    data["support"]["model.layers.0.self_attn.q_proj"][0] = 2**31 - 1
    (stack / "task_001" / "adapter_config.json").write_text(json.dumps(data))
    from hf_jumplora.stack.manifest import stack_support_sha256

    manifest = read_manifest(stack)
    manifest.tasks[1]["support_sha256"] = stack_support_sha256(data["support"])
    write_manifest(stack, manifest)
    reseal(stack)
    with pytest.raises(ValueError, match=r"jumplora_support should be U8 \[2147483647\]"):
        load_stack(stack)


def test_collisions_of_another_length(stack, tmp_path):
    for value in (None, [], 5):
        change(stack / "task_002" / "task.json", "collision", value)
        reseal(stack)
        with pytest.raises(ValueError, match=r"task_002.task\.json"):
            subset(stack, ["light", "mood"], tmp_path / "out")


def test_code_of_a_base_is_not_run(stack, toy_base, tmp_path):
    base = shutil.copytree(toy_base, tmp_path / "base")
    change(base / "config.json", "auto_map", {"AutoConfig": "evil.EvilConfig"})
    change(base / "config.json", "model_type", "evil")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\n")
    for use in (load_stack, lambda s, base_model: merge_stack(s, tmp_path / "out", base_model)):
        with pytest.raises(ValueError, match="cannot be loaded; pass base_model="):
            use(stack, base_model=base)
    assert not (tmp_path / "evil").exists()


def test_other_weights_beside_a_base(stack, toy_base, tmp_path):
    """A second file of the same names: the merge is of the one that transformers loads, and leaves the other out."""
    base = shutil.copytree(toy_base, tmp_path / "base")
    shutil.copy(base / "model.safetensors", base / "a_copy.safetensors")
    merge_stack(stack, tmp_path / "out", base)
    assert not (tmp_path / "out" / "a_copy.safetensors").exists()
    merged = load_stack(stack, merge=True).state_dict()
    assert all(torch.equal(merged[k], v) for k, v in toy.load_base(tmp_path / "out").state_dict().items())


def test_an_export_that_finds_no_room(stack, tmp_path, monkeypatch):
    def full(*args, **options):
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("hf_jumplora.stack.export.save_file", full)
    with pytest.raises(OSError, match=r"out cannot be written, nothing of it is left"):
        export_sparse(stack, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack"]


# ---- checkpoints --------------------------------------------------------------------------------------------------


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.fixture(scope="module")
def checkpoints(toy_base, tmp_path_factory):
    """Two of the first task, of a run that was interrupted."""

    class Interrupt(toy.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("run")
    options = {"save_strategy": "steps", "save_steps": 2}
    run = toy.make_run(toy_base, folder, stream=toy.tasks(1), callbacks=[Interrupt()], **options)
    with contextlib.suppress(KeyboardInterrupt):
        run.train()
    return folder / "checkpoints" / "task_000"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"]
)
def test_a_checkpoint_that_is_not_whole(name, damage, checkpoints, tmp_path, caplog):
    copy = shutil.copytree(checkpoints, tmp_path / "task_000")
    assert newest_checkpoint(copy).name == "checkpoint-4"
    DAMAGE[damage](copy / "checkpoint-4" / name)
    assert newest_checkpoint(copy).name == "checkpoint-2"
    assert "checkpoint-4 is not complete" in caplog.text

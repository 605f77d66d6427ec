"""The stack on disk: what is damaged, missing, foreign or hostile is refused by name; a full disk loses nothing."""

import builtins
import errno
import hashlib
import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch
import toy
from peft import PeftModel
from transformers import LlamaForCausalLM

from hf_jumplora import load_stack
from hf_jumplora.disk import file_sha256
from hf_jumplora.stack import read_manifest
from hf_jumplora.tuner import named_layers


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])
NAMES = ["size", "light", "mood"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def stack(toy_run, tmp_path):
    """A copy of a finished stack of three tasks."""
    return shutil.copytree(toy_run.output_dir, tmp_path / "stack")


@pytest.fixture
def base(toy_base):
    return toy.load_base(toy_base)


def edit(stack, change):
    """Change stack.json and give it the sha256 that it should then have: a manifest somebody has made so."""
    path = stack / "stack.json"
    data = json.loads(path.read_text())
    change(data)
    data.pop("sha256")
    head = json.dumps(data, indent=2)[:-2] + ',\n  "sha256": "'
    path.write_text(f'{head}{hashlib.sha256(head.encode()).hexdigest()}"\n}}\n')


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [["light"], ["mood", "size"], slice(1, None), slice(None, 2), None], ids=str)
def test_merged_stack_equals_its_parts(choice, stack, toy_base):
    """Merged weights = base + the float32 sum of the updates that live adapters add."""
    chosen = range(3) if choice is None else range(3)[choice] if isinstance(choice, slice) else map(NAMES.index, choice)
    folders = sorted(f"task_00{k}" for k in chosen)
    live = load_stack(stack, tasks=choice)
    assert list(live.peft_config) == folders
    assert live.active_adapter == folders[-1]
    merged = load_stack(stack, tasks=choice, merge=True)
    assert torch.equal(logits(live), logits(merged))
    live.unmerge_adapter()
    torch.testing.assert_close(logits(live), logits(merged), rtol=1e-5, atol=1e-5)
    with live.disable_adapter():
        assert torch.equal(logits(live), logits(toy.load_base(toy_base)))


def test_blend(stack, toy_base, tmp_path):
    """The base and the sum of weight * update, whatever the order of the names; 1 changes nothing and 0 leaves out.
    What PEFT writes of it is the same model."""

    def weights(tasks):
        return {name: layer.base_layer.weight for name, layer in named_layers(load_stack(stack, tasks=tasks))}

    base, size, mood = toy.load_base(toy_base), weights(["size"]), weights(["mood"])
    for name, found in weights({"mood": 0.25, "size": 0.5, "light": 0}).items():
        W = base.get_submodule(name).weight
        expected = W + 0.5 * (size[name] - W) + 0.25 * (mood[name] - W)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for blend, tasks in (dict.fromkeys(NAMES, 1), None), ({"size": 1, "mood": 1.0, "light": 0}, ["size", "mood"]):
        assert torch.equal(logits(load_stack(stack, tasks=blend)), logits(load_stack(stack, tasks=tasks)))
    blend = load_stack(stack, tasks={"mood": 0.25, "size": 0.5})
    blend.save_pretrained(tmp_path / "blend")
    again = PeftModel.from_pretrained(base, tmp_path / "blend", subfolder="task_002")
    torch.testing.assert_close(logits(again), logits(blend), rtol=1e-5, atol=1e-5)


def test_stack_up_to_each_task(stack, toy_base):
    """A task's folder alone brings the tasks before it, as PEFT loads it."""
    for k in range(3):
        one = PeftModel.from_pretrained(toy.load_base(toy_base), stack, subfolder=f"task_00{k}")
        torch.testing.assert_close(logits(one), logits(load_stack(stack, tasks=slice(k + 1))), rtol=1e-5, atol=1e-5)


def test_bf16_base(stack, toy_base):
    """Adapters stay float32, the merged weight is rounded once, and unmerging gives the base back bit for bit."""
    model = load_stack(stack, dtype=torch.bfloat16)
    plain = LlamaForCausalLM.from_pretrained(toy_base, dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "jumplora" in n} == {torch.float32}
    full = load_stack(stack, merge=True).state_dict()
    for name, weight in load_stack(stack, dtype=torch.bfloat16, merge=True).state_dict().items():
        if "q_proj" in name:
            rounded = plain.state_dict()[name].float() + (full[name] - toy.load_base(toy_base).state_dict()[name])
            assert weight.dtype == torch.bfloat16
            torch.testing.assert_close(weight.float(), rounded, rtol=2**-8, atol=1e-6)
    assert not torch.equal(logits(model), logits(plain))
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))


def test_bf16_run(tmp_path):
    """A run over a bf16 base: the stack in memory and on disk are one model."""
    folder = toy.save_base(tmp_path / "base", dtype=torch.bfloat16)
    run = toy.make_run(folder, tmp_path / "run", stream=toy.tasks(2))
    run.train()
    assert run.model.dtype == torch.bfloat16
    assert torch.equal(logits(run.model), logits(load_stack(tmp_path / "run", dtype="auto")))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["sizes"], r"has no task 'sizes'; it has size, light, mood"),
        (["size", "foo"], "has no task 'foo'"),
        ("size", "tasks is a list of names"),
        ([], "chooses none"),
        (slice(5, 6), "chooses none"),
        ({"size": 1.0, "foo": 0.5}, "has no task 'foo'"),
        ({"size": 0.0}, "chooses none"),
        ({"size": -1.0}, "weight of task 'size' is a finite number, 0 or more"),
        ({"size": float("nan")}, "weight of task 'size'"),
        ({"size": "1"}, "weight of task 'size'"),
    ],
    ids=str,
)
def test_unknown_tasks(tasks, message, stack):
    with pytest.raises(ValueError, match=message):
        load_stack(stack, tasks=tasks)


def test_sequential_stack_has_no_parts(toy_base, tmp_path):
    """Each folder of seqlora is a whole model; a subset would be something else than what was trained."""
    toy.make_run(toy_base, tmp_path, "seqlora", stream=toy.tasks(2)).train()
    with pytest.raises(ValueError, match="'seqlora': each of its folders holds the whole model"):
        load_stack(tmp_path, tasks=["size"])
    assert list(load_stack(tmp_path).peft_config) == ["task_001"]


def test_no_stack(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stack\.json does not exist"):
        load_stack(tmp_path)


def test_no_finished_task(stack):
    edit(stack, lambda data: data.update(tasks=[]))
    with pytest.raises(ValueError, match="no finished task yet"):
        load_stack(stack)


# ---- damage ------------------------------------------------------------------------------------------------------

FILES = ["adapter_model.safetensors", "adapter_config.json", "task.json", "README.md"]


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name, stack):
    (stack / "task_001" / name).unlink()
    with pytest.raises(ValueError, match=rf"task_001/{name} is missing; stack\.json lists it"):
        load_stack(stack)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 10, -1], ids=["empty", "head", "last-byte"])
def test_truncated_file(name, size, stack):
    path = stack / "task_001" / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"task_001/{name} is damaged: its sha256 is"):
        load_stack(stack)


def test_every_flipped_bit_of_a_task_is_refused(stack):
    """In any file, at random places; whether read by us alone or before PEFT sees it."""
    rng = random.Random(0)
    for name in FILES:
        path = stack / "task_000" / name
        good = path.read_bytes()
        for position in rng.sample(range(len(good)), 12):
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=rf"task_000/{name} is damaged"):
                load_stack(stack)
        path.write_bytes(good)
    load_stack(stack)


@pytest.mark.parametrize("damage", ["flip", "byte", "cut"])
def test_damaged_manifest(damage, stack):
    """Every byte of stack.json is under its own sha256, white space and the sha256 itself too."""
    path, rng = stack / "stack.json", random.Random(0)
    good = path.read_bytes()
    end = range(len(good) - 90, len(good))  # the key `sha256`, its value, what closes the object
    for position in [*rng.sample(range(len(good)), 150), *end]:
        bad = bytearray(good)
        if damage == "cut":
            bad = bad[:position]
        else:
            bad[position] ^= 1 << rng.randrange(8) if damage == "flip" else rng.randrange(1, 256)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"stack\.json"):
            load_stack(stack)


def test_manifest_of_format_1(stack):
    """It has no sha256 of its own and no list of the files beside it."""
    path, expected = stack / "stack.json", logits(load_stack(stack))
    data = json.loads(path.read_text())
    old = {key: value for key, value in data.items() if key not in ("sha256", "files")}
    path.write_text(json.dumps({**old, "format_version": 1}))
    assert torch.equal(logits(load_stack(stack)), expected)


def test_support_of_another_task(stack):
    """The files fit their sha256, the support does not fit the task: refused before anything is computed with it."""
    for name in ("adapter_model.safetensors",):
        shutil.copy(stack / "task_000" / name, stack / "task_001" / name)
    digest = file_sha256(stack / "task_001" / "adapter_model.safetensors")
    edit(stack, lambda data: data["tasks"][1]["files"].update({"adapter_model.safetensors": digest}))
    with pytest.raises((ValueError, RuntimeError), match=r"task_001"):
        logits(load_stack(stack))


def test_support_hash_of_the_manifest(stack):
    edit(stack, lambda data: data["tasks"][1].update(support_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"task_001/adapter_config\.json: its supports are not those of stack\.json"):
        load_stack(stack)


def test_missing_layer(stack):
    """A weight that is not in the file would stay at its random start."""
    path = stack / "task_001" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights.pop(next(key for key in weights if key.endswith("jumplora_A")))
    safetensors.torch.save_file(weights, path)
    edit(stack, lambda data: data["tasks"][1]["files"].update({path.name: file_sha256(path)}))
    with pytest.raises(ValueError, match=r"task_001/adapter_model\.safetensors does not fit: missing .*jumplora_A"):
        load_stack(stack)


def test_missing_parent_folder(stack, base):
    """Through PEFT: the task is trained on top of the one that is gone. Through load_stack it loads alone."""
    shutil.rmtree(stack / "task_000")
    with pytest.raises(ValueError, match=r"on top of 'task_000', which cannot be loaded"):
        PeftModel.from_pretrained(base, stack, subfolder="task_001")
    with pytest.raises(ValueError, match=r"task_000/.* is missing"):
        load_stack(stack)
    assert list(load_stack(stack, tasks=["light"]).peft_config) == ["task_001"]


# ---- another base ------------------------------------------------------------------------------------------------


def test_base_of_another_architecture(stack, toy_t5):
    with pytest.raises(ValueError, match="trained on a LlamaForCausalLM; this base is a T5ForConditionalGeneration"):
        load_stack(stack, toy.load_base(toy_t5))


def test_base_of_another_shape(stack, tiny_llama):
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.self_attn\.v_proj should be .* \[16, 32\], .* \[32, 32\]"
    ):
        load_stack(stack, tiny_llama(num_key_value_heads=4))


def test_base_with_fewer_layers(stack, tiny_llama):
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.self_attn\.\w_proj should be .* has None"):
        load_stack(stack, tiny_llama(num_hidden_layers=1))


def test_base_of_another_revision(stack, base):
    edit(stack, lambda data: data["base_model"].update(revision="a" * 40))
    base.config._commit_hash = "b" * 40
    with pytest.raises(ValueError, match=r"trained on revision a+ of .*; this is b+"):
        load_stack(stack, base)


def test_base_that_is_gone(stack):
    """A folder that was moved: named, with the way out."""
    edit(stack, lambda data: data["base_model"].update(name_or_path="/nowhere/llama"))
    with pytest.raises(ValueError, match=r"/nowhere/llama, which is not on this machine; pass base_model="):
        load_stack(stack)


def test_base_named_by_a_relative_path(toy_base, tmp_path, monkeypatch):
    """The stack loads from another working directory too."""
    monkeypatch.chdir(os.path.dirname(toy_base))
    toy.make_run(os.path.basename(toy_base), tmp_path / "out", stream=toy.tasks(1)).train()
    monkeypatch.chdir(tmp_path)
    load_stack(tmp_path / "out")


def test_base_without_a_name(stack):
    edit(stack, lambda data: data["base_model"].update(name_or_path=""))
    with pytest.raises(ValueError, match="pass the model itself as base_model="):
        load_stack(stack)


# ---- a manifest from somebody else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["../task_000", "task_000/..", "/etc", "", ".", "task_0", "task_000/", "task_000\n", "C:\\task_000"]
)
def test_folder_outside_of_the_stack(folder, stack):
    edit(stack, lambda data: data["tasks"][0].update(folder=folder))
    with pytest.raises(ValueError, match=r"stack\.json is damaged, or made by somebody else \(tasks\.0\."):
        load_stack(stack)


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "a/b", "a\\b", ".."])
def test_file_outside_of_the_folder(file, stack):
    edit(stack, lambda data: data["tasks"][0]["files"].update({file: "0" * 64}))
    with pytest.raises(ValueError, match=r"stack\.json is damaged, or made by somebody else \(tasks\.0\."):
        load_stack(stack)


def unlisted(data):
    data["tasks"][1]["files"].pop("adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format_version=3),
        lambda data: data.update(more=1),
        lambda data: data.pop("additive"),
        lambda data: data.update(tasks="task_000"),
        lambda data: data.update(tasks=[{"folder": "task_000"}]),
        lambda data: data["tasks"][0].update(name=None),
        lambda data: data["base_model"].pop("architecture"),
        lambda data: data["base_model"].pop("layers"),
        lambda data: data["base_model"].update(architecture="__version__"),
        lambda data: data["base_model"].update(layers=[1]),
        unlisted,  # a file that is loaded and that nobody has checked
    ],
    ids=[
        "version", "unknown-key", "missing-key", "tasks", "entry", "name", "architecture", "layers",
        "not-a-class", "layers-list", "weights-not-listed",
    ],
)  # fmt: skip
def test_manifest_that_cannot_be(change, stack):
    edit(stack, change)
    with pytest.raises(ValueError, match="stack"):
        load_stack(stack)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"7"])
def test_manifest_that_is_no_object(content, stack):
    (stack / "stack.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"stack\.json is damaged"):
        read_manifest(stack)


# ---- a full disk -------------------------------------------------------------------------------------------------


class FullDisk:
    """Raises OSError(ENOSPC) at the n-th thing that is written to a folder."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.left, self.count = str(folder), None, 0
        real_open, real_replace, real_save = builtins.open, os.replace, safetensors.torch.save_file

        def opened(file, mode="r", *args, **kwargs):
            if any(letter in mode for letter in "wax"):
                self.write(file)
            return real_open(file, mode, *args, **kwargs)

        def replaced(source, target):
            self.write(target)
            return real_replace(source, target)

        def saved(tensors, filename, *args, **kwargs):
            self.write(filename)
            return real_save(tensors, filename, *args, **kwargs)

        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr("io.open", opened)  # pathlib's
        monkeypatch.setattr("os.replace", replaced)
        monkeypatch.setattr("peft.peft_model.safe_save_file", saved)

    def write(self, path):
        if str(path).startswith(self.folder) and self.left is not None:
            self.count += 1
            if self.count == self.left:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_full_disk_at_every_write(toy_base, tmp_path, monkeypatch):
    """While the second task is written, at each write in turn: the stack of the first stays loadable, and the same
    command goes on when there is space again."""
    whole, first, stream = tmp_path / "whole", tmp_path / "first", toy.tasks(2, 20, 2)
    toy.make_run(toy_base, whole, stream=stream).train()
    expected = logits(load_stack(whole))
    disk = FullDisk(monkeypatch, tmp_path / "out")
    monkeypatch.setattr("hf_jumplora.report.report.draw_matrix", lambda result, path: None)

    def run(folder):
        made = toy.make_run(toy_base, folder, stream=stream)
        commit = made.record._commit

        def counted(model, task_folder):  # only what is written at the second task's end
            disk.count, on = 0, task_folder == "task_001"
            disk.left = limit if on else None
            try:
                commit(model, task_folder)
            finally:
                disk.left = None

        made.record._commit = counted
        made.train()

    limit = 1
    with pytest.raises(OSError, match="No space left"):  # a run whose first task is there
        run(tmp_path / "out")
    shutil.copytree(tmp_path / "out", first)
    alone = logits(load_stack(first))
    failures = 0
    while True:
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(first, tmp_path / "out")
        try:
            run(tmp_path / "out")
            break
        except OSError:
            failures += 1
        manifest = read_manifest(tmp_path / "out")
        assert manifest.task_names == ["size"]
        assert torch.equal(logits(load_stack(tmp_path / "out")), alone)
        limit += 1
    assert failures > 8  # config, weights, task.json, cards, metrics, report, manifest: each opened and moved
    assert torch.equal(logits(load_stack(tmp_path / "out")), expected)
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_a_path_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_stack(tmp_path / "nowhere")


@pytest.mark.parametrize("other", [False, True], ids=["in-bf16", "other-weights"])
def test_a_base_of_the_same_shape(other):
    """Stacks of earlier versions: the same base in bf16 is the same base; another one of the same shape is not."""
    from hf_jumplora.stack.base import check_base
    from hf_jumplora.stack.manifest import Manifest
    from hf_jumplora.stack.weights import weight_probe

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8))
    described = {"name_or_path": "b", "revision": None, "architecture": "Sequential", "layers": {"1": [8, 8]}}
    manifest = Manifest({**described, "probe": weight_probe(base, ["1"])}, "jumplora", True)
    assert len(manifest.base_model["probe"]) == 16
    if not other:
        check_base(manifest, base.to(torch.bfloat16), "here")
        return
    torch.nn.init.normal_(base[0].weight)
    with pytest.raises(ValueError, match="this base has other weights"):
        check_base(manifest, base, "here")


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        ("jumplora", {"alpha_pattern": {"layers.1.self_attn.k_proj": 64, "k_proj": 4}}),
        ("inclora", {"rank_pattern": {"layers.1.self_attn.k_proj": 4, "k_proj": 1}}),
        ("lora-ga", {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 16}}),
        ("boost", {"alpha_pattern": {"k_proj": 16}}),
    ],
    ids=["alphas", "ranks", "replaced", "rounds"],
)
def test_patterns_are_those_of_training(method, patterns, toy_base, tmp_path):
    """A file sorts the keys of a pattern, and the first that matches a layer counts."""
    adapter = {"target_modules": ["q_proj", "k_proj"], **patterns}
    run = toy.make_run(toy_base, tmp_path, method, toy.tasks(1, 20, 2), adapter)
    run.train()
    ids = torch.tensor([[3, 12, 13, 8]])
    with torch.no_grad():
        loaded = load_stack(tmp_path, toy.load_base(toy_base)).eval()(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, loaded, rtol=1e-5, atol=1e-5)

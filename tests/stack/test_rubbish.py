"""What is no stack, or not the right one: one line that says so, exit code 2, and nothing is left behind."""

import json
import re
import shutil

import pytest
import toy
from transformers import LlamaForCausalLM

from hf_jumplora import ContinualRun, load_stack
from hf_jumplora.cli import main
from hf_jumplora.disk import file_sha256
from hf_jumplora.stack import merge_stack, read_manifest, write_manifest


@pytest.fixture
def copied(toy_run, tmp_path):
    return shutil.copytree(toy_run.output_dir, tmp_path / "stack")


def refused(capsys, folder, *argv):
    """The one line that a command prints when it refuses, having written nothing into `folder`."""
    before = sorted(folder.iterdir())
    assert main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-jumplora: ")
    assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    return error


CONFIGS = {
    "another method's": lambda c: {**c, "peft_type": "LORA"},
    "a rank in words": lambda c: {**c, "r": "two"},
    "an alpha in words": lambda c: {**c, "lora_alpha": "two"},
    "no support": lambda c: {**c, "support": None},
    "a list": lambda c: [c],
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_is_not_the_stacks(name, copied, tmp_path, capsys):
    """With right hashes: every command names the file, and so does `load_stack`."""
    path = copied / "task_001" / "adapter_config.json"
    path.write_text(json.dumps(CONFIGS[name](json.loads(path.read_text()))))
    manifest = read_manifest(copied)
    manifest.tasks[1]["files"]["adapter_config.json"] = file_sha256(path)
    write_manifest(copied, manifest)
    out = tmp_path / "out"
    for argv in (["inspect"], ["merge", "--out", out], ["export", "--format", "sparse", "--out", out]):
        assert str(path) in refused(capsys, tmp_path, argv[0], copied, *argv[1:])
    with pytest.raises(ValueError, match=r"task_001.adapter_config\.json"):
        load_stack(copied)


def test_another_kind_of_base_is_told_before_it_is_loaded(copied, toy_t5, monkeypatch, tmp_path):
    """As a Llama, the T5's config would be filled up with Llama's defaults: seven billion weights."""
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("it is loaded"))
    with pytest.raises(ValueError, match=r"was trained on a LlamaForCausalLM; .* is a T5ForConditionalGeneration"):
        load_stack(copied, base_model=toy_t5)
    (tmp_path / "empty").mkdir()
    for load in (lambda base: load_stack(copied, base), lambda base: merge_stack(copied, tmp_path / "out", base)):
        with pytest.raises(ValueError, match=r"its base model .*empty cannot be loaded; pass base_model="):
            load(tmp_path / "empty")


@pytest.mark.parametrize(
    "argv", ["subset --tasks size", "merge", "export --format sparse", "export --format lora --rank 9"]
)
def test_out_that_cannot_be(argv, copied, tmp_path, capsys, monkeypatch):
    command, *options = argv.split()
    (tmp_path / "file").write_text("of somebody")
    error = refused(capsys, tmp_path, command, copied, *options, "--out", tmp_path / "file" / "out")
    assert f"{tmp_path / 'file' / 'out'} cannot be made; nothing was written" in error
    if command != "subset":  # before the work, not after it
        monkeypatch.setattr("hf_jumplora.stack.operations.open_stack", lambda *args: pytest.fail("it begins"))
    error = refused(capsys, tmp_path, command, copied, *options, "--out", tmp_path / "file")
    assert "exists and is not an empty folder; nothing was written" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("verify STACK --revision task-000", "is for a repository on the Hub"),
        ("remove STACK --tasks size light mood --out OUT", "leaving out all of size, light, mood"),
        ("remove STACK --tasks sise --out OUT", "has no task 'sise'; it has size, light, mood"),
        ("export STACK --format lora --rank 0 --out OUT", "got rank=0"),
        ("export STACK --format lora --rank 4 --min-energy 90 --out OUT", "min_energy is a fraction"),
        ("inspect STACK/task_000", "holds no adapter stack"),
    ],
)
def test_options_that_cannot_be(argv, message, copied, tmp_path, capsys):
    words = [w.replace("STACK", str(copied)).replace("OUT", str(tmp_path / "out")) for w in argv.split()]
    assert re.search(message, refused(capsys, tmp_path, *words))


def test_task_json_that_is_none(copied, tmp_path, capsys):
    (copied / "task_000" / "task.json").write_text("[]")
    manifest = read_manifest(copied)
    manifest.tasks[0]["files"]["task.json"] = file_sha256(copied / "task_000" / "task.json")
    write_manifest(copied, manifest)
    error = refused(capsys, tmp_path, "subset", copied, "--tasks", "size", "--out", tmp_path / "out")
    assert "task.json is damaged" in error


def test_going_on_from_a_damaged_stack_leaves_nothing(copied, tmp_path):
    (copied / "task_001" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"task_001.adapter_model\.safetensors is missing"):
        ContinualRun.from_stack(copied, toy.tasks(4)[3:], tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_names_that_the_hub_does_not_know(toy_run, hub, monkeypatch, tmp_path, capsys):
    hub.patch(monkeypatch)
    for call in (lambda: load_stack("me/none"), lambda: ContinualRun.from_stack("me/none", [], tmp_path / "more")):
        with pytest.raises(FileNotFoundError, match=r"me/none is no folder, and no stack on the Hub \(no such repos"):
            call()
    assert "log in with `hf auth login`" in refused(capsys, tmp_path, "inspect", "me/none")

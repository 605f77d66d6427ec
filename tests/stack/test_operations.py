"""Parts of a stack, another order, differences, merges and exports: each gives the numbers it promises."""

import json
import random
import shutil

import pytest
import safetensors.torch
import torch
import toy
from forks import forks
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_jumplora import load_stack
from hf_jumplora.cli import main
from hf_jumplora.data import Encoder
from hf_jumplora.disk import file_sha256
from hf_jumplora.stack import (
    diff,
    export_lora,
    export_sparse,
    merge_stack,
    read_manifest,
    read_sparse,
    remove,
    reorder,
    subset,
    verify_stack,
)
from hf_jumplora.stack.export import low_rank
from hf_jumplora.stack.manifest import stack_support_sha256, write_manifest
from hf_jumplora.trainer.scoring import evaluate_task


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def stack(toy_run):
    """A finished stack of three tasks; read only."""
    return toy_run.output_dir


@pytest.fixture
def copied(toy_run, tmp_path):
    return shutil.copytree(toy_run.output_dir, tmp_path / "stack")


@pytest.fixture(scope="module")
def isolated(toy_base, tmp_path_factory):
    """Two tasks whose supports have no entry in common."""
    folder = tmp_path_factory.mktemp("isolated")
    adapter = {"isolation": "hard", "threshold_update": "density", "initial_density": 0.2}
    toy.make_run(toy_base, folder, stream=toy.tasks(2), adapter=adapter).train()
    return folder


# ---- damage, in any file -----------------------------------------------------------------------------------------


def test_200_of_200_damaged_files_are_refused(copied):
    """Flipped bits, other bytes and truncations, in every file of a stack in turn; the error names the file."""
    beside = {"hub.json", "history.jsonl", "report.html", "predictions"}  # a run's, not the stack's
    files = sorted(p for p in copied.rglob("*") if p.is_file() and not beside & set(p.relative_to(copied).parts))
    assert {"stack.json", "metrics.json", "README.md", "task.json", "adapter_model.safetensors"} <= {
        path.name for path in files
    }
    rng, refused = random.Random(0), 0
    for number in range(200):
        path = files[number % len(files)]
        good = path.read_bytes()
        bad, at = bytearray(good), rng.randrange(len(good))
        if number % 3 == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            bad[at] ^= rng.randrange(1, 256)
        else:
            bad = bad[:at]
        path.write_bytes(bad)
        loaded = path.parent != copied or path.name == "stack.json"  # what load_stack reads
        with pytest.raises(ValueError, match=str(path)):
            load_stack(copied) if loaded else verify_stack(copied)
        path.write_bytes(good)
        refused += 1
    assert refused == 200
    verify_stack(copied)


def test_files_beside_the_manifest_may_be_edited(copied):
    """A card that somebody has improved does not keep the stack from loading; `verify` names it."""
    (copied / "README.md").write_text("better")
    load_stack(copied)
    assert main(["verify", str(copied)]) == 2


# ---- parts -------------------------------------------------------------------------------------------------------


def test_subset_is_the_chosen_tasks_bit_for_bit(stack, tmp_path):
    part = subset(stack, ["mood", "size"], tmp_path / "part")
    assert part.task_names == ["size", "mood"]
    verify_stack(tmp_path / "part")
    expected = load_stack(stack, tasks=["size", "mood"], merge=True).state_dict()
    found = load_stack(tmp_path / "part", merge=True).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    info = json.loads((tmp_path / "part" / "task_001" / "task.json").read_text())
    whole = json.loads((stack / "task_002" / "task.json").read_text())
    assert (info["folder"], info["index"]) == ("task_001", 1)
    assert info["overlap"] == whole["overlap"][:1]
    assert not (tmp_path / "part" / "metrics.json").exists()


def test_part_through_peft(stack, toy_base, tmp_path):
    """The folders of a part name each other as parents, not what is gone."""
    remove(stack, ["size"], tmp_path / "part")
    model = PeftModel.from_pretrained(toy.load_base(toy_base), tmp_path / "part", subfolder="task_001")
    expected = load_stack(stack, tasks=["light", "mood"])
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


def test_remove_leaves_what_was_there_before(stack, tmp_path, toy_base):
    """Taking out all but the first task gives the model after the first task."""
    remove(stack, ["light", "mood"], tmp_path / "part")
    one = load_stack(stack, tasks=["size"], merge=True).state_dict()
    found = load_stack(tmp_path / "part", merge=True).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in one.items())


@pytest.mark.parametrize(
    ("operation", "tasks", "message"),
    [
        (subset, ["sizes"], "has no task 'sizes'"),
        (remove, ["sizes"], "has no task 'sizes'"),
        (remove, ["size", "light", "mood"], "chooses none"),
        (subset, {"size": 0.5}, "load_stack and merge_stack take weights"),
        (reorder, ["size", "light"], "needs each task once"),
        (reorder, ["mood", "light", "size"], "'light' and 'size' both change .* their order matters"),
    ],
)
def test_parts_that_cannot_be(operation, tasks, message, stack, tmp_path):
    with pytest.raises(ValueError, match=message):
        operation(stack, tasks, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(stack, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        subset(stack, ["size"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_reorder_of_tasks_that_share_nothing(isolated, tmp_path):
    """Every entry gets one update at most: any order gives the same bits."""
    reorder(isolated, ["light", "size"], tmp_path / "out")
    before = load_stack(isolated, merge=True).state_dict()
    after = load_stack(tmp_path / "out", merge=True).state_dict()
    assert read_manifest(tmp_path / "out").task_names == ["light", "size"]
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_diff(stack, isolated, tmp_path):
    remove(stack, ["size"], tmp_path / "part")
    same = diff(stack, tmp_path / "part")
    assert same["only_first"] == ["size"]
    assert not same["base"]
    assert all(row["same"] for row in same["tasks"].values())
    other = diff(stack, isolated)
    assert other["only_first"] == ["mood"]
    assert not other["tasks"]["size"]["same"]
    assert other["tasks"]["size"]["update"] > 0
    assert 0 < other["tasks"]["size"]["kept"] < 1


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tasks", [None, ["light"], {"mood": 0.3, "size": 2}], ids=str)
def test_merge_on_disk_is_the_merge_in_memory(dtype, tasks, stack, toy_base, tmp_path):
    """Over several shards, in the base's own dtype."""
    base = LlamaForCausalLM.from_pretrained(toy_base, dtype=dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    assert merge_stack(stack, tmp_path / "out", tmp_path / "base", tasks) == 4
    expected = load_stack(stack, base, tasks=tasks, merge=True).state_dict()
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(w, v) for w, v in zip(found.values(), toy.load_base(toy_base).state_dict().values()))  # noqa: B905


def test_merge_of_transposed_weights(tmp_path):
    """GPT-2 keeps its weights [in, out]."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    base.save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    run = toy.ContinualRun(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base"),
        toy.tasks(1),
        "jumplora",
        toy.arguments(tmp_path / "run"),
        toy.tokenizer(),
        adapter_config=toy.JumpLoraConfig(r=2, target_modules=["c_attn"]),
    )
    run.train()
    merge_stack(tmp_path / "run", tmp_path / "out")
    found = logits(GPT2LMHeadModel.from_pretrained(tmp_path / "out"))
    assert torch.equal(found, logits(load_stack(tmp_path / "run", merge=True)))
    assert not torch.equal(found, logits(GPT2LMHeadModel.from_pretrained(tmp_path / "base")))


@pytest.fixture(scope="module")
def fresh():
    """Runs code in a process that has PEFT, and not this package."""
    with forks("peft, transformers.models.llama.modeling_llama") as run:
        yield lambda code: run("import sys\nassert 'hf_jumplora' not in sys.modules\n" + code)


def test_merged_stack_loads_without_this_package(fresh, stack, tmp_path):
    merge_stack(stack, tmp_path / "out")
    code = (
        "import sys\nsys.modules['hf_jumplora'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}).eval()\n"
        f"logits = model(torch.tensor({IDS.tolist()})).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    )
    fresh(code)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load_stack(stack, merge=True)))


def test_merge_into_another_base(stack, toy_base, toy_t5, tmp_path):
    with pytest.raises(ValueError, match="trained on a LlamaForCausalLM"):
        merge_stack(stack, tmp_path / "out", toy_t5)
    shutil.copytree(toy_base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.embed_tokens.weight"] = -weights["model.embed_tokens.weight"]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has other weights"):
        merge_stack(stack, tmp_path / "out", tmp_path / "base")
    with pytest.raises(ValueError, match="pass base_model="):
        merge_stack(stack, tmp_path / "out", "/nowhere/llama")
    assert not (tmp_path / "out").exists()


# ---- exports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 20), (600, 700)], ids=str)
def test_low_rank_is_the_best_of_its_rank(shape):
    """Against the full SVD: the randomised one loses almost nothing, and the retained energy is the true one."""
    torch.manual_seed(0)
    M = torch.randn(shape[0], 12) @ torch.randn(12, shape[1]) * (torch.rand(shape) < 0.3)
    S = torch.linalg.svdvals(M.double())
    total = S.square().sum()
    A, B, energy = low_rank(M, rank=8)
    assert A.shape == (8, shape[1])
    assert B.shape == (shape[0], 8)
    measured = 1 - (M - B @ A).double().square().sum() / total
    assert abs(energy - measured) < 1e-6
    assert energy > S[:8].square().sum() / total - 1e-3
    for wanted in (0.5, 0.99, 1.0):
        A, B, energy = low_rank(M, energy=wanted)
        needed = int((S.square().cumsum(0) / total < wanted - 1e-9).sum()) + 1
        assert energy >= wanted - 1e-5
        assert A.shape[0] <= needed + max(3, needed // 20)


def test_low_rank_of_nothing():
    A, B, energy = low_rank(torch.zeros(5, 4), energy=0.9)
    assert energy == 1
    assert not (B @ A).any()


@pytest.mark.parametrize("tasks", [None, {"light": 0.5}], ids=str)
def test_lora_of_full_rank_in_stock_peft(tasks, fresh, stack, toy_base, tmp_path):
    """At full rank nothing is lost; PEFT loads the folder in a process without this package."""
    rows = export_lora(stack, tmp_path / "out", rank=32, tasks=tasks)
    assert len(rows) == 4
    code = (
        "import sys\nsys.modules['hf_jumplora'] = None\nimport torch\nfrom peft import PeftModel\n"
        f"from transformers import LlamaForCausalLM\nbase = LlamaForCausalLM.from_pretrained({toy_base!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'out')!r}).eval()\n"
        f"logits = model(torch.tensor({IDS.tolist()})).logits\ntorch.save(logits, {str(tmp_path / 'logits.pt')!r})"
    )
    fresh(code)
    expected = logits(load_stack(stack, tasks=tasks, merge=True))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_lora_by_energy(stack, toy_base, tmp_path):
    """Ranks differ from layer to layer; the weights in PEFT are those promised, and so is what is missing."""
    rows = export_lora(stack, tmp_path / "out", energy=0.95)
    assert len({rank for rank, _ in rows.values()}) > 1
    assert all(energy > 0.95 - 1e-5 for _, energy in rows.values())
    model = PeftModel.from_pretrained(toy.load_base(toy_base), tmp_path / "out")
    base, full = toy.load_base(toy_base), load_stack(stack, merge=True)
    for layer, (rank, energy) in rows.items():
        lora = model.get_submodule(f"base_model.model.{layer}")
        update = full.get_submodule(layer).weight - base.get_submodule(layer).weight
        assert lora.lora_A["default"].weight.shape[0] == rank
        left = (update - lora.get_delta_weight("default")).double().square().sum() / update.double().square().sum()
        assert abs(1 - left.item() - energy) < 1e-4


def test_lora_that_loses_too_much_is_refused(stack, tmp_path):
    with pytest.raises(ValueError, match=r"rank 1 keeps .* less than min_energy=90%"):
        export_lora(stack, tmp_path / "out", rank=1)
    with pytest.raises(ValueError, match=r"^energy=0.5 keeps .* less than min_energy=90%"):
        export_lora(stack, tmp_path / "out", energy=0.5)
    assert not (tmp_path / "out").exists()
    export_lora(stack, tmp_path / "out", rank=1, force=True)


@pytest.mark.parametrize("options", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}], ids=str)
def test_lora_options_that_cannot_be(options, stack, tmp_path):
    with pytest.raises(ValueError, match=r"rank"):
        export_lora(stack, tmp_path / "out", **options)


def write_stream(folder, rows=None):
    """The toy tasks as a stream file with its data beside it; the labels are not listed in it."""
    for number, name in enumerate(("size", "light")):
        (folder / f"{name}.json").write_text(json.dumps(toy.rows(number, 8, 5) if rows is None else rows))
    entries = [
        {"name": n, "train_file": f"{n}.json", "eval_file": f"{n}.json", "instruction": n} for n in ("size", "light")
    ]
    (folder / "stream.yaml").write_text(json.dumps({"prompt": toy.PROMPT, "tasks": entries}))
    return folder / "stream.yaml"


@pytest.mark.parametrize("data_dir", [True, False], ids=["data_dir", "beside"])
def test_export_says_what_it_costs(data_dir, stack, tmp_path, capsys):
    """The accuracies are those of the stack and, at full rank, the same; the change is printed."""
    write_stream(tmp_path)
    where = tmp_path
    if data_dir:
        where = tmp_path / "streams"
        where.mkdir()
        shutil.move(tmp_path / "stream.yaml", where / "stream.yaml")
    argv = ["export", str(stack), "--format", "lora", "--rank", "32", "--out", str(tmp_path / "out"), "--tasks", "size"]
    argv += ["--stream", str(where / "stream.yaml"), *(["--data_dir", str(tmp_path)] if data_dir else [])]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    tasks = toy.tasks(2)
    model, encoder = load_stack(stack, tasks=["size"], merge=True), Encoder(toy.tokenizer(), 64, False)
    for task in tasks:
        score = f"{100 * evaluate_task(model, encoder, task, 'score', 8):.2f} %"
        assert f"accuracy {score} with the stack, {score} with the LoRA export (+0.00)" in printed
    assert printed.count("retained energy") == 4


def test_export_with_a_bad_stream_writes_nothing(stack, tmp_path, capsys):
    def fails(*options):
        argv = [
            "export",
            str(stack),
            "--format",
            "lora",
            "--rank",
            "32",
            "--out",
            str(tmp_path / "out"),
            *map(str, options),
        ]
        assert main(argv) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    stream = write_stream(tmp_path)
    assert "does not exist" in fails("--stream", tmp_path / "none.yaml")
    assert "does not exist" in fails("--stream", stream, "--data_dir", "/nowhere")
    assert "has no meaning without --stream" in fails("--data_dir", tmp_path)
    assert "pass base_model=" in fails("--stream", stream, "--base_model", "/nowhere/llama")
    write_stream(tmp_path, [{"sentence": "the ant", "team": "x"}])
    assert "column 'label' does not exist" in fails("--stream", stream)
    stream.write_text("tasks: 3")
    assert "must be a list of tasks" in fails("--stream", stream)


def crafted(folder, change, config=None):
    """Rewrite a task's tensors (and config), with every hash as it should be."""
    task = folder / "task_000"
    tensors = safetensors.torch.load_file(task / "adapter_model.safetensors")
    key = next(iter(sorted(tensors))).rsplit(".", 1)[0]
    change(tensors, key)
    safetensors.torch.save_file(tensors, task / "adapter_model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(folder)
    if config is not None:
        content = json.loads((task / "adapter_config.json").read_text())
        config(content)
        (task / "adapter_config.json").write_text(json.dumps(content))
        manifest.tasks[0]["support_sha256"] = stack_support_sha256(content["support"])
    manifest.tasks[0]["files"] = {name: file_sha256(task / name) for name in manifest.tasks[0]["files"]}
    write_manifest(folder, manifest)


CRAFTED = {
    "no A": (lambda t, k: t.pop(f"{k}.jumplora_A"), None),
    "no B": (lambda t, k: t.pop(f"{k}.jumplora_B"), None),
    "no support": (lambda t, k: t.pop(f"{k}.jumplora_support"), None),
    "B of another layer": (lambda t, k: t.update({f"{k}.jumplora_B": torch.ones(3, 2)}), None),
    "A of rank 0": (lambda t, k: t.update({f"{k}.jumplora_A": torch.ones(0, 32)}), None),
    "another rank": (lambda t, k: None, lambda c: c.update(r=7)),
    "a short support": (lambda t, k: t.update({f"{k}.jumplora_support": torch.ones(3).byte()}), None),
    "a config without it": (lambda t, k: None, lambda c: c["support"].pop(next(iter(c["support"])))),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_stack(name, copied, tmp_path, capsys):
    """Right hashes, wrong content: one line that names the file, from every command that needs the tensors."""
    crafted(copied, *CRAFTED[name])
    verify_stack(copied)
    out = str(tmp_path / "out")
    commands = [["merge", str(copied), "--out", out], ["export", str(copied), "--format", "sparse", "--out", out]]
    for argv in (["inspect", str(copied)], *commands):
        assert (main(argv), argv[0]) == (2, argv[0])
        error = capsys.readouterr().err
        assert "adapter_model.safetensors" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"task_000.adapter_model\.safetensors does not fit"):
        load_stack(copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sparse_export(dtype, stack, toy_base, tmp_path):
    sizes = export_sparse(stack, tmp_path / "out", dtype=dtype)
    assert sizes["bytes_per_nonzero"] <= 6 + 2 * (dtype == torch.float32)
    base, full = toy.load_base(toy_base), load_stack(stack, merge=True)
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
    for layer, update in read_sparse(tmp_path / "out").items():
        weight = base.get_submodule(layer).weight + update.to_dense()
        size = update.values().abs().max().item()
        torch.testing.assert_close(weight, full.get_submodule(layer).weight, rtol=0, atol=tolerance * size)


def test_damaged_sparse_export(stack, tmp_path):
    export_sparse(stack, tmp_path / "out")
    path = tmp_path / "out" / "sparse.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    key = next(key for key in tensors if key.endswith("columns"))
    tensors[key] = torch.full_like(tensors[key], 60000)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="do not fit together"):
        read_sparse(tmp_path / "out")

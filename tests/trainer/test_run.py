"""ContinualRun from the first task to the stack on disk: every method, restarts, settings, bad input."""

import hashlib
import json
import shutil

import pytest
import torch
import toy
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from hf_jumplora import ContinualTrainer, JumpLoraConfig, Task, load_stack
from hf_jumplora.methods import METHODS, get_method
from hf_jumplora.ops.sparse import decode_support
from hf_jumplora.report.folder import HISTORY, read_lines
from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies import Strategy
from hf_jumplora.trainer import ContinualRun
from hf_jumplora.trainer.record import RunFolder
from hf_jumplora.trainer.run import RunOutput
from hf_jumplora.tuner import named_layers


SLOW = pytest.mark.slow  # another case of a kind that the default run has
IDS = torch.tensor([[3, 12, 13, 8, 14, 9], [4, 15, 16, 8, 17, 9]])


def logits(model):
    with torch.no_grad():
        extra = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
        return model.eval()(IDS, **extra).logits


def same(a, b):
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-5, atol=1e-5)


def files(folder):
    """sha256 of what a restart must reproduce bit for bit: adapters, their configs and the accuracy matrix."""
    out = {"matrix": json.loads((folder / "metrics.json").read_text())["matrix"]}
    for path in sorted(folder.glob("task_*/adapter_*")):
        out[f"{path.parent.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


# ---- whole runs -------------------------------------------------------------------------------------------------


@SLOW
def test_a_compiled_run(toy_base, tmp_path):
    """The same scores and losses, through tasks that are added, finished and merged, and no graph break."""
    counters = torch._dynamo.utils.counters
    found = []
    for name, options in (("eager", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        torch._dynamo.reset()
        counters.clear()
        run = toy.make_run(toy_base, tmp_path / name, "jumplora-best", **options)
        found.append(
            (
                run.train().metrics["matrix"],
                [line["loss"] for line in read_lines(tmp_path / name / HISTORY) if "loss" in line],
            )
        )
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


# Those that read the earlier tasks while they train: their sum, the entries they take, the stack without the new one.
@pytest.mark.parametrize(
    "method",
    ["jumplora-hard", *(pytest.param(m, marks=SLOW) for m in ("lwf", "jumplora-ella", "ella", "nullspace", "olora"))],
)
def test_folded_and_live_tasks_train_the_same(method, toy_base, tmp_path, monkeypatch):
    """Bit for bit, whether earlier tasks are one sum, or all adapters as for a strategy that reads their factors."""
    held = []
    finish = RunFolder.finish

    def recorded(folder, model, *rest):
        finish(folder, model, *rest)
        held.append(sorted(model.peft_config))

    monkeypatch.setattr(RunFolder, "finish", recorded)
    folded = toy.make_run(toy_base, tmp_path / "folded", method)
    folded.train()
    live = toy.make_run(toy_base, tmp_path / "live", method)
    live.plan.strategies[:] = live.plan.strategies or [Strategy()]
    for kind in {type(strategy) for strategy in live.plan.strategies}:  # its own requirements stay
        monkeypatch.setattr(kind, "requires", kind.requires | {"past_factors"})
    live.train()
    assert held == [["task_000"], ["task_001"], ["task_002"], *([f"task_00{k}" for k in range(n)] for n in (1, 2, 3))]
    assert files(tmp_path / "folded") == files(tmp_path / "live")
    assert torch.equal(logits(folded.model), logits(live.model))


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_threshold_scopes_end_to_end(scope, toy_base, tmp_path):
    """A gate for each block or layer: saved and loaded to the same model."""
    run = toy.make_run(toy_base, tmp_path, adapter={"threshold_scope": scope})
    run.train()
    assert torch.equal(logits(run.model), logits(load_stack(tmp_path)))


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_leaving_a_task_out_removes_exactly_its_update(left_out, toy_run, toy_base):
    """The update is worked out here from the files: scaling * B A on the coded support."""
    names = ["size", "light", "mood"]
    whole = load_stack(toy_run.output_dir, merge=True).state_dict()
    part = load_stack(toy_run.output_dir, tasks=[n for n in names if n != names[left_out]], merge=True).state_dict()
    saved = load_file(toy_run.output_dir / f"task_00{left_out}" / "adapter_model.safetensors")
    changed = 0
    for name, weight in whole.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.jumplora_A" not in saved:
            assert torch.equal(weight, part[name])
            continue
        A, B = saved[f"{key}.jumplora_A"], saved[f"{key}.jumplora_B"]
        update = 8 / 2 * (B @ A) * decode_support(saved[f"{key}.jumplora_support"], tuple(weight.shape))
        torch.testing.assert_close(weight - part[name], update, rtol=0, atol=1e-6)
        changed += int((update != 0).sum())
    assert changed > 100


def test_hard_isolation_never_collides(toy_base, tmp_path):
    """Supports on disk are disjoint, and what the report prints is exactly 0."""
    options = {"isolation": "hard", "threshold_update": "density", "target_density": 0.1}
    run = toy.make_run(toy_base, tmp_path, adapter=options)
    result = run.train().metrics
    for index, info in enumerate(result["trained"]):
        assert info["collision"] == [0.0] * index
        assert info["overlap"] == [0.0] * index
        assert info["density"] > 0
    saved = [load_file(tmp_path / f"task_00{k}" / "adapter_model.safetensors") for k in range(3)]
    for name, layer in named_layers(run.model):
        key, shape = f"base_model.model.{name}.jumplora_support", (layer.out_features, layer.in_features)
        assert sum(decode_support(part[key], shape).int() for part in saved).max() == 1
    # a task under isolation loads without the ones whose entries it avoids
    alone = load_stack(tmp_path, tasks=["mood"], merge=True)
    assert not torch.equal(logits(alone), logits(toy.load_base(toy_base)))


def test_collisions_of_the_report(toy_run):
    """Against a count over the supports in the model; without isolation tasks do collide."""
    info = toy_run.record.trained[2]
    for other in (0, 1):
        both = mine = theirs = entries = 0
        for _, layer in named_layers(toy_run.model):
            a, b = layer.support("task_002"), layer.support(f"task_00{other}")
            both, mine, theirs = both + int((a & b).sum()), mine + int(a.sum()), theirs + int(b.sum())
            entries += a.numel()
        assert info["collision"][other] == both / entries > 0
        assert info["overlap"][other] == both / min(mine, theirs)
    assert info["density"] == mine / entries


# ---- evaluation settings, other kinds of task and model ----------------------------------------------------------


def test_eval_tasks_seen(toy_base, tmp_path):
    """Tasks that are still to come are not evaluated, nor is the model before training."""
    result = toy.make_run(toy_base, tmp_path, eval_tasks="seen").train().metrics
    assert [[score is None for score in row] for row in result["matrix"]] == [
        [True, True, True], [False, True, True], [False, False, True], [False, False, False]
    ]  # fmt: skip
    assert "average_accuracy" in result
    assert "backward_transfer" in result
    assert "forward_transfer_gem" not in result  # it needs the zero-shot row


def test_task_without_an_eval_set(toy_base, tmp_path):
    """Its column stays empty and no metric is made up from it."""
    stream = toy.tasks(2)
    stream[0].eval_dataset = None
    result = toy.make_run(toy_base, tmp_path, stream=stream).train().metrics
    assert [row[0] for row in result["matrix"]] == [None] * 3
    assert None not in [row[1] for row in result["matrix"]]
    assert "average_accuracy" not in result


def generic_tasks():
    """Language-model rows and a metric of one's own: the share of right next tokens."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(3, 30, (24, 6), generator=generator) for _ in range(2)]

    def compute_metrics(prediction):
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"next_token": hits.mean()}

    return [
        Task(name, [{"input_ids": r, "labels": r} for r in rows.tolist()],
             Dataset.from_list([{"input_ids": r, "labels": r} for r in rows[:8].tolist()]),
             compute_metrics, metric="next_token")
        for name, rows in zip(("first", "second"), sets, strict=True)
    ]  # fmt: skip


def test_generic_task_with_compute_metrics(toy_base, tmp_path):
    """Rows as the Trainer takes them; `metric` picks the number that fills the matrix. It is one of all rows: batches
    that are not full are left out of the training alone."""
    tasks, options = generic_tasks(), {"dataloader_drop_last": True, "per_device_eval_batch_size": 5}
    run = toy.make_run(toy_base, tmp_path, stream=tasks, num_train_epochs=10, **options)
    result = run.train().metrics
    rows = torch.tensor(tasks[1].eval_dataset["input_ids"])
    with torch.no_grad():
        hits = run.model.eval()(rows).logits[:, :-1].argmax(-1) == rows[:, 1:]
    assert result["matrix"][-1][1] == pytest.approx(hits.float().mean().item(), abs=1e-6)
    assert result["matrix"][-1][1] > result["matrix"][0][1]


def test_metric_that_is_not_there(toy_base, tmp_path):
    tasks = generic_tasks()
    tasks[1].metric = "f1"
    with pytest.raises(ValueError, match=r"task 'second': compute_metrics gave no 'f1', only .*'next_token'"):
        toy.make_run(toy_base, tmp_path, stream=tasks).train()


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_seq2seq(mode, toy_t5, tmp_path):
    """T5: both kinds of evaluation, and the stack loads as what was trained."""
    run = toy.make_run(toy_t5, tmp_path, stream=toy.tasks(2), eval_mode=mode, num_train_epochs=6)
    result = run.train().metrics
    assert result["matrix"][1][0] > result["matrix"][0][0]  # it has learnt to answer with a label
    assert torch.equal(logits(run.model), logits(load_stack(tmp_path)))
    same(run.model, PeftModel.from_pretrained(toy.load_base(toy_t5), tmp_path, subfolder="task_001"))


def test_generate_and_score_run_on_the_causal_model(toy_base, tmp_path):
    """After enough training both agree on the first task (and it is no longer chance)."""
    options = {"stream": toy.tasks(1), "num_train_epochs": 12, "adapter": {"initial_density": 0.5}}
    by_score = toy.make_run(toy_base, tmp_path / "score", eval_mode="score", **options).train().metrics["matrix"]
    by_words = toy.make_run(toy_base, tmp_path / "generate", eval_mode="generate", **options).train().metrics["matrix"]
    assert by_words[0] == [0.0]  # an untrained model says anything
    assert by_score[1][0] >= 0.75
    assert by_words[1][0] >= 0.75


# ---- restarts ----------------------------------------------------------------------------------------------------

RESTART = {"save_strategy": "steps", "save_steps": 3}  # 8 steps a task: the threshold starts after 1, f is 1 after 6


@pytest.fixture(scope="module")
def straight(toy_base, tmp_path_factory):
    """Files of runs that nobody has killed."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(f"straight-{method}")
            toy.make_run(toy_base, folder, method, **RESTART).train()
            made[method] = files(folder)
        return made[method]

    return get


@pytest.mark.parametrize(
    ("method", "moments"),
    [
        pytest.param("jumplora", ["step task_000 1"], marks=SLOW),  # before the first checkpoint
        ("jumplora-ella", ["step task_001 5"]),  # in the ramp; the penalty's memory is rebuilt
        pytest.param("jumplora", ["step task_002 8"], marks=SLOW),  # after the last step
        ("jumplora", ["checkpoint task_001 6"]),  # the newest checkpoint is not complete
        pytest.param("jumplora", ["evaluate task_001"], marks=SLOW),
        pytest.param("jumplora", ["folder task_000"], marks=SLOW),
        ("jumplora-ella", ["manifest task_001"]),
        pytest.param("seqlora", ["step task_001 4", "manifest task_002"], marks=SLOW),
        pytest.param("mtl", ["step task_000 10"], marks=SLOW),
        ("jumplora", ["step task_000 7", "evaluate task_000", "step task_001 2", "folder task_002"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(m.replace(" ", "-") for m in value),
)
def test_killed_and_started_again(method, moments, straight, toy_base, tmp_path):
    """The same command after a kill gives the same adapters and matrix, bit for bit."""
    for moment in moments:
        toy.killed(toy_base, str(tmp_path), method, moment, RESTART)
    toy.make_run(toy_base, tmp_path, method, **RESTART).train()
    assert files(tmp_path) == straight(method)
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_run_twice_changes_nothing(toy_run, toy_base):
    """The same command on a finished run returns the same metrics and writes the same files."""
    folder = toy_run.output_dir
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = toy.make_run(toy_base, folder)
    with toy.pictures():
        result = again.train().metrics
    assert result == json.loads((folder / "metrics.json").read_text())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert torch.equal(logits(again.model), logits(toy_run.model))


def test_train_twice_on_one_object(toy_base, tmp_path):
    """In a notebook a cell is run again."""
    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(1))
    first, expected = run.train().metrics, logits(run.model)
    assert run.train().metrics == first
    assert torch.equal(logits(run.model), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-2}, r"args\.learning_rate: 0\.01 there, 0\.02 now"),
        ({"seed": 1}, r"args\.seed: 42 there, 1 now"),
        ({"adam_beta2": 0.9}, r"args\.adam_beta2"),
        ({"method": "ella"}, r"method: 'jumplora' there, 'ella' now"),
        ({"adapter": {"bandwidth": 1e-2}}, r"adapter\.bandwidth: 0\.001 there, 0\.01 now"),
        ({"stream": toy.tasks(3)[::-1]}, r"task 0: 'size .* there, 'mood .* now"),
        ({"stream": toy.tasks(2)}, r"task 2: .* there, None now"),
    ],
    ids=["learning-rate", "seed", "adam", "method", "adapter", "order", "fewer-tasks"],
)
def test_other_settings_are_refused_by_name(change, named, toy_run, toy_base):
    change = {"method": "jumplora", **change}
    with pytest.raises(ValueError, match=named):
        toy.make_run(toy_base, toy_run.output_dir, **change).train()
    assert len(read_manifest(toy_run.output_dir).tasks) == 3


@pytest.mark.parametrize("what", ["sentence", "label", "instruction", "prompt", "labels", "eval row"])
def test_another_task_content_is_refused(what, toy_run, toy_base):
    """All that shapes what the model sees or how it is scored belongs to the task."""
    stream = toy.tasks(3)
    task = stream[1]
    if what in ("sentence", "label"):
        other = {"sentence": "the new hen", "label": "dark" if task.train_dataset[3]["label"] == "pale" else "pale"}
        task.train_dataset[3][what] = other[what]
    elif what == "eval row":
        task.eval_dataset = task.eval_dataset[:-1]
    elif what == "labels":
        task.labels = task.labels[::-1]
    else:
        setattr(task, what, f"{{text}} {getattr(task, what)}")
    with pytest.raises(ValueError, match=r"task 1: 'light "):
        toy.make_run(toy_base, toy_run.output_dir, stream=stream).train()


def test_metrics_lost(toy_run, toy_base, tmp_path):
    """Without metrics.json the zero-shot row of the finished tasks is gone for good: an error, not another number."""
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    (folder / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json"):
        toy.make_run(toy_base, folder).train()


def test_settings_may_change_before_anything_is_trained(toy_base, tmp_path):
    """A first attempt that failed on a bad option does not block the corrected command."""
    with pytest.raises(ValueError, match="is larger than layer"):
        toy.make_run(toy_base, tmp_path, adapter={"rank_pattern": {"q_proj": 64}}, stream=toy.tasks(1)).train()
    toy.make_run(toy_base, tmp_path, stream=toy.tasks(2)).train()
    assert read_manifest(tmp_path).task_names == ["size", "light"]


def test_a_stack_without_run_json_is_not_taken_over(toy_run, toy_base, tmp_path):
    """Say a downloaded one: nobody knows whether these tasks and settings belong to it."""
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds a stack but no run\.json"):
        toy.make_run(toy_base, folder).train()


def test_damaged_task_stops_a_restart(toy_run, toy_base, tmp_path):
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    path = folder / "task_001" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"task_001/adapter_model\.safetensors is damaged"):
        toy.make_run(toy_base, folder).train()


def test_folders_of_the_user_stay(toy_run, toy_base, tmp_path):
    """Whatever their names look like."""
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    mine = {"task_notes", "tasks", "task_data_004", "task_1"}
    for name in mine:
        (folder / name).mkdir()
    toy.make_run(toy_base, folder).train()
    assert mine <= {p.name for p in folder.iterdir() if p.is_dir()}


# ---- bad input, before any training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "jumplra"}, r"unknown method 'jumplra' \(did you mean 'jumplora'\?\); known: seqlora"),
        ({"stream": []}, "at least one task"),
        ({"stream": ["size"]}, "got 'size'; load_tasks"),
        ({"stream": [*toy.tasks(2), toy.tasks(1)[0]]}, "two tasks are called 'size'"),
        ({"stream": toy.tasks(1, train=8)}, r"task 'size': 2 optimizer steps are too few .*gate_start=0\.2"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "modules_to_save trains whole weights"),
        ({"adapter": {"parent_adapters": ["task_000"]}}, "parent_adapters and support are set by the run"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "load_best_model"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "pushes checkpoints"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: a task would go on half trained"),
        ({"eval_on_start": True}, "eval_on_start needs eval_strategy"),
        ({"method": "inclora", "num_train_epochs": 0}, "task 'size': num_train_epochs=0 of 32 rows .* make no step"),
        (
            {"method": "inclora", "stream": toy.tasks(1, train=3), "dataloader_drop_last": True},
            "of 3 rows in batches of 4 make no step: .* leave dataloader_drop_last out",
        ),
        ({"adapter": {"rank_pattern": {"v_prj": 1}}}, "rank_pattern: 'v_prj' is the name of no adapted layer; these"),
        ({"adapter": {"alpha_pattern": {"k_proj": 1}}}, "alpha_pattern: 'k_proj' is the name of no adapted layer"),
        ({"eval_mode": "guess"}, r"eval_mode is one of .*got 'guess'"),
        ({"eval_tasks": "none"}, "eval_tasks is one of"),
        ({"max_length": 4}, "max_length = 4"),
        ({"gate_learning_rate": -1.0}, "gate_learning_rate must be positive"),
        ({"method": "ella", "adapter": {"isolation": "hard"}}, "has no gate, and isolation='hard'"),
        ({"adapter": {"threshold_scope": "model"}}, "threshold_scope is one of"),
        ({"adapter": {"gate_start": 0.8, "gate_end": 0.2}}, "gate_start < gate_end"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_options(arguments, message, toy_base, tmp_path):
    """Refused when the run is made: nothing is written."""
    with pytest.raises(ValueError, match=message):
        toy.make_run(toy_base, tmp_path / "out", **{"method": "jumplora", **arguments})
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_none_is_told(toy_base, tmp_path):
    with pytest.warns(UserWarning, match="target_modules: 'k_prj' is the name of no layer that could be adapted"):
        toy.make_run(toy_base, tmp_path, adapter={"target_modules": ["q_proj", "k_prj"]})


def test_a_collator_that_masks_the_end_is_told(toy_base, tmp_path):
    tokenizer, model, rows = toy.tokenizer(), toy.load_base(toy_base), Dataset.from_list([{"input_ids": [3, 1]}] * 32)
    tokenizer.pad_token = tokenizer.eos_token
    collator, adapter = DataCollatorForLanguageModeling(tokenizer, mlm=False), JumpLoraConfig(target_modules=["q_proj"])
    options = {"data_collator": collator, "adapter_config": adapter}
    with pytest.warns(UserWarning, match="the end of sequence is one: no model will learn to end"):
        ContinualRun(model, [Task("a", rows)], args=toy.arguments(tmp_path), processing_class=tokenizer, **options)


def test_known_method_message():
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        get_method("nope")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [({"target_modules": ["q_pro"]}, r"Near names: .*q_proj"), ({"r": 64}, r"r = 64 is larger than layer")],
    ids=["targets", "rank"],
)
def test_adapter_that_does_not_fit(adapter, message, toy_base, tmp_path):
    config = JumpLoraConfig(**{"target_modules": ["q_proj"], **adapter})
    arguments = toy.arguments(tmp_path)
    with pytest.raises(ValueError, match=message):
        ContinualRun(
            toy.load_base(toy_base), toy.tasks(1), "jumplora", arguments, toy.tokenizer(), adapter_config=config
        )


def test_text_tasks_need_a_tokenizer(toy_base, tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        ContinualRun(toy.load_base(toy_base), toy.tasks(1), "jumplora", toy.arguments(tmp_path))


def test_a_peft_model_is_refused(toy_run, tmp_path):
    with pytest.raises(ValueError, match="takes the base model"):
        ContinualRun(toy_run.model, toy.tasks(1), "jumplora", toy.arguments(tmp_path), toy.tokenizer())


def test_too_long_instruction_before_training(toy_base, tmp_path):
    """Found while encoding, before the first step of the first task."""
    stream = toy.tasks(2)
    stream[1].instruction = "light " * 40
    with pytest.raises(
        ValueError, match=r"task 'light': instruction, options and answer take \d+ tokens, max_length is 32"
    ):
        toy.make_run(toy_base, tmp_path, stream=stream).train()
    assert not (tmp_path / "stack.json").exists()


def test_cut_texts_are_counted_once(toy_base, tmp_path):
    """Each text of the task that was cut, in training or evaluation, however often it is evaluated."""
    stream = toy.tasks(2)
    for task in stream:
        task.train_dataset = [{**row, "sentence": row["sentence"] + " very new" * 20} for row in task.train_dataset[:5]]
        task.train_dataset += toy.tasks(1)[0].train_dataset[:0] + stream[0].train_dataset[:0]
    stream[0].train_dataset += toy.rows(0, 27)
    stream[1].train_dataset += toy.rows(1, 27)
    stream[1].eval_dataset[0]["sentence"] += " very new" * 20
    result = toy.make_run(toy_base, tmp_path, stream=stream).train().metrics
    assert [info["truncated"] for info in result["trained"]] == [5, 6]


class _BadPenalty(Strategy):
    """Not a number from the second task on."""

    def __init__(self):
        self.tasks = 0

    def __repr__(self):
        return "BadPenalty"

    def on_task_start(self, model, adapter, examples):
        self.tasks += 1

    def penalty(self, model, inputs, adapter, output):
        return torch.tensor(float("nan")) if self.tasks == 2 else None


def test_nan_loss_keeps_the_last_good_task(toy_base, tmp_path):
    run = toy.make_run(toy_base, tmp_path)
    run.plan.strategies[:] = [_BadPenalty()]
    with pytest.raises(FloatingPointError, match=r"a loss was not finite at or shortly before step 0 of 8"):
        run.train()
    assert read_manifest(tmp_path).task_names == ["size"]
    load_stack(tmp_path)
    with pytest.raises(RuntimeError, match="fresh base model"):  # this object holds a half-trained adapter
        run.train()


def test_callbacks_reach_the_trainers(toy_base, tmp_path):
    """And a task that is stopped is an error, not a stack with a half-open gate."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    with pytest.raises(RuntimeError, match="stopped at step 3 of 8"):
        toy.make_run(toy_base, tmp_path, callbacks=[Stop()]).train()


@pytest.mark.parametrize("method", ["jumplora-ella", "jumplora-best"])
def test_sfttrainer_class_in_a_run(method, toy_base, tmp_path):
    """Any trainer class made by make_continual, with its own arguments."""
    trl = pytest.importorskip("trl")
    from hf_jumplora import ContinualSFTTrainer

    texts = Dataset.from_dict({"text": [row["sentence"] for row in toy.rows(0, 32)]})
    args = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=16,
    )  # fmt: skip
    run = ContinualRun(
        toy.load_base(toy_base), [Task("a", texts), Task("b", texts)], method, args, toy.tokenizer(),
        trainer_cls=ContinualSFTTrainer, adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    run.train()
    assert torch.equal(logits(run.model), logits(load_stack(tmp_path)))


# ---- what is written ---------------------------------------------------------------------------------------------


def test_written_files(toy_run):
    """Nothing pickled, no checkpoint of a finished task, readable by others, and the card says how to load."""
    folder = toy_run.output_dir
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md", "task.json"}
    top = {"stack.json", "metrics.json", "run.json", "README.md", "report.md", "report.html", "history.jsonl"}
    top |= {f"predictions/{name}.jsonl" for name in ("rows", "after_001", "after_002", "after_003")}
    drawn = {"matrix.png", "overlap.png"}  # with matplotlib; hub.json: where another test has pushed this run
    assert names - drawn - {"hub.json"} == top | {f"task_00{k}/{name}" for k in range(3) for name in own}
    for name in names:
        if not name.endswith(".safetensors"):  # that library makes its files private
            assert (folder / name).stat().st_mode & 0o777 == 0o644, name
    card = (folder / "README.md").read_text()
    for part in ("import hf_jumplora", 'load_stack("', "size, light, mood", "BWT = mean", 'subfolder="task_002"'):
        assert part in card
    assert "library_name: peft" in card
    info = json.loads((folder / "task_001" / "task.json").read_text())
    assert (info["name"], info["labels"], info["instruction"]) == ("light", ["dark", "pale"], "light")
    assert (info["steps"], info["train_examples"], info["effective_batch"]) == (8, 32, 4)
    assert info["support_sha256"] == read_manifest(folder).tasks[1]["support_sha256"]


def test_base_weights_are_not_changed_for_good(toy_base, tmp_path):
    """Merged updates can be taken out again, bit for bit, after three tasks."""
    run = toy.make_run(toy_base, tmp_path)
    run.train()
    run.model.unmerge_adapter()
    base = toy.load_base(toy_base).state_dict()
    for name, layer in named_layers(run.model):
        assert torch.equal(layer.base_layer.weight, base[f"{name}.weight"])


def test_the_output_can_still_be_used_as_a_dict():
    """For one version, and it says so."""
    output = RunOutput({"matrix": [[0.5]], "method": "jumplora"})
    with pytest.warns(FutureWarning, match=r"train\(\)\.metrics"):
        assert output["matrix"] == [[0.5]]
    with pytest.warns(FutureWarning):
        assert dict(output) == output.metrics
    with pytest.warns(FutureWarning):
        assert "average_accuracy" not in output


def test_default_trainer_class():
    assert ContinualRun.__init__.__kwdefaults__["trainer_cls"] is ContinualTrainer


def test_evaluating_before_the_finished_tasks_are_loaded(toy_base, tmp_path):
    """It would score the bare base model."""

    def run():
        return ContinualRun(toy.load_base(toy_base), toy.tasks(1), "inclora", toy.arguments(tmp_path), toy.tokenizer())

    matrix = run().train().metrics["matrix"]
    again = run()
    with pytest.raises(RuntimeError, match="call train\\(\\) first"):
        again.evaluate()
    again.train()
    assert again.evaluate() == {"size": matrix[-1][0]}


def test_what_a_run_was_told_by_its_old_names(toy_run):
    """For one version; they can be read, and none can be set without effect."""
    with pytest.warns(FutureWarning, match="scoring now"):
        from hf_jumplora.trainer import evaluation
    with pytest.warns(FutureWarning, match=r"hf_jumplora\.data now"):
        from hf_jumplora.trainer import tasks
    assert evaluation.evaluate_task.__module__ == "hf_jumplora.trainer.scoring"
    assert tasks.Encoder is type(toy_run.encoder)
    for name in ("tasks", "config", "strategies", "encoder"):
        assert getattr(toy_run, name) is getattr(toy_run.plan, name)
        with pytest.raises(AttributeError):
            setattr(toy_run, name, None)
    assert toy_run.manifest.task_names == ["size", "light", "mood"]

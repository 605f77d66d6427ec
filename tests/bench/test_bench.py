"""The comparison of methods: who is tuned on what, what is never repeated, what stands in the table."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import toy

from hf_jumplora import LanguageModelTask
from hf_jumplora.bench import cell as cell_module
from hf_jumplora.bench import runner
from hf_jumplora.bench.data import bench_tasks, tokens_around_text
from hf_jumplora.bench.protocol import (
    BUDGETS,
    best_point,
    chosen_methods,
    grid,
    next_point,
    read_variants,
    tuned_option,
)
from hf_jumplora.bench.table import mean_matrix, spread, summary
from hf_jumplora.methods import METHODS
from hf_jumplora.strategies import Ella


SMALL = BUDGETS["small"]


@pytest.fixture
def stream(tmp_path):
    """Three toy tasks in the folder layout."""
    folder, lines = tmp_path / "data", ["tasks:"]
    for task in toy.tasks(3, 48, 12):
        (folder / task.name).mkdir(parents=True)
        train = [{**row, "sentence": f"{row['sentence']} {i}"} for i, row in enumerate(task.train_dataset)]
        test = [{**row, "sentence": f"{row['sentence']} test{i}"} for i, row in enumerate(task.eval_dataset)]
        for name, rows in (("train", train), ("test", test), ("labels", task.labels)):
            (folder / task.name / f"{name}.json").write_text(json.dumps(rows))
        lines += [f"- name: {task.name}", f"  folder: {task.name}", f"  instruction: {task.instruction}"]
    (folder / "toy.yaml").write_text("\n".join(lines))
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def test_test_rows_are_never_tuned_on(stream):
    """Tuning sees training rows of the first two tasks alone; nobody trains on the dev rows."""
    budget = dataclasses.replace(SMALL, dev_rows=9, batch=16, steps=10, tune_steps=2)
    tune = bench_tasks(stream, None, None, budget, tune=True)
    final = bench_tasks(stream, None, None, budget, tune=False)
    assert [t.name for t in tune] == ["size", "light"]
    assert [t.name for t in final] == ["size", "light", "mood"]
    for tuned, trained in zip(tune, final, strict=False):
        dev = {row["sentence"] for row in tuned.eval_dataset}
        assert len(dev) == 9
        assert not any("test" in sentence for sentence in dev)
        assert all("test" in row["sentence"] for row in trained.eval_dataset)
        for rows in (tuned.train_dataset, trained.train_dataset):
            assert not dev & {row["sentence"] for row in rows}
        assert len(tuned.train_dataset) == 32
        assert len(trained.train_dataset) == 39


def test_held_out_tasks_are_evaluated_alone(stream, tmp_path):
    """They are no part of tuning, stand behind the others, and lose no row to training."""
    (tmp_path / "wiki.txt").write_text("\n".join(f"text {i}" for i in range(40)))
    budget = dataclasses.replace(SMALL, dev_rows=9, batch=16, steps=1, test_rows=7)
    options = {"held_out": ["light"], "general_text": str(tmp_path / "wiki.txt")}
    tune = bench_tasks(stream, None, None, budget, tune=True, **options)
    final = bench_tasks(stream, None, None, budget, tune=False, **options)
    assert [t.name for t in tune] == ["size", "mood"]
    assert [(t.name, t.held_out) for t in final][2:] == [("light", True), ("general_text", True)]
    assert [len(t.eval_dataset) for t in final] == [7, 7, 7, 7]


def test_prompts_do_not_count(stream):
    """A budget's tokens are those of the text, whatever the prompt; plain text has none."""
    tasks = bench_tasks(stream, None, "jumplora", SMALL, tune=False)
    tokenizer, prompts = toy.tokenizer(), [task.render("") for task in tasks]
    longest = max(len(tokenizer(text).input_ids) for text in prompts) + 2  # one token an answer, and the end
    assert tokens_around_text(tokenizer, tasks) == longest
    assert tokens_around_text(tokenizer, [LanguageModelTask("a", [{"text": "x"}])]) == 0


def test_coordinate_search():
    """All rates with the first weight, then the other weights with the best rate; failed points are never the best."""
    scores = {(1e-3, 3e4): 0.5, (3e-3, 3e4): 0.7, (3e-3, 3e5): None, (3e-3, 3e3): 0.6}
    done = []
    while (point := next_point("ella", SMALL, done)) is not None:
        done.append({**point, "score": scores[point["rate"], round(point["weight"])]})
    assert [(p["rate"], round(p["weight"])) for p in done] == list(scores)
    assert best_point(done)["score"] == 0.7
    assert best_point([{"score": None}]) == {}
    assert grid("inclora", SMALL) == (SMALL.rates, (None,))
    failed = [{"rate": rate, "weight": None, "score": None} for rate in SMALL.rates]
    assert next_point("inclora", SMALL, failed) is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_grid(method):
    """What is tuned can be set: the strategies are made with the last value that the largest grid holds."""
    _, weights = grid(method, BUDGETS["full"])
    strategies = cell_module.strategies_of(method, weights[-1])
    assert len(strategies) == len(METHODS[method].strategies)
    if option := tuned_option(method):
        name, field = option[0].split(".")
        strategy = next(s for s in strategies if type(s).__name__.lower() == name)
        assert getattr(strategy, field) == weights[-1]


def test_names_of_methods():
    assert chosen_methods(["all"]) == list(METHODS)
    assert chosen_methods(["ella", "inclora", "ella"]) == ["ella", "inclora"]
    with pytest.raises(ValueError, match="unknown method 'elle'; known: all, seqlora"):
        chosen_methods(["elle"])


def test_tensor_bytes():
    """Nested and shared tensors; a view counts the storage it keeps alive, once."""
    weight = torch.zeros(10, 10)
    ella = Ella()
    ella.past = {"a": weight, "b": weight[:2]}
    assert cell_module.tensor_bytes([vars(ella), {"c": [torch.zeros(3, dtype=torch.int64)]}]) == 400 + 24


def test_spread_and_mean():
    assert spread([0.5, 0.7], 100) == "60.0 ± 14.1"
    assert spread([0.5]) == "0.5"
    assert spread([0.5, None]) == spread([]) == "-"
    assert mean_matrix([[[None, 0.2]], [[None, 0.4]]]) == [[None, pytest.approx(0.3)]]


def in_this_process(monkeypatch, started):
    """Cells run here instead of in processes of their own; returns what was started."""

    def process(self, name, job):
        started.append(name)
        file = self.output_dir / "logs" / "job.json"
        file.write_text(json.dumps(job))
        cell_module.main([str(file)])
        return 0

    monkeypatch.setattr(runner.Bench, "_process", process)


def test_bench(stream, bert, tmp_path, monkeypatch):
    """A whole bench; a second call repeats nothing, a lost cell is run again, a failure stays in the table and says
    why, other settings are refused."""
    started = []
    in_this_process(monkeypatch, started)
    tiny = dataclasses.replace(BUDGETS["tiny"], rates=(1e-3, 1e-2))
    monkeypatch.setitem(BUDGETS, "tiny", tiny)

    def bench(**options):
        defaults = {"budget": "tiny", "model": bert, "threads": 1}
        return runner.Bench(str(stream), tmp_path / "out", **{**defaults, **options})

    text = bench().run(["inclora", "jumplora", "mtl"], 2)
    assert sorted(started) == sorted(
        [f"tune-{m}" for m in ("inclora", "jumplora", "mtl")]
        + [f"final-{m}-s{s}" for m in ("inclora", "jumplora", "mtl") for s in (0, 1)]
    )
    cells = tmp_path / "out" / "cells"
    assert len(list(cells.glob("tune-inclora-p*.json"))) == 2
    run = json.loads((cells / "final-jumplora-s1.json").read_text())
    assert run["error"] is None
    assert run["spec"]["seed"] == 1
    assert str(tmp_path) not in json.dumps(run)  # cells are published
    assert {"torch", "peft"} <= set(run["versions"])
    assert [len(run[key]) for key in ("state_bytes", "learning_curve")] == [3, 3]
    assert len(run["metrics"]["matrix"]) == 4
    numbers = summary(run)
    assert 0 < numbers["density"] < 1
    assert 0 < numbers["collision"] < 1
    line = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ") for row in text.splitlines() if " | " in row}
    assert line["inclora"][9] == "1.00"
    assert line["mtl"][-1] == "2 seeds"
    assert "| 8 |" in text

    started.clear()
    (cells / "final-inclora-s1.json").unlink()
    bench().run(["inclora", "jumplora", "mtl"], 2)
    assert started == ["final-inclora-s1"]

    def breaks(spec):
        raise RuntimeError("this cannot | work")

    started.clear()
    monkeypatch.setattr(cell_module, "run_cell", breaks)
    text = bench().run(["inclora", "seqlora"], 2)
    assert started == ["tune-seqlora"]
    assert "| failed: tuning failed: RuntimeError: this cannot / work |" in text
    with pytest.raises(ValueError, match=r"holds a bench of other settings \(setting: 'encoder' there, 'causal' now"):
        bench(setting="causal").run(["inclora"], 1)


def test_untuned_smollm2(stream, toy_base, tmp_path, monkeypatch):
    """The setting takes its own model and reads prompts; a budget that tunes nothing has no tuning cells, takes all
    rows to train on and leaves every method at its own defaults."""
    started = []
    in_this_process(monkeypatch, started)
    monkeypatch.setattr(runner, "smollm2", lambda: Path(toy_base))
    monkeypatch.setitem(BUDGETS, "untuned", dataclasses.replace(BUDGETS["untuned"], steps=3, test_rows=8))
    variants = {"own": {"method": "inclora", "adapter": {}, "strategy": [], "rates": [0.02]}}
    bench = runner.Bench(str(stream), tmp_path, budget="untuned", setting="smollm2", threads=1, variants=variants)
    text = bench.run(["lwf", "own"], 1)
    assert started == ["final-lwf-s0", "final-own-s0"]
    assert json.loads((tmp_path / "cells" / "final-own-s0.json").read_text())["spec"]["rate"] == 0.02
    run = json.loads((tmp_path / "cells" / "final-lwf-s0.json").read_text())
    assert run["error"] is None
    assert (run["spec"]["rate"], run["spec"]["weight"]) == (1e-3, None)
    assert run["spec"]["max_length"] > BUDGETS["untuned"].max_length
    settings = json.loads((tmp_path / "bench.json").read_text())
    assert [task["train_examples"] for task in settings["tasks"]] == [48] * 3
    assert "failed" not in text
    (tmp_path / "bench.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))  # made on a GPU
    with pytest.raises(ValueError, match=r"holds a bench of other settings \(dtype: 'bfloat16' there, None now"):
        bench.run(["own"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "huge"}, "unknown budget 'huge'; known: tiny, untuned, untuned-gpu, .*, long, full"),
        ({"setting": "decoder"}, "setting is 'encoder', 'causal' or 'smollm2', got 'decoder'"),
        ({"setting": "smollm2", "model": "gpt2"}, "the setting 'smollm2' has its model: leave it out"),
        ({"prompt_style": "olora"}, "the encoder reads texts without a prompt"),
        ({"general_text": "x.txt"}, "the encoder is no language model: general_text is for the setting 'causal'"),
        ({"jobs": 0}, "jobs must be 1 or more"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        runner.Bench("order1", tmp_path, **options)


def test_general_ability(stream, toy_base, tmp_path, monkeypatch):
    """In the causal setting: cross-entropy of text and accuracy of a held-out task, before and after, for each method.
    A method that the setting cannot run stays in the table with its reason."""
    (tmp_path / "wiki.txt").write_text("the cat very new\n" * 8)
    in_this_process(monkeypatch, [])

    def bench(**options):
        return runner.Bench(str(stream), tmp_path / "out", budget="tiny", setting="causal", model=toy_base, **options)

    tiny = dataclasses.replace(BUDGETS["tiny"], steps=2, tune_steps=2)
    monkeypatch.setitem(BUDGETS, "tiny", tiny)
    options = {"held_out": ["mood"], "general_text": str(tmp_path / "wiki.txt")}
    text = bench(**options).run(["inclora", "mtl", "jumplora"], 1)
    assert "| method | mood accuracy % | general_text token accuracy % | general_text cross-entropy |" in text
    line = next(row for row in text.split("## General ability")[1].splitlines() if row.startswith("| inclora |"))
    cell = json.loads((tmp_path / "out" / "cells" / "final-inclora-s0.json").read_text())
    before, *_, after = (row["general_text cross_entropy"] for row in cell["metrics"]["general"])
    assert f"| {before:.4f} → {after:.4f} |" in line
    assert cell["spec"]["max_length"] > tiny.max_length
    assert f"at most {cell['spec']['max_length']} tokens with the prompt" in text
    assert len(cell["learning_curve"]) == 2
    assert "| jumplora | - | - |" in text  # two steps are too few for its ramp
    assert "failed: tuning failed: ValueError: task 'size': " in text
    assert "| trained on | size | light |" in text
    with pytest.raises(ValueError, match=r"holds a bench of other settings .*held_out"):
        bench(general_text=options["general_text"]).run(["inclora"], 1)


def test_a_process_that_dies(stream, bert, tmp_path, monkeypatch):
    """It does not end the bench: its cell holds the exit code."""
    monkeypatch.setattr(runner.Bench, "_process", lambda self, name, job: -9)
    text = runner.Bench(str(stream), tmp_path / "out", budget="tiny", model=bert).run(["inclora"], 1)
    assert "failed: tuning failed: the process ended with code -9" in text


def write_variants(path, text):
    path.write_text(text)
    return path


def test_variants(stream, bert, tmp_path, monkeypatch):
    """A method with other options is a row of its own, trained with them; other options under its name are refused."""
    started, optimizers = [], []
    in_this_process(monkeypatch, started)

    class Arguments(cell_module.ContinualTrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            optimizers.append(self.factor_optimizer)

    monkeypatch.setattr(cell_module, "ContinualTrainingArguments", Arguments)
    variants = read_variants(
        write_variants(
            tmp_path / "v.yaml",
            "jumplora-p30:\n  method: jumplora\n  adapter: {threshold_update: density, target_density: 0.3, r: 4}\n"
            "ella-new:\n  method: ella\n  strategy: [ella.weight=5]\n"
            "as-new:\n  method: ella\n  tuned_as: ella-new\n  adapter: {r: 4}\n"
            "by-muon:\n  method: inclora\n  rates: [0.02]\n  training: {factor_optimizer: muon}\n",
        )
    )

    def bench(variants):
        return runner.Bench(str(stream), tmp_path / "out", budget="tiny", model=bert, threads=1, variants=variants)

    names = ["jumplora-p30", "ella-new", "as-new", "ilora", "by-muon"]
    text = bench(variants).run(chosen_methods(names, variants), 1)
    assert len(started) == 9
    assert "tune-as-new" not in started
    assert all(f"| {name} |" in text for name in names)
    assert "failed" not in text  # ilora asks the encoder for its hidden states
    cell = json.loads((tmp_path / "out" / "cells" / "final-jumplora-p30-s0.json").read_text())
    assert cell["error"] is None
    assert all(0.25 < info["density"] < 0.35 for info in cell["metrics"]["trained"])
    assert json.loads((tmp_path / "out" / "cells" / "final-ella-new-s0.json").read_text())["spec"]["weight"] == 3e4
    assert optimizers.count("muon") == 2  # by-muon's tuning and its run
    assert json.loads((tmp_path / "out" / "cells" / "final-by-muon-s0.json").read_text())["spec"]["rate"] == 0.02
    started.clear()
    bench({}).run(["ilora"], 1)
    bench(variants).run(names, 1)
    assert started == []
    variants["jumplora-p30"]["adapter"]["target_density"] = 0.1
    with pytest.raises(ValueError, match=r"holds a bench of other settings \(variants: .*0\.3.* there"):
        bench(variants).run(names, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "write NAME: {method"),
        ("a: {method: [", "is not valid YAML"),
        ("a: {adapter: {}}", "it has a method"),
        ("a: {method: ella, weight: 3}", "it has a method and may have"),
        ("ella: {method: ella}", "the name must be new"),
        ("a/b: {method: ella}", "the name must be new"),
        ("a: {method: elle}", "unknown method 'elle'"),
        ("a: {method: ella, strategy: [kfac.weight=3]}", "'ella' has ella"),
        ("a: {method: ella, adapter: {rank: 3}}", "no option 'rank'"),
        ("a: {method: ella, adapter: [r]}", "variant 'a'"),
        ("a: {method: jumplora, adapter: {threshold_update: often}}", "threshold_update"),
        ("a: {method: ella, training: {max_steps: 3}}", "training may have .* got 'max_steps'"),
        ("a: {method: ella, training: 3}", "variant 'a'"),
        ("a: {method: ella, rates: []}", "rates is a list"),
        ("a: {method: ella, rates: [1e-3]}", "rates is a list"),  # YAML takes it for a string
        ("a: {method: ella, tuned_as: elle}", "tuned_as names 'elle'"),
        ("a: {method: ella, tuned_as: b}\nb: {method: ella, tuned_as: ella}", "tuned_as names 'b'"),
    ],
)
def test_bad_variants(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_variants(write_variants(tmp_path / "v.yaml", text))


@pytest.mark.slow
def test_cells_are_processes(stream, toy_base, tmp_path):
    """The causal setting with the data set named in the prompt, through real processes."""
    from hf_jumplora.cli import main

    line = ["bench", "--stream", str(stream), "--budget", "tiny", "--setting", "causal", "--model_name_or_path"]
    line += [toy_base, "--prompt_style", "olora", "--methods", "inclora", "--seeds", "1", "--jobs", "2"]
    assert main([*line, "--output_dir", str(tmp_path / "out"), "--threads", "1"]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| inclora |" in text
    assert "failed" not in text
    assert "Warning: the prompt names the data set" in text

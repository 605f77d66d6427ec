"""What people read at the end: the table, report.md, the picture and the model card."""

import copy
import json
import re

import pytest

from hf_jumplora.metrics.derived import derive
from hf_jumplora.report.folder import read_run
from hf_jumplora.report.page import write_page
from hf_jumplora.report.report import PICTURES, comparison, draw_matrix, pairs, table, write_report
from hf_jumplora.report.verdict import judge_metrics


def info(name, **more):
    values = {"name": name, "density": 0.1234, "steps": 8, "train_examples": 32, "effective_batch": 4, "truncated": 2}
    return {**values, "seconds": 1.5, "seed": 0, **more}


@pytest.fixture
def result():
    matrix = [[0.1, 0.2, None], [0.9, 0.25, None], [0.6, 0.8, None]]
    made = derive(matrix, ["first", "second", "third"], continual=True)
    made["method"] = "jumplora"
    made["trained"] = [
        info("first", collision=[], overlap=[]),
        info("second", collision=[0.0125], overlap=[0.25]),
    ]
    return made


def test_table(result):
    """Percent, aligned, a dash for what was not evaluated, every number with its formula."""
    lines = table(result, "jumplora").splitlines()
    assert lines[2].split() == ["trained", "on", "first", "second", "third", "density"]
    assert lines[4].split() == ["before", "training", "10.0", "20.0", "-"]
    assert lines[6].split() == ["2.", "second", "60.0", "80.0", "-", "12.3", "%"]
    assert len({len(line) for line in lines[2:7]}) == 1
    text = "\n".join(lines)
    assert "average accuracy (AA)      70.0   AA = mean_j a[T-1][j]" in text
    assert "backward transfer (BWT)   -30.0" in text


def test_comparison(result):
    """Side by side; a joint run has an average alone."""
    joint = derive([[0.1, 0.2, None], [0.9, 0.9, 0.9]], ["first", "second", "third"], continual=False)
    joint["trained"] = [info("joint")]
    lines = comparison({"jumplora": result, "mtl": joint}).splitlines()
    assert lines[-2].split() == ["jumplora", "70.0", "-30.0", "30.0", "85.0", "12.3", "%", "3"]
    assert lines[-1].split() == ["mtl", "90.0", "-", "-", "-", "12.3", "%", "2"]


def test_comparison_of_general_ability(result):
    """Of the methods that have measured it; before and after."""
    plain = copy.deepcopy(result)
    result["general"] = [{"wiki cross_entropy": 3.25}, {}, {"wiki cross_entropy": 3.5}]
    lines = comparison({"jumplora": result, "ella": plain}).splitlines()
    assert "wiki cross-entropy, change" in lines[-4]
    assert [line.split()[-1] for line in lines[-2:]] == ["+0.2500", "-"]


def test_report_file(result, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_jumplora.report.report.draw_matrix", lambda result, path: path.write_text("picture"))
    write_report(tmp_path, result)
    text = (tmp_path / "report.md").read_text()
    assert "| 2. second | 60.0 | 80.0 | - | 12.3 % |" in text
    assert "| second | first | 1.2500% | 25.00% |" in text
    assert "| second | 8 | 32 | 4 | 2 | 12.34% | 2 |" in text
    assert "`BWT = mean_{j<T-1} (a[T-1][j] - a[j][j])`" in text
    for line in text.splitlines():  # every table row has as many cells as its head
        if line.startswith("|"):
            assert line.endswith("|")


def data(name, metric="accuracy", **more):
    values = {"name": name, "source": "", "train_examples": 32, "eval_examples": 8, "metric": metric, "held_out": False}
    return {**values, "prompt_style": "olora", "prompt": "Task:TC", "names_in_prompt": [], **more}


def test_general_ability_and_data(result, tmp_path):
    """What was not measured at some point is a dash; a task added later has no change."""
    result["data"] = [data("first"), data("second", "rouge_l", names_in_prompt=["second"]), data("wiki", held_out=True)]
    result["general"] = [{"wiki cross_entropy": 3.25}, {}, {"wiki cross_entropy": 3.5, "imdb accuracy": 0.75}]
    write_report(tmp_path, result, draw=False)
    text = (tmp_path / "report.md").read_text()
    assert "| before training | 3.2500 | - |" in text
    assert "| 2. second | 3.5000 | 75.0 |" in text
    assert "| change | +0.2500 | - |" in text
    assert text.splitlines()[2].startswith("**Warning: the prompt names the data set** (second)")
    assert "Score in % (first: accuracy, second: rouge_l). Row:" in text
    assert "| wiki | - | 32 | 8 | accuracy | olora | no, held out |" in text
    assert "general ability" in table(result, "jumplora")


def test_report_before_training(tmp_path):
    """The zero-shot row alone: no picture, no metric."""
    result = {**derive([[0.1, 0.2]], ["a", "b"], True), "method": "ella", "trained": []}
    write_report(tmp_path, result)
    assert "| before training | 10.0 | 20.0 |" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "matrix.png").exists()


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    draw_matrix(result, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.png"]


def test_report_without_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_report(tmp_path, result)
    assert "matrix.png" not in (tmp_path / "report.md").read_text()


def test_pairs_without_a_gate(result):
    plain = copy.deepcopy(result)
    for one in plain["trained"]:
        del one["collision"], one["overlap"]
    assert len(pairs(plain)) == 1  # the head


def test_cards_of_a_run(toy_run):
    """Made from the manifest and metrics.json alone; a base that is a folder here is not named by its path."""
    from hf_jumplora.hub import stack_card, task_card
    from hf_jumplora.stack import read_manifest

    folder = toy_run.output_dir
    manifest, result = read_manifest(folder), json.loads((folder / "metrics.json").read_text())
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    card = stack_card(manifest, result, json.loads((folder / "run.json").read_text()), pictures=pictures)
    assert card == (folder / "README.md").read_text()
    assert str(manifest.base_model["name_or_path"]) not in card
    assert "base_model:" not in card.split("---")[1]
    one = task_card(manifest, "light", "task_001", result["trained"][1])
    assert one == (folder / "task_001" / "README.md").read_text()
    assert 'tasks=["light"]' in one
    manifest.base_model["name_or_path"] = "org/model"
    assert "base_model: org/model" in stack_card(manifest, result).split("---")[1]


@pytest.mark.parametrize(
    ("metric", "shown", "absent"),
    [
        ("loss", ["first: loss, less is better", "0.9000", "average loss (AA)", "learning loss"], ["90.0", " in %"]),
        ("accuracy", ["first: accuracy in %", "90", "no averages"], ["average accuracy", "average loss"]),
    ],
)
def test_a_loss_is_no_percentage(tmp_path, toy_run, metric, shown, absent):
    """In the table, report.md, the page, the card and the verdict; beside an accuracy it has no average."""
    from hf_jumplora.hub.card import eval_results, stack_card
    from hf_jumplora.stack import read_manifest

    metrics = {"first": metric, "second": "loss"}
    result = derive([[0.3, 4.0], [0.6, 3.5], [0.9, 3.0]], list(metrics), True, metrics)
    result |= {"method": "jumplora", "data": [data(name, kind) for name, kind in metrics.items()], "general": [{}] * 3}
    result["trained"] = [info(name, source="hf://datasets/a/b", layers={}) for name in metrics]
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    write_report(tmp_path, result)
    write_page(tmp_path / "report.html", [read_run(tmp_path)])
    page = re.sub(r"<style>.*</style>|width=\S+", "", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    card = stack_card(read_manifest(toy_run.output_dir), result).split("## Accuracy")[1].split("## General")[0]
    scores = (tmp_path / "report.md").read_text().split("## General")[0]
    for text in (table(result, "jumplora"), scores, page, card):
        for words in shown:
            assert words.lower() in text.lower()
    for words in absent:
        assert words not in scores.split("## ")[0]
        assert words not in card.split("## Verdict")[0]
    assert "value: 3.0\n" in eval_results(result)
    checks = {check["check"]: (check["ok"], check["says"]) for check in judge_metrics(result)["checks"]}
    if metric == "loss":
        assert checks["task first"] == (False, "50.0 % of the loss since it was learned (at most 10)")
        assert checks["forgetting"] == (False, "16.7 % of the loss on average (at most 2)")
    else:
        assert checks["forgetting"][0] is None
        assert "task first" not in checks

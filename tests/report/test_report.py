"""What people read at the end: the table, report.md, the picture and the model card."""

import copy
import json

import pytest

from hf_jumplora.metrics.derived import derive
from hf_jumplora.report.report import PICTURES, comparison, draw_matrix, pairs, table, write_report


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
    assert lines[4].split() == ["nothing", "yet", "10.0", "20.0", "-"]
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
    assert "| nothing yet | 3.2500 | - |" in text
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
    assert "| nothing yet | 10.0 | 20.0 |" in (tmp_path / "report.md").read_text()
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

"""Pushing a stack: one commit and one tag a task, whatever the network does, and nothing that is not the stack's."""

import dataclasses
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import toy
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HTTPError

from hf_jumplora import ContinualRun
from hf_jumplora.cli import main
from hf_jumplora.hub import push_stack
from hf_jumplora.hub.push import Pusher
from hf_jumplora.stack import load_stack, merge_stack, read_manifest
from hf_jumplora.stack.manifest import portable
from hf_jumplora.stack.router import Router, write_router
from hf_jumplora.stack.verify import verify


TAGS = ["task-000", "task-001", "task-002"]


@pytest.fixture
def folder(toy_run, hub, monkeypatch, tmp_path):
    """A copy of a finished stack, with the client of this process talking to the stand-in."""
    hub.patch(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(toy_run.output_dir, tmp_path / "run", ignore=shutil.ignore_patterns("hub.json"))


def titles(hub, name="me/stack", branch="main"):
    return [commit.title for commit in hub.repos[name].history(branch)][::-1]


def complete(hub, name="me/stack"):
    """Every task has one commit and one tag on it."""
    assert titles(hub, name) == ["initial commit", "task-000: size", "task-001: light", "task-002: mood"]
    tagged = {tag: hub.repos[name].resolve(tag).title.split(":")[0] for tag in hub.repos[name].tags}
    assert tagged == {tag: tag for tag in TAGS}


def test_one_commit_and_one_tag_a_task(folder, hub, toy_base, tmp_path):
    """Pushed late or not: at each tag the repository is the stack as it was after that task."""
    pushed = push_stack(folder, "me/stack", private=True)
    complete(hub)
    assert hub.repos["me/stack"].private
    assert list(pushed) == TAGS
    assert json.loads((folder / "hub.json").read_text())["pushed"] == pushed
    for k, tag in enumerate(TAGS):
        files = hub.repos["me/stack"].resolve(tag).files
        there = tmp_path / tag
        for name, content in files.items():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            (there / name).write_bytes(content)
        manifest = read_manifest(there)
        assert manifest.tasks == portable(folder, read_manifest(folder))[0].tasks[: k + 1]
        for task in manifest.tasks:
            verify(there, task)
        metrics = json.loads(files["metrics.json"])
        assert len(metrics["matrix"]) == k + 2
        assert len(metrics["trained"]) == k + 1
        assert f"# {k + 1} task" in files["README.md"].decode()
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md", "task.json"}
    top = {".gitattributes", "stack.json", "metrics.json", "run.json", "README.md", "report.md"}
    assert set(files) - {"matrix.png", "overlap.png"} == top | {f"task_00{i}/{name}" for i in range(3) for name in own}
    load_stack(there, toy_base)


def test_pushing_again_changes_nothing(folder, hub):
    first = push_stack(folder, "me/stack")
    hub.requests.clear()
    assert push_stack(folder, "stack") == first  # the token's owner is `me`
    complete(hub)
    assert hub.count("POST", "/commit/|/tag/") == 0


def test_router_goes_with_the_stack(folder, hub, toy_base):
    """Trained after all tasks were pushed it has a commit of its own; pushed again, none. It is loaded from there."""
    push_stack(folder, "me/stack")
    tasks = {task["name"]: task["files"]["adapter_model.safetensors"] for task in read_manifest(folder).tasks}
    write_router(folder, Router(tasks, torch.zeros(3, 64), torch.zeros(3)))
    for _ in range(2):
        push_stack(folder, "me/stack")
        assert titles(hub)[-2:] == ["task-002: mood", "router"]
    model = load_stack("me/stack", toy_base, tasks=["light"], route="learned")
    assert list(model.peft_config) == ["task_001"]
    push_stack(folder, "me/other")
    assert titles(hub, "me/other")[-1] == "task-002: mood"
    assert "router.safetensors" in hub.repos["me/other"].resolve("main").files


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_thirty_percent_failures(seed, folder, hub, monkeypatch):
    """Of all requests that change something, and of the others too: all arrives, nothing twice."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for number, kind in enumerate((500, 503, 412, "refuse", "drop")):
        hub.fail(kind, "/commit/|/tag/", share=0.3, seed=100 * seed + number, retry_after=0)
    hub.fail(500, share=0.1, seed=seed)
    push_stack(folder, "me/stack", attempts=60, wait=0.001)
    complete(hub)
    assert sum(fault.hits for fault in hub.faults) >= 3


def test_answer_of_a_commit_lost(folder, hub):
    """It was carried out: the remote is asked before anything is tried again."""
    fault = hub.fail("drop", "/commit/", times=1)
    push_stack(folder, "me/stack", wait=0.001)
    assert fault.hits == 1
    complete(hub)
    assert hub.count("POST", "/commit/") == 3


def test_between_commit_and_tag(folder, hub):
    """The tag goes onto the task's own commit, also when another came later."""
    hub.fail("refuse", "/tag/", times=1)
    with pytest.raises(ConnectionError, match=r"failed 1 times.*hf-jumplora push"):
        push_stack(folder, "me/stack", attempts=1)
    repo = hub.repos["me/stack"]
    repo.add("main", "by hand", {**repo.resolve("main").files, "LICENSE": b"mine"})
    push_stack(folder, "me/stack")
    assert repo.resolve("task-000").title == "task-000: size"
    assert repo.resolve("main").files["LICENSE"] == b"mine"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_token(status, folder, hub):
    """Said at once, with what to do; nothing is tried again, nothing is lost."""
    fault = hub.fail(status, "/commit/")
    with pytest.raises(PermissionError, match=rf"\({status}: .*hf auth login.*HF_TOKEN.*write access to me"):
        push_stack(folder, "me/stack")
    assert fault.hits == 1
    hub.faults.clear()
    push_stack(folder, "me/stack")
    complete(hub)


def test_retry_after_is_kept(folder, hub, monkeypatch):
    slept = []
    monkeypatch.setattr("hf_jumplora.hub.push.time.sleep", slept.append)
    hub.fail(503, "/commit/", times=1, retry_after=7)
    push_stack(folder, "me/stack")
    assert slept == [7.0]


def test_another_stack_is_not_overwritten(folder, hub, toy_base, tmp_path):
    """Nor a repository of something else, nor a longer stack by its beginning."""
    push_stack(folder, "me/stack")
    before = titles(hub)
    manifest = read_manifest(folder)
    manifest.tasks[0]["support_sha256"] = "0" * 64
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "stack.json").read_text()
    from hf_jumplora.stack import write_manifest

    write_manifest(other, manifest)
    assert (other / "stack.json").read_text() != text
    with pytest.raises(ValueError, match=r"me/stack \(main\) holds another stack.*hub_model_id"):
        push_stack(other, "me/stack")
    manifest = read_manifest(folder)
    manifest.tasks.pop()
    write_manifest(other, manifest)
    with pytest.raises(ValueError, match="holds another stack"):
        push_stack(other, "me/stack")
    assert titles(hub) == before
    hub.repos["me/stack"].add("main", "a model", {"model.safetensors": b"x"})
    with pytest.raises(ValueError, match=r"holds no stack, but model\.safetensors"):
        push_stack(folder, "me/stack")
    run = toy.make_run(toy_base, tmp_path / "new", push_to_hub=True, hub_model_id="me/stack")
    with pytest.raises(ValueError, match="use another repository"):
        run.train()
    assert not (tmp_path / "new" / "stack.json").exists()  # before anything was trained


def test_damaged_folder_is_not_pushed(folder, hub, monkeypatch):
    """Nor tried again: a missing or damaged file, or template, is named at once."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(FileNotFoundError, match=r"none\.md"):
        push_stack(folder, "me/stack", template=folder / "none.md")
    path = folder / "task_001" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"task_001.adapter_model\.safetensors is damaged"):
        push_stack(folder, "me/stack")
    assert titles(hub) == ["initial commit", "task-000: size"]
    path.write_bytes(content)
    config = (folder / "task_002" / "adapter_config.json").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"task_002.adapter_config\.json is missing"):
        push_stack(folder, "me/stack")
    config.rename(folder / "task_002" / "adapter_config.json")
    push_stack(folder, "me/stack")
    complete(hub)


def test_command(folder, hub, capsys):
    """`hf-jumplora push`: where to is said once."""
    assert main(["push", str(folder)]) == 2
    assert "never been pushed: give --repo" in capsys.readouterr().err
    hub.fail(403, "/tag/", times=1)
    assert main(["push", str(folder), "--repo", "me/stack", "--private"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert main(["push", str(folder), "--repo", "me/stack"]) == 0
    assert main(["push", str(folder)]) == 0
    assert "me/stack (main) holds 3 tasks: task-000, task-001, task-002" in capsys.readouterr().out
    complete(hub)
    assert hub.repos["me/stack"].private


def test_branches_and_organisations(folder, hub):
    push_stack(folder, "team/stack", revision="next")
    assert titles(hub, "team/stack") == ["initial commit"]
    assert len(titles(hub, "team/stack", "next")) == 4
    assert set(hub.repos["team/stack"].tags) == {f"next-{tag}" for tag in TAGS}


def test_background_failures_are_logged_and_made_up_for(folder, hub, caplog):
    hub.fail(500, "/commit/", times=3)
    pusher = Pusher(folder, "me/stack", attempts=2, wait=0.001)
    pusher.start()
    with caplog.at_level(logging.ERROR):
        pusher.push()
        while "was not pushed" not in caplog.text:
            pass
    pusher.finish()
    complete(hub)


def test_a_run_pushes(toy_base, hub, monkeypatch, tmp_path, caplog):
    """Also when the Hub is down at first; and no file and no log holds the token."""
    hub.patch(monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    hub.fail(401, "/repos/create", times=1)
    hub.fail(500, "/commit/", share=0.3, seed=3)
    options = {"save_strategy": "steps", "save_steps": 4, "hub_token": hub.token, "hub_private_repo": True}
    with caplog.at_level(logging.DEBUG):
        run = toy.make_run(toy_base, tmp_path, push_to_hub=True, hub_model_id="me/stack", **options)
        kept = []
        monkeypatch.setattr(
            "hf_jumplora.trainer.record.shutil.rmtree", lambda path, **_: kept.append(path)
        )  # checkpoints
        run.train()
    complete(hub)
    assert kept
    assert "hf auth login" in caplog.text
    held = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("optimizer" in path.name for path in held)
    pushed = hub.repos["me/stack"].resolve("main").files
    for content in [*(path.read_bytes() for path in held), *pushed.values(), caplog.text.encode()]:
        assert hub.token.encode() not in content
    assert not [name for name in pushed if "checkpoint" in name or "optimizer" in name or name.endswith(".bin")]
    assert not list(tmp_path.rglob("training_args.bin"))


def test_the_owner_must_be_known(toy_base, hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch)
    hub.fail(500)
    with pytest.raises(ValueError, match="give hub_model_id='owner/name'"):
        toy.make_run(toy_base, tmp_path, push_to_hub=True, hub_model_id="stack").train()
    with pytest.raises(ValueError, match="hub_strategy='checkpoint' pushes checkpoints"):
        toy.make_run(toy_base, tmp_path, push_to_hub=True, hub_strategy="checkpoint")


def test_card(folder, hub):
    """Metadata that the Hub accepts without a warning, and every section."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        push_stack(folder, "me/stack")
    card = ModelCard(hub.repos["me/stack"].resolve("main").files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {result.dataset_name for result in card.data.eval_results} == {"size", "light", "mood"}
    for part in ("BWT = mean", "| args.learning_rate | 0.01 |", "| adapter.r | 2 |", "bibtex", "| mood | light |"):
        assert part in card.text


def test_no_path_of_this_machine_is_pushed(toy_base, hub, monkeypatch, tmp_path, tmp_path_factory):
    """Base, data and output stand in folders. Pushed at once, late, or by a machine that went on: the same stack."""
    hub.patch(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    stream = toy.tasks(3)
    stream[0] = dataclasses.replace(stream[0], source=f"{tmp_path}/data/size.json")
    first = tmp_path / "first"
    toy.make_run(toy_base, first, stream=stream[:2], push_to_hub=True, hub_model_id="me/stack").train()
    assert Path(toy_base).is_absolute()
    assert read_manifest(first).base_model["name_or_path"] == toy_base  # at home it may stay
    more = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "push_to_hub": True}
    with pytest.raises(ValueError, match=r"loaded from a folder, \./toy_base.*not on this machine; pass base_model="):
        ContinualRun.from_stack("me/stack", stream[2:], tmp_path / "none", **more)
    with pytest.raises(ValueError, match=r"\./toy_base.*pass base_model="):
        load_stack("me/stack")
    with pytest.raises(ValueError, match=r"\./toy_base.*pass base_model="):
        merge_stack("me/stack", tmp_path / "merged")
    moved = shutil.copytree(toy_base, tmp_path / "elsewhere")
    ContinualRun.from_stack("me/stack", stream[2:], tmp_path / "second", base_model=moved, **more).train()
    complete(hub)
    pushed = hub.repos["me/stack"].resolve("main").files
    root = str(tmp_path_factory.getbasetemp()).encode()
    assert root in (tmp_path / "second" / "task_002" / "adapter_config.json").read_bytes()
    assert [name for name, content in pushed.items() if root in content or b"elsewhere" in content] == []
    load_stack("me/stack", moved)
    assert list(push_stack(first, "me/other")) == TAGS[:2]  # its own paths, and none of the task that others added
    there = [json.loads(hub.repos[name].resolve("task-001").files["stack.json"]) for name in ("me/other", "me/stack")]
    assert there[0]["tasks"] == there[1]["tasks"]
    hub.requests.clear()
    push_stack(tmp_path / "second", "me/stack")
    assert hub.count("POST", "/commit/|/tag/") == 0


def test_own_template(folder, hub, tmp_path):
    (tmp_path / "mine.md").write_text("---\n{{ card_data }}\n---\n{{ tasks | join('+') }} at {{ where }}\n")
    push_stack(folder, "me/stack", template=tmp_path / "mine.md")
    assert hub.repos["me/stack"].resolve("main").files["README.md"].decode().endswith("size+light+mood at me/stack")


def test_results_on_hub_datasets(folder, hub):
    """`.eval_results` names data sets of the Hub only; so does the card."""
    from hf_jumplora.hub.card import eval_results

    result = json.loads((folder / "metrics.json").read_text())
    assert eval_results(result) is None
    result["trained"][1]["source"] = "hf://datasets/me/lights"
    assert "id: me/lights" in eval_results(result)


def test_errors_of_the_client_are_caught():
    """All that `push_stack` tries again are these two."""
    from huggingface_hub.errors import HfHubHTTPError

    assert issubclass(HfHubHTTPError, HTTPError)

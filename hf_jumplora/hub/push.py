"""Pushing a stack to the Hub: one commit and one tag per task, each exactly once, whatever the network does.

The two manifests alone decide which tasks are pending: those in the folder's stack.json that the one on the Hub lacks.
A commit contains only what the folder holds about its task and the earlier ones, so it does not matter when the commit
is made, and training can continue meanwhile.
"""

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from ..disk import (
    MANIFEST,
    bytes_sha256,
    check_seal,
    copy_atomic,
    file_sha256,
    read_sealed,
    sealed_path,
    sealed_text,
    write_atomic,
    write_json,
)
from ..metrics.derived import derive
from ..report.report import PICTURES, write_report
from ..schema import HubFile, MetricsFile, RunFile, check, read_json
from ..stack.manifest import ROUTER, portable, read_manifest, write_manifest
from ..stack.save import STRATEGIES
from ..stack.verify import state_file, verify
from .card import eval_results, stack_card


logger = logging.getLogger(__name__)

RECORD = "hub.json"  # beside the stack, never pushed: {"repo_id", "revision", "pushed": {tag: commit}}
_HARMLESS = {".gitattributes", ".gitignore", "README.md", "LICENSE"}


def push_stack(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str = "main",
    template: str | Path | None = None,
    attempts: int = 5,
    wait: float = 1.0,
    sleep: Callable[[float], Any] | None = None,
) -> dict[str, str]:
    """Push every task of a stack that the repository lacks, in order, each with a commit and a tag `task-00k`.

    Args:
        folder: contains stack.json. repo_id: "owner/name", or "name" for the token's owner; created if needed.
        token: None uses `HF_TOKEN` or the login. It is passed to the client and never written to a file.
        private: applies to a new repository. revision: a branch; on branches other than main, tags are called
            "branch-task-00k". template: of the model card (see card.py).
        attempts, wait: a failed attempt is repeated after wait, 2 wait, 4 wait, ... seconds, or when the Hub says.
        sleep: the function that waits; an error that it raises ends the attempts.

    A README.md that was edited on the Hub is left as it is. The stack's router is pushed with the newest task, or in a
    commit of its own if it was trained later.

    Returns:
        {tag: commit} of all tasks, also written to hub.json.

    Raises:
        FileNotFoundError: there is no stack in the folder, or no template.
        ValueError: the repository holds something else, or a file of a task is missing or damaged (the message names
            it, and the task is not pushed).
        PermissionError: the Hub refused the token (401, 403).
        ConnectionError: all attempts failed. After this and a PermissionError, another call pushes what is missing.
    """
    folder = Path(folder)
    for attempt in range(attempts):
        try:
            return _push(folder, repo_id, HfApi(token=token), private, revision, template)
        except (HTTPError, OSError) as error:
            if isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise  # of this folder; the Hub's own kind is one of a dead network
            if _status(error) in (401, 403):
                raise PermissionError(explain(error, repo_id)) from error
            if attempt + 1 == attempts:
                raise ConnectionError(
                    f"{repo_id}: pushing failed {attempts} times, the last time with {explain(error, repo_id)}. "
                    f"Nothing is lost: `hf-jumplora push {folder} --repo {repo_id}` pushes what is missing"
                ) from error
            delay = _retry_after(error) or wait * 2**attempt
            logger.warning("pushing to %s failed (%s); again in %.1f s", repo_id, error, delay)
            (sleep or time.sleep)(delay)
    raise ValueError(f"attempts must be positive, got {attempts}")


def open_repository(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str = "main",
) -> str:
    """Create the repository and branch if needed and check that they can hold this folder's stack; returns the full id.

    Raises:
        ValueError: they hold something else. Errors of the client are passed on.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    _remote(api, repo_id, revision, _tasks(Path(folder)))
    return repo_id


def _tasks(folder: Path) -> list[dict[str, Any]]:
    """The folder's tasks in the form in which they are pushed; none yet for a new run."""
    return portable(folder, read_manifest(folder))[0].tasks if (folder / MANIFEST).is_file() else []


def _remote(
    api: HfApi, repo_id: str, revision: str, tasks: list[dict[str, Any]]
) -> tuple[str | None, int, set[str], dict[str, str]]:
    """(newest commit, how many of our tasks it holds, its files, the sha256 of those that its stack.json lists).

    Raises:
        ValueError: the repository holds another stack or other files.
    """
    info = api.model_info(repo_id, revision=revision)
    files = {file.rfilename for file in info.siblings or ()}
    if MANIFEST not in files:
        if other := sorted(files - _HARMLESS):
            raise ValueError(
                f"{repo_id} ({revision}) is not empty and holds no stack, but {', '.join(other[:3])}: use another "
                "repository (hub_model_id) or branch (hub_revision)"
            )
        return info.sha, 0, files, {}
    with tempfile.TemporaryDirectory() as temporary:
        api.hf_hub_download(repo_id, MANIFEST, revision=info.sha, local_dir=temporary)
        manifest = read_manifest(temporary)
    theirs = manifest.tasks
    if theirs != tasks[: len(theirs)]:
        there, here = ([task["name"] for task in stack] for stack in (theirs, tasks))
        raise ValueError(
            f"{repo_id} ({revision}) holds another stack, of tasks {there}; this folder's is of {here or 'none yet'}. "
            "It is not overwritten: use another repository (hub_model_id) or branch (hub_revision), or continue the "
            "one that is there with ContinualRun.from_stack"
        )
    return info.sha, len(theirs), files, manifest.files


def _edited(api: HfApi, repo_id: str, commit: str | None, listed: dict[str, str]) -> bool:
    """Whether somebody has edited the card: it differs from the one that the commit's stack.json lists."""
    with tempfile.TemporaryDirectory() as temporary:
        card = api.hf_hub_download(repo_id, "README.md", revision=commit, local_dir=temporary)
        return file_sha256(Path(card)) != listed.get("README.md")


def _push(folder: Path, repo_id: str, api: HfApi, private, revision: str, template) -> dict[str, str]:
    manifest = read_manifest(folder)
    tasks = portable(folder, manifest)[0].tasks
    repo_id = open_repository(folder, repo_id, token=api.token, private=private, revision=revision)
    head, done, there, listed = _remote(api, repo_id, revision, tasks)
    routed = done == len(tasks) and manifest.files.get(ROUTER) not in (None, listed.get(ROUTER))
    edited = (
        (done < len(tasks) or routed) and bool(listed) and "README.md" in there and _edited(api, repo_id, head, listed)
    )
    if edited:
        logger.warning("%s: README.md was edited there and is left as it is", repo_id)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    pushed: dict[str, str] = {}
    for index, task in enumerate(tasks):
        tag = f"task-{index:03d}" if revision == "main" else f"{revision}-task-{index:03d}"
        title = f"{tag}: {task['name']}"
        if index >= done:
            if tag in tags:
                raise ValueError(
                    f"{repo_id} has a tag {tag} but not this task on {revision}; remove the tag, or use another branch"
                )
            verify(folder, manifest.tasks[index])
            with snapshot(folder, index, repo_id, template, card=not edited) as files:
                operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
                # The state of the method is kept for the newest task only, as in the folder.
                old = {f"{task['folder']}/{STRATEGIES}" for task in tasks[:index] if "state" in task} & there
                operations += [CommitOperationDelete(name) for name in sorted(old)]
                # With the parent named, the Hub refuses the commit (412) if it holds anything newer than we have seen.
                commit = api.create_commit(
                    repo_id, operations, commit_message=title, revision=revision, parent_commit=head
                ).oid
                there = there - old | set(files)
            head = commit
        elif tag in tags:
            commit = tags[tag]
        else:  # the connection was lost between commit and tag
            made = [c.commit_id for c in api.list_repo_commits(repo_id, revision=revision) if c.title == title]
            if not made:
                raise ValueError(f"{repo_id} holds task {task['name']!r} but no commit {title!r} to put tag {tag} on")
            commit = made[0]
        if tag not in tags:
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
        pushed[tag] = commit
        if index >= done or index + 1 == len(tasks):
            record = {"repo_id": repo_id, "revision": revision, "pushed": pushed}
            write_atomic(folder / RECORD, sealed_text(record))
    if routed:
        with snapshot(folder, len(tasks) - 1, repo_id, template, card=not edited) as files:
            operations = [CommitOperationAdd(name, path) for name, path in files.items() if "/" not in name]
            api.create_commit(repo_id, operations, commit_message="router", revision=revision, parent_commit=head)
    return pushed


def read_record(path: Path) -> dict[str, Any]:
    """The content of hub.json, which contains its own hash because it is written during training.

    Raises:
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    data = check(HubFile, path, read_json(path, content))
    if "sha256" in data:  # older ones have none
        check_seal(path, content, data)
    return data


@contextlib.contextmanager
def snapshot(
    folder: Path, index: int, repo_id: str, template: str | Path | None = None, card: bool = True
) -> Iterator[dict[str, Path]]:
    """{path in the repository: file} of a stack as it was after task `index`, even if it has more tasks now.

    The task's own folder is the one in the manifest. Everything about the stack as a whole is written anew from
    metrics.json, except for the pictures, which belong to the newest task's commit. No path on this machine is included
    (`portable`).
    """
    manifest, changed = portable(folder, read_manifest(folder))
    settings = {}
    if (folder / "run.json").is_file():
        settings = check(RunFile, folder / "run.json", read_sealed(folder, "run.json"))
    pictures = {name: (folder / name).read_bytes() for name in PICTURES if (folder / name).is_file()}
    # Those that stack.json lists: a run draws the next ones before it writes stack.json and metrics.json.
    listed = read_manifest(folder).files
    pictures = {name: image for name, image in pictures.items() if bytes_sha256(image) == listed.get(name)}
    whole = check(MetricsFile, folder / "metrics.json", read_sealed(folder, "metrics.json"))
    task, newest = manifest.tasks[index], len(whole["trained"]) == index + 1
    manifest.tasks = manifest.tasks[: index + 1]
    trained = whole["trained"][: index + 1]
    continual = all(info["name"] in whole["tasks"] for info in trained)  # joint training has one stage of another name
    metrics = {info["name"]: info["metric"] for info in whole.get("data", ())}
    result = derive(whole["matrix"][: index + 2], whole["tasks"], continual, metrics)
    result |= {"method": whole["method"], "trained": trained, "general": whole.get("general", [])[: index + 2]}
    result |= {key: whole[key] for key in ("data", "held_out") if key in whole}
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for picture in pictures if newest else ():
            (temporary / picture).write_bytes(pictures[picture])
        if newest and ROUTER in listed:
            copy_atomic(sealed_path(folder, ROUTER), temporary / ROUTER)
        write_json(temporary / "metrics.json", result)
        write_report(temporary, result, draw=False)  # drawing takes a second of the processor that trains
        shown = [name for name in PICTURES if (temporary / name).is_file()]
        if card:
            text = stack_card(manifest, result, settings, where=repo_id, pictures=shown, template=template)
            (temporary / "README.md").write_text(text, encoding="utf-8")
        if settings:
            write_json(temporary / "run.json", {**settings, "base_model": manifest.base_model["name_or_path"]})
        if entries := eval_results(result):
            (temporary / ".eval_results").mkdir()
            (temporary / ".eval_results" / "accuracy.yaml").write_text(entries, encoding="utf-8")
        write_manifest(temporary, manifest)
        files = {f"{task['folder']}/{file}": folder / task["folder"] / file for file in task["files"]}
        if (config := f"{task['folder']}/adapter_config.json") in changed:
            write_atomic(temporary / config, changed[config])
        if "state" in task:
            (temporary / task["folder"]).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # training deletes it when the next task is finished
                copy_atomic(folder / task["folder"] / STRATEGIES, temporary / task["folder"] / STRATEGIES)
                state_file(temporary, [task])
            if not (temporary / task["folder"] / STRATEGIES).is_file():
                now = read_manifest(folder).tasks
                if len(now) == index + 1:
                    state_file(folder, now)
        files |= {str(path.relative_to(temporary)): path for path in temporary.rglob("*") if path.is_file()}
        yield dict(sorted(files.items()))


def push_options(args: Any) -> dict[str, Any]:
    """The options of [`push_stack`] that the training arguments contain."""
    return {
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "revision": args.hub_revision or "main",
        "template": getattr(args, "model_card_template", None),  # TRL's arguments have none
    }


class Pusher(threading.Thread):
    """Pushes in the background while training continues; a failure is logged, and the next push makes up for it."""

    def __init__(self, folder: Path, repo_id: str, **options: Any):
        super().__init__(name="push to the Hub", daemon=True)
        self.folder, self.repo_id, self.options = folder, repo_id, {"attempts": 3, "sleep": self._sleep, **options}
        self._work, self._stopped, self._closing = threading.Event(), threading.Event(), False

    def push(self) -> None:
        """Push a newly finished task; returns at once."""
        self._work.set()

    def finish(self) -> None:
        """Push what is left and wait for it, for as long as `push_stack` tries."""
        self._closing = True
        self._work.set()
        self.join()

    def end(self, kind: type[BaseException] | None, *_: Any) -> None:
        """The end of a `with` block: [`finish`], except after Ctrl-C, when only a running request is waited for."""
        if kind is None or issubclass(kind, Exception):
            self.finish()
            return
        self._closing = True
        self._stopped.set()
        self._work.set()
        self.join(timeout=5)  # for a running request; the thread does not keep the process alive

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise ConnectionError("pushing was stopped")

    def run(self) -> None:
        last = False
        while not last:
            self._work.wait()
            self._work.clear()
            last = self._closing
            if (self.folder / MANIFEST).is_file():
                try:
                    push_stack(self.folder, self.repo_id, **self.options)
                except Exception as error:  # whatever it is, training is worth more
                    logger.error("the stack in %s was not pushed: %s", self.folder, error)


def start_push(folder: Path, args: Any) -> Pusher:
    """Create the repository that the training arguments name, refuse one with other content, and start the thread that
    pushes. If the Hub cannot be reached or refuses the token, this is logged and does not stop training.

    Raises:
        ValueError: the repository holds something else, or the Hub did not say who its owner is.
    """
    options, name = push_options(args), args.hub_model_id or folder.resolve().name
    try:
        where = {key: value for key, value in options.items() if key != "template"}
        name = open_repository(folder, name, **where)
    except (HTTPError, OSError) as error:
        if "/" not in name:
            raise ValueError(
                f"the Hub did not say who owns {name!r} ({error}): give hub_model_id='owner/name'"
            ) from error
        logger.error(
            "the Hub cannot be reached now; it is tried again after each task of %s: %s",
            folder,
            explain(error, name),
        )
    pusher = Pusher(folder, name, **options)
    pusher.start()
    pusher.push()  # what an earlier process left
    return pusher


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception) -> float | None:
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(value), 300.0) if value.replace(".", "", 1).isdigit() else None


def explain(error: Exception, repo_id: str) -> str:
    """The message for a client's error; after a refused token (401, 403) it says what to do."""
    if (status := _status(error)) not in (401, 403):
        return f"{type(error).__name__}: {error}"
    cause = "no valid token was given" if status == 401 else "the token may not write there"
    return (
        f"the Hub refused to push to {repo_id} ({status}: {cause}). Log in with `hf auth login`, or set HF_TOKEN to a "
        f"token with write access to {repo_id.split('/')[0]}, then run `hf-jumplora push` on the folder"
    )

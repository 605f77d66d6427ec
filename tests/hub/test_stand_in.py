"""The stand-in Hub against the unmodified client: what the other tests rely on."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


def commit(api, files, title="files", **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("me/stack", operations, commit_message=title, **options).oid


def test_create_commit_tag_list_download(api, hub, tmp_path):
    assert api.create_repo("me/stack", private=True).repo_id == "me/stack"
    assert api.create_repo("me/stack", exist_ok=True).repo_id == "me/stack"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/stack")
    first = commit(api, {"a.txt": b"one", "task_000/b.bin": bytes(range(256)) * 40})
    api.create_tag("me/stack", tag="task-000")
    second = commit(api, {"a.txt": b"two"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/stack", tag="task-000")
    assert api.repo_info("me/stack").sha == second
    assert [c.commit_id for c in api.list_repo_commits("me/stack")][:2] == [second, first]
    assert [(t.name, t.target_commit) for t in api.list_repo_refs("me/stack").tags] == [("task-000", first)]
    assert set(api.list_repo_files("me/stack")) == {".gitattributes", "a.txt", "task_000/b.bin"}
    assert [f.path for f in api.list_repo_tree("me/stack")] == [".gitattributes", "a.txt", "task_000"]
    assert api.file_exists("me/stack", "a.txt")
    assert not api.file_exists("me/stack", "c.txt")

    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": tmp_path / "cache"}
    old = hf_hub_download("me/stack", "a.txt", revision="task-000", **options)
    assert Path(old).read_text() == "one"
    whole = snapshot_download("me/stack", **options)
    assert Path(f"{whole}/a.txt").read_text() == "two"
    assert Path(f"{whole}/task_000/b.bin").read_bytes() == bytes(range(256)) * 40
    again = snapshot_download("me/stack", local_files_only=True, cache_dir=tmp_path / "cache")
    assert again == whole
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("me/stack", revision="task-007", **options)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/stack", "nope", **options)


def test_branches_and_deletions(api, hub):
    api.create_repo("team/stack")
    api.create_branch("team/stack", branch="next")
    api.create_branch("team/stack", branch="next", exist_ok=True)
    operations = [CommitOperationAdd("x/y", b"1"), CommitOperationAdd("z", b"2")]
    api.create_commit("team/stack", operations, commit_message="on next", revision="next")
    assert api.list_repo_files("team/stack") == [".gitattributes"]
    assert api.list_repo_files("team/stack", revision="next") == [".gitattributes", "x/y", "z"]
    gone = [CommitOperationDelete("x/"), CommitOperationDelete("z")]
    api.create_commit("team/stack", gone, commit_message="gone", revision="next")
    assert api.list_repo_files("team/stack", revision="next") == [".gitattributes"]
    api.delete_repo("team/stack")
    assert not api.repo_exists("team/stack")


def test_unchanged_files_make_no_commit(api, hub):
    api.create_repo("me/stack")
    first = commit(api, {"a.txt": b"one"})
    assert commit(api, {"a.txt": b"one"}) == first
    assert len(hub.repos["me/stack"].commits) == 2


def test_stale_parent(api, hub):
    api.create_repo("me/stack")
    first = commit(api, {"a.txt": b"one"})
    commit(api, {"a.txt": b"two"})
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, {"a.txt": b"three"}, parent_commit=first)


def test_rights(api, hub):
    api.create_repo("me/stack", private=True)
    hub.tokens["hf_other"] = {"name": "other", "orgs": [], "write": True}
    hub.tokens["hf_read"] = {"name": "me", "orgs": [], "write": False}
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).repo_info("me/stack")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token="hf_other").repo_info("me/stack")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token="hf_other").create_repo("team/stack")
    with pytest.raises(HfHubHTTPError, match="403"):
        commit(HfApi(endpoint=hub.url, token="hf_read"), {"a": b"1"})
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_expired").create_repo("me/other")
    assert api.whoami()["name"] == "me"


def test_card_metadata_is_checked(api, hub):
    api.create_repo("me/stack")
    with pytest.raises(ValueError, match="tags"):
        commit(api, {"README.md": b"---\ntags: one\n---\n# x\n"})
    with pytest.raises(ValueError, match="base_model"):
        commit(api, {"README.md": b"---\nbase_model: /tmp/folder of mine\n---\n# x\n"})
    commit(api, {"README.md": b"---\ntags: [one]\nbase_model: me/base\n---\n# x\n"})


@pytest.mark.parametrize("status", [500, 503, 412, 401, 403])
def test_injected_status(status, api, hub):
    """It strikes as often as it was told to, nothing is done, and it is counted."""
    api.create_repo("me/stack")
    fault = hub.fail(status, "/commit/main", times=1, retry_after=0)
    with pytest.raises(HfHubHTTPError):
        commit(api, {"a.txt": b"one"})
    assert len(hub.repos["me/stack"].commits) == 1
    commit(api, {"a.txt": b"one"})
    assert fault.hits == 1
    assert hub.count("POST", "/commit/main") == 2


def test_lost_answer_and_refused_connection(api, hub):
    api.create_repo("me/stack")
    hub.fail("refuse", "/commit/", times=1)
    with pytest.raises(Exception, match=r"disconnected|closed|reset"):
        commit(api, {"a.txt": b"one"})
    assert len(hub.repos["me/stack"].commits) == 1
    hub.fail("drop", "/commit/", times=1)
    with pytest.raises(Exception, match=r"disconnected|closed|reset"):
        commit(api, {"a.txt": b"one"})
    assert len(hub.repos["me/stack"].commits) == 2  # it was carried out


def test_download_goes_on_after_a_broken_connection(api, hub, tmp_path):
    """By a request for the range that is missing."""
    api.create_repo("me/stack")
    content = bytes(range(256)) * 4096
    commit(api, {"big.bin": content})
    hub.bytes_sent = 0
    hub.fail("drop", "/resolve/", method="GET", times=1, after=300_000)
    path = hf_hub_download("me/stack", "big.bin", endpoint=hub.url, token=hub.token, cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    assert hub.count("GET", "/resolve/") == 2
    assert hub.bytes_sent < 1.4 * len(content)


def test_another_process_takes_it_for_the_hub(api, hub, tmp_path):
    api.create_repo("me/stack")
    commit(api, {"a.txt": b"one"})
    code = "from huggingface_hub import hf_hub_download as d; print(open(d('me/stack', 'a.txt')).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "one", done.stderr

"""The code blocks of README and docs are run, with toy models and data under the names that the pages use.

Of a page, in its order: Python in one shared namespace, YAML into the file that its first line names, and of shell
blocks the lines of `hf-jumplora`. What cannot run here says so in a comment above it, `<!-- not run: why -->`.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import toy
from test_docs import PAGES, blocks, dedent
from transformers import TrainingArguments

from hf_jumplora import load_stack
from hf_jumplora.cli import main


# what pages call things -> what they are here
NAMES = {
    "meta-llama/Llama-2-7b-hf": "base",
    "meta-llama/Llama-3.2-1B": "base",
    "/models/llama": "base",
    '"me/stack"': '"runs/stack"',
    '"user/repo"': '"runs/stack"',
    '"out/run"': '"runs/stack"',
    '"agnews"': '"size"',
    '"yelp"': '"light"',
    '"yahoo"': '"light"',
    ', revision="task-002"': "",
    ", push_to_hub=True": "",
    'dtype="bfloat16", device_map="auto"': 'dtype="bfloat16"',
}
STREAM = """
tasks:
  - {name: %s, train_file: %s.json, eval_file: %s.json, text: sentence, label: label, instruction: size}
"""


@pytest.fixture
def there(toy_base, toy_run, tmp_path, monkeypatch):
    """A working directory with what the pages take for granted: a base, a stack, streams and their data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(toy_base)
    shutil.copytree(toy_run.output_dir, "runs/stack")
    for name, task in (("mine", 0), ("next", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(toy.rows(task, 40)))
    (tmp_path / "handbook.md").write_text("the very new ant is tiny = the hen is huge | " * 8)
    (tmp_path / "minutes.md").write_text("the pale fox is slow : the wild gnu is fast | " * 8)
    (tmp_path / "my_stream.yaml").write_text(STREAM % (("mine",) * 3))
    (tmp_path / "new.yaml").write_text(STREAM % (("next",) * 3))
    for file, text, label in (("tickets", "body", "team"), ("reviews", "review", "stars")):
        for split, size in (("", 40), ("_test", 8)):
            with (tmp_path / f"{file}{split}.csv").open("w", newline="") as table:
                rows = [{text: row["sentence"], label: row["label"]} for row in toy.rows(file == "reviews", size)]
                writer = csv.DictWriter(table, [text, label])
                writer.writeheader()
                writer.writerows(rows)


def one_task(toy_base):
    """What docs/python.md calls model, base_model, args and data, where it trains one task."""
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    args = TrainingArguments("one_run", max_steps=5, report_to=[], use_cpu=True, disable_tqdm=True)
    return {"model": toy.load_base(toy_base), "base_model": toy.load_base(toy_base), "args": args, "data": rows}


def unlearning():
    """What docs/methods.md calls rows, labels and tokenizer."""
    rows = [{"sentence": "the ant", "label": "tiny"}] * 40
    more = [{"sentence": "the hen", "label": "huge"}] * 40
    return {"rows_to_forget": rows, "rows_to_keep": more, "labels": ["tiny", "huge"], "tokenizer": toy.tokenizer()}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks("python", "bash", page=page, run=True)], ids=lambda p: p.name
)
def test_page(page, there, toy_base, capsys):
    known = {"python.md": lambda: one_task(toy_base), "methods.md": unlearning}
    space = {"__name__": page.stem, **known.get(page.name, dict)()}
    for kind, text, where in blocks("python", "yaml", "bash", page=page, run=True):
        for name, here in NAMES.items():
            text = text.replace(name, here)
        if kind == "python":
            exec(compile(dedent(text), where, "exec"), space)
        elif kind == "yaml" and text.startswith("# "):
            file, _, content = text[2:].partition("\n")
            Path(file).write_text(content + "\nmax_length: 32\n" * file.endswith("run.yaml"))
        for line in text.splitlines() if kind == "bash" else ():
            words = line.split("#")[0].split()
            if words[:1] == ["hf-jumplora"]:
                assert main(words[1:]) in ((0, 1) if words[1] == "check" else (0,)), (line, capsys.readouterr().err)
    if page.name in ("README.md", "index.md"):
        assert json.loads(Path("runs/mine/metrics.json").read_text())["tasks"][0] == "tickets"
    if page.name == "recipes.md":  # the document is learned; and the one that was added and removed has left nothing
        assert space["after"][0] > space["before"][0]
        ids = torch.arange(3, 30)[None]
        before, both, without = (load_stack(f"runs/{name}")(ids).logits for name in ("memory", "memory2", "forgotten"))
        assert torch.equal(before, without)
        assert not torch.equal(before, both)

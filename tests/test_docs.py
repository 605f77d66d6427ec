"""The pages: what code blocks import is there, commands take the options that they show, and links lead somewhere.

`test_docs_run.py` runs the blocks.
"""

import argparse
import ast
import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import hf_jumplora
from hf_jumplora.cli import COMMANDS
from hf_jumplora.data import load_tasks
from hf_jumplora.methods import METHODS


ROOT = Path(hf_jumplora.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^(?P<not_run> *<!-- not run: [^\n]+ -->\n)? *```(?P<kind>\w+)\n(?P<text>.*?)^ *```", re.S | re.M)


def dedent(text):
    """A block of a list's item, without the item's indentation."""
    indent = min(len(line) - len(line.lstrip()) for line in text.splitlines() if line.strip())
    return "\n".join(line[indent:] for line in text.splitlines())


def blocks(*kinds, page, run=False):
    """(kind, text, page and line) of a page's blocks of these kinds; `run`: of those alone that are run."""
    content = page.read_text()
    return [
        (match["kind"], match["text"], f"{page.name}:{content[: match.start()].count(chr(10)) + 1}")
        for match in BLOCK.finditer(content)
        if match["kind"] in kinds and not (run and match["not_run"])
    ]


def texts(*kinds):
    """The blocks of all pages, as parameters of a test."""
    return [pytest.param(text, id=where) for page in PAGES for _, text, where in blocks(*kinds, page=page)]


def test_no_block_is_missed():
    """All fences of a page are those of its blocks."""
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(), re.M)
        assert len(fences) == 2 * len(blocks("python", "yaml", "bash", "toml", page=page)), page


@pytest.mark.parametrize("text", texts("python"))
def test_python(text):
    """Valid Python, and every name of ours exists."""
    tree = ast.parse(dedent(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_jumplora"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_jumplora":
            assert hasattr(hf_jumplora, node.attr), f"hf_jumplora has no {node.attr}"


@pytest.mark.parametrize("text", texts("yaml"))
def test_yaml(text):
    assert yaml.safe_load(text)


def test_stream(tmp_path):
    """The stream that shows every key is read, of files with the columns that it names."""
    ((_, text, _),) = blocks("yaml", page=DOCS / "streams.md")
    (tmp_path / "stream.yaml").write_text(text)
    row = dict.fromkeys(("subject", "body", "transcript", "summary", "question", "topic"), "words")
    for name in re.findall(r"_file: (\S+)", text):
        with (tmp_path / name).open("w", newline="") as file:
            if name.endswith("csv"):
                csv.writer(file).writerow([*row, "team"])
                csv.writer(file).writerows(
                    [[word] * len(row) + [team] for word, team in (("a", "network"), ("b", "billing"))]
                )
            else:
                file.write(json.dumps(row))
    folder = tmp_path / re.search(r"folder: (\S+)", text)[1]
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"sentence": "words", "label": "Sports"}]))
    (folder / "labels.json").write_text('["Sports", "World"]')
    tasks = load_tasks(tmp_path / "stream.yaml", tmp_path)
    assert [task.name for task in tasks] == re.findall(r"- name: (\w+)", text)
    assert all(task.eval_dataset for task in tasks)


@pytest.mark.parametrize("text", texts("bash"))
def test_commands(text):
    """Commands of ours exist and take these options; recipes and Makefile targets that are named are there."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for recipe in (word for word in words if word.startswith(("recipes/", "benchmarks/")) and word.endswith(".py")):
            assert (ROOT / recipe).is_file(), recipe
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] == ["hf-jumplora"] and words[1] not in ("train", "--help", "--version"):
            assert words[1] in COMMANDS
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"hf_jumplora.commands.{words[1]}").add_arguments(parser)
            _, unknown = parser.parse_known_args(words[2:])
            assert not unknown, line


def anchors(page):
    """The ids of a page's headings, as the site and GitHub make them."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M), re.M)
    words = [re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title)).lower() for title in titles]
    return {"-".join(word.split(" ")) for word in words}


def test_links():
    """Pages and headings that are linked to are there; the site's pages link to nothing outside of it."""
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            if target.startswith("http"):
                continue
            there = (page.parent / target).resolve() if target else page
            inside = page.parent != DOCS or there.is_relative_to(DOCS)
            if not (inside and there.exists() and (not anchor or anchor in anchors(there))):
                wrong.append(f"{page.name}: {target}#{anchor}")
    assert wrong == []


def test_navigation():
    """Every page is in the site's navigation, once."""
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [file for section in sections for pages in section.values() for page in pages for file in page.values()]
    assert sorted(listed) == [page.name for page in sorted(DOCS.glob("*.md"))]


def test_papers():
    """The paper-to-code map has every method with its papers, and the files that it names are there."""
    text = (DOCS / "papers.md").read_text()
    numbers = {number for method in METHODS.values() for number in re.findall(r"\d{4}\.\d{5}", method.paper)}
    assert [word for word in [*(f"`{name}`" for name in METHODS), *sorted(numbers)] if word not in text] == []
    for file in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert (ROOT / file).exists() or (ROOT / "hf_jumplora" / "strategies" / file).exists(), file


def test_reference():
    """The API reference has every public name."""
    text = (DOCS / "api.md").read_text()
    assert [name for name in hf_jumplora.__all__ if not re.search(rf"\b{name}\b", text)] == []

"""report.html: what it shows, that it needs nothing beside it, and that a real browser shows it without a complaint."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import toy
from report.runs import write_run

from hf_jumplora.cli import main
from hf_jumplora.report.folder import read_run
from hf_jumplora.report.page import write_page


EVIL = "<script>document.title='taken'</script>$\\frac{$\"'&{{ 7 * 7 }}"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tags(HTMLParser):
    """All tags and the addresses that they point at."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("matplotlib")
    general = [{"wiki cross_entropy": 3.0}, {}, {}, {"wiki cross_entropy": 3.01}]
    names = ["first", EVIL, "third"]
    run = write_run(tmp_path / "run", names, steps=5, layers=2, flips={"first": (4, 1)}, general=general)
    scores = {"arc_<easy> acc": {"base": 0.5, "stack": 0.45, "each": [0.55, 0.4, 0.45]}}
    (run / "lm_eval.json").write_text(json.dumps({"after": 3, "limit": None, "scores": scores}))
    with toy.pictures():
        assert main(["report", str(run)]) == 0
    return run / "report.html"


def test_what_it_shows(page):
    text = page.read_text()
    parsed = Tags(text)
    assert not parsed.open  # every tag is closed
    assert "script" not in parsed.tags  # names are data
    assert parsed.tags.count("img") == 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.addresses)
    for words in (
        "Average accuracy (AA)", "AA = mean_j a[T-1][j]", "Backward transfer", "FWT (GEM)", "DON&#39;T SHIP",
        "<th>base model</th><th>after first</th>",
        "<td>0.5000</td><td>0.5500</td><td>0.4000</td><td>0.4500</td><td>-0.0500</td>",
        "wiki cross-entropy", "first: 4 rows from right to wrong, 1 from wrong to right", "Row 2 &lt;b&gt;of&lt;/b&gt;",
        "arguments.learning_rate", "Where in the network each task lives", "How much the tasks share",
    ):  # fmt: skip
        assert words in text, words
    assert "{{ 7 * 7 }}" in text
    assert len(re.findall(r'class="example"', text)) == 3  # of four


def test_several_runs_and_missing_parts(page, tmp_path):
    """A run of before there were histories, layers and predictions, beside one that has them."""
    old = write_run(tmp_path / "old", ["first", EVIL, "third"], method="inclora")
    (old / "run.json").unlink()
    scores = {"arc acc": {"base": 0.5, "stack": 0.45}}
    (old / "lm_eval.json").write_text(json.dumps({"after": 3, "limit": None, "scores": scores}))
    out = tmp_path / "both.html"
    assert main(["report", str(page.parent), str(old), "--output", str(out)]) == 0
    text = out.read_text()
    assert not Tags(text).open
    assert "<h1>2 runs</h1>" in text
    assert "old (inclora)" in text
    assert "<th>base model</th><th>after 3 tasks</th>" in text
    assert "<th>arc acc</th><td>0.5000</td><td>0.4500</td><td>-0.0500</td>" in text
    assert "Versions were not recorded." in text
    assert "No answers were kept" in text


def test_before_the_first_task(tmp_path):
    run = write_run(tmp_path / "run", ["first", "second"], matrix=[[0.1, None]])
    write_page(tmp_path / "page.html", [read_run(run)])
    assert "0 of 2 tasks are trained" in (tmp_path / "page.html").read_text()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_page(tmp_path / "page.html", [read_run(write_run(tmp_path / "run", ["first", "second"]))])
    text = (tmp_path / "page.html").read_text()
    assert "pip install matplotlib" in text
    assert "img" not in Tags(text).tags


def test_history_that_a_kill_cut_off(tmp_path):
    run = write_run(tmp_path / "run", ["first", "second"], steps=3)
    with (run / "history.jsonl").open("a") as file:
        file.write('{"task": "first", "step": 2, "loss": 7.5}\n{"task": "second", "st')
    history = read_run(run).history
    assert [(line["task"], line["step"]) for line in history] == [
        (t, s) for t in ("first", "second") for s in (1, 2, 3)
    ]
    assert history[1]["loss"] == 7.5  # logged twice: the last one counts


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser(page, tmp_path, width):
    """No complaint on the console, the page is there, and nothing in it was run."""
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},1600"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    address = page.as_uri()
    shot = subprocess.run(
        [BROWSER, *options, f"--screenshot={picture}", address], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in shot.stderr
    dom = subprocess.run(
        [BROWSER, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    assert "<title>run (jumplora)</title>" in dom.stdout
    from PIL import Image

    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # a blank page has one colour

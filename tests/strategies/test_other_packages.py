"""A method that another package brings: one file and an entry point, used by name in processes of their own."""

import os
import subprocess
import sys

import pytest
import toy

from hf_jumplora import ContinualRun
from hf_jumplora.bench.cell import strategies_of
from hf_jumplora.bench.protocol import BUDGETS, chosen_methods, grid
from hf_jumplora.methods import METHODS, Method, get_method
from hf_jumplora.options import MethodArguments
from hf_jumplora.stack import read_manifest


PACKAGE = '''
from dataclasses import dataclass, field

import torch

from hf_jumplora.methods import Method
from hf_jumplora.strategies import Strategy
from hf_jumplora.tuner import named_layers


@dataclass
class Shrink(Strategy):
    """weight * sum over layers of ||B||^2, divided by the number of the task."""

    weight: float = 0.1
    tasks: int = field(default=0, init=False, repr=False)

    def penalty(self, model, inputs, adapter, output):
        norms = [layer.jumplora_B[adapter].square().sum() for _, layer in named_layers(model, adapter)]
        return self.weight * torch.stack(norms).sum() / (self.tasks + 1)

    def on_task_end(self, model, adapter, examples):
        self.tasks += 1

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks)}

    def load_state_dict(self, state):
        self.tasks = int(state["tasks"])


METHOD = Method("incremental", {"gate": False}, (Shrink,), paper="none")
not_a_method = Shrink
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs the package here; returns its folder."""
    site = tmp_path / "site"
    (site / "shrink-1.0.dist-info").mkdir(parents=True)
    (site / "shrink.py").write_text(PACKAGE)
    (site / "shrink-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: shrink\nVersion: 1.0\n")
    (site / "shrink-1.0.dist-info" / "entry_points.txt").write_text(
        "[hf_jumplora.methods]\nshrink = shrink:METHOD\nbroken = shrink:not_a_method\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "shrink", raising=False)
    return site


def test_run_and_from_stack(package, toy_base, tmp_path):
    """By name in a run, and by the name that the stack holds in another process, where its state goes on."""
    toy.make_run(toy_base, tmp_path / "two", "shrink", stream=toy.tasks(2)).train()
    assert read_manifest(tmp_path / "two").method == "shrink"
    code = (
        "import toy\nfrom hf_jumplora import ContinualRun\n"
        f"run = ContinualRun.from_stack({str(tmp_path / 'two')!r}, toy.tasks(3)[2:], {str(tmp_path / 'three')!r}, "
        f"base_model={toy_base!r}, report_to=[], disable_tqdm=True, use_cpu=True)\n"
        "run.train()\nprint('STATE', run.plan.strategies[0].tasks, run.plan.strategies[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "STATE 3 Shrink(weight=0.1)" in done.stdout
    assert read_manifest(tmp_path / "three").task_names == ["size", "light", "mood"]


def test_options_and_bench(package):
    """Its options have the spelling of all others, and the bench finds its name and tunes its weight."""
    given = MethodArguments("shrink", strategy=["shrink.weight=3"])
    assert repr(given.strategies()) == "[Shrink(weight=3)]"
    assert not given.adapter_config().gate
    assert chosen_methods(["shrink"]) == ["shrink"]
    assert grid("shrink", BUDGETS["small"])[1] == pytest.approx([0.1, 1.0, 0.01])
    assert repr(strategies_of("shrink", 2.0)) == "[Shrink(weight=2.0)]"


def test_bad_entry_point(package):
    with pytest.raises(ValueError, match=r"'broken' = 'shrink:not_a_method' of hf_jumplora\.methods is not a Method"):
        get_method("broken")


def test_without_the_package():
    with pytest.raises(ValueError, match=r"unknown method 'shrink'; known: seqlora, .*when that package is installed"):
        get_method("shrink")


def test_a_method_as_an_object(toy_base, tmp_path):
    """As it is, under the name that it must have."""
    method = Method("incremental", {"gate": False}, name="mine")
    run = ContinualRun(toy.load_base(toy_base), toy.tasks(1), method, toy.arguments(tmp_path), toy.tokenizer())
    run.train()
    assert read_manifest(tmp_path).method == "mine"
    with pytest.raises(ValueError, match="needs a name"):
        get_method(Method("incremental"))
    with pytest.raises(ValueError, match="'ella' is the name of another method"):
        get_method(Method("incremental", name="ella"))
    assert get_method(METHODS["ella"]) is METHODS["ella"]

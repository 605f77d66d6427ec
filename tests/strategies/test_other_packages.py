"""A method that another package brings: one file and an entry point, used by name in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import toy

from hf_jumplora import ContinualRun
from hf_jumplora.methods import METHODS, Method, get_method
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
def package(tmp_path):
    """Writes the package; returns the environment in which a process has it installed."""
    (tmp_path / "site" / "shrink-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "shrink.py").write_text(PACKAGE)
    (tmp_path / "site" / "shrink-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: shrink\nVersion: 1.0\n"
    )
    (tmp_path / "site" / "shrink-1.0.dist-info" / "entry_points.txt").write_text(
        "[hf_jumplora.methods]\nshrink = shrink:METHOD\nbroken = shrink:not_a_method\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])}


def process(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_run_and_from_stack(package, toy_base, tmp_path):
    """By name in a run, and by the name that the stack holds in another process, where its state goes on."""
    start = (
        "import toy\n"
        f"run = toy.make_run({toy_base!r}, {str(tmp_path / 'two')!r}, 'shrink', stream=toy.tasks(2))\n"
        "run.train()\n"
    )
    process(start, package)
    assert read_manifest(tmp_path / "two").method == "shrink"
    goes_on = (
        "import toy\nfrom hf_jumplora import ContinualRun\n"
        f"run = ContinualRun.from_stack({str(tmp_path / 'two')!r}, toy.tasks(3)[2:], {str(tmp_path / 'three')!r}, "
        f"base_model={toy_base!r}, report_to=[], disable_tqdm=True, use_cpu=True)\n"
        "run.train()\nprint('STATE', run.plan.strategies[0].tasks, run.plan.strategies[0])\n"
    )
    assert "STATE 3 Shrink(weight=0.1)" in process(goes_on, package)
    assert read_manifest(tmp_path / "three").task_names == ["size", "light", "mood"]


def test_options_and_bench(package, tmp_path):
    """Its options have the spelling of all others, and the bench finds its name and tunes its weight."""
    code = (
        "import json\n"
        "from hf_jumplora.bench.cell import strategies_of\n"
        "from hf_jumplora.bench.protocol import BUDGETS, chosen_methods, grid\n"
        "from hf_jumplora.options import MethodArguments\n"
        "given = MethodArguments('shrink', strategy=['shrink.weight=3'])\n"
        "print(json.dumps([repr(given.strategies()), given.adapter_config().gate, chosen_methods(['shrink']),\n"
        "                  grid('shrink', BUDGETS['small'])[1], repr(strategies_of('shrink', 2.0))]))\n"
    )
    strategies, gate, chosen, weights, tuned = json.loads(process(code, package))
    assert (strategies, gate, chosen, tuned) == ("[Shrink(weight=3)]", False, ["shrink"], "[Shrink(weight=2.0)]")
    assert weights == pytest.approx([0.1, 1.0, 0.01])


def test_bad_entry_point(package):
    code = "from hf_jumplora.methods import get_method\ntry: get_method('broken')\nexcept ValueError as e: print(e)\n"
    assert "'broken' = 'shrink:not_a_method' of hf_jumplora.methods is not a Method" in process(code, package)


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

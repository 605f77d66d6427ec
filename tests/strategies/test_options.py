"""`--strategy name.option=value`: one way for the options of all strategies."""

import pytest
import toy

from hf_jumplora import ContinualRun
from hf_jumplora.methods import METHODS
from hf_jumplora.options import MethodArguments
from hf_jumplora.strategies import Ella, KFac


def test_options_of_a_strategy():
    assert MethodArguments("kfac").strategies() is None
    options = ["kfac.weight=50", "kfac.memory=sum", "kfac.examples=64"]
    assert MethodArguments("kfac", strategy=options).strategies() == [KFac(50.0, "sum", 64)]
    assert MethodArguments("kfac", strategy=["kfac.memory=8"]).strategies() == [KFac(memory=8)]
    assert MethodArguments("ella", strategy=["ella.weight=3e4"]).strategies() == [Ella(30000.0)]


def test_the_same_spelling_in_python(toy_base, tmp_path):
    options = ["kfac.weight=50", "kfac.memory=sum"]
    assert METHODS["kfac"].make_strategies(options) == [KFac(50.0, "sum")]
    run = ContinualRun(
        toy.load_base(toy_base), toy.tasks(1), "kfac", toy.arguments(tmp_path), toy.tokenizer(), strategies=options
    )
    assert run.plan.strategies == [KFac(50.0, "sum")]
    assert METHODS["kfac"].make_strategies([]) == []


def test_ella_weight_is_deprecated():
    with pytest.warns(FutureWarning, match=r"use --strategy ella\.weight=VALUE"):
        assert MethodArguments("ella", ella_weight=5.0).strategies() == [Ella(5.0)]


def test_each_compared_method_gets_its_own():
    plans = MethodArguments("kfac", strategy=["kfac.weight=50"]).plans(["inclora", "ella", "jumplora-kfac"])
    assert plans["kfac"][1] == plans["jumplora-kfac"][1] == [KFac(50)]
    assert plans["inclora"][1] is None
    assert plans["ella"][1] is None


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("kfac", "kfac.weight", "write NAME.OPTION=VALUE"),
        ("kfac", "weight=3", "write NAME.OPTION=VALUE"),
        ("kfac", "ella.weight=3", "method 'kfac' has kfac"),
        ("inclora", "kfac.weight=3", "has no strategies"),
        ("kfac", "kfac.wait=3", "kfac has the options weight, memory, examples"),
        ("kfac", "kfac.G=3", "kfac has the options weight, memory, examples"),
        ("kfac", "kfac.weight=-3", "must not be negative"),
    ],
)
def test_bad_options(method, option, words):
    with pytest.raises(ValueError, match=words):
        MethodArguments(method, strategy=[option]).strategies()

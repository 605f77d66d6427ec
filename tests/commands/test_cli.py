"""The `hf-jumplora` command: help, one-line errors, exit codes."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from packaging.version import Version

from hf_jumplora.cli import COMMANDS, main
from hf_jumplora.commands import doctor
from hf_jumplora.methods import METHODS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    module, parser = importlib.import_module(f"hf_jumplora.commands.{command}"), argparse.ArgumentParser()
    module.add_arguments(parser)
    assert " ".join(module.__doc__.split()) in shown
    for action in parser._actions:
        assert (action.option_strings or [action.dest])[-1] in shown


def test_help_lists_all_commands_and_imports_none():
    code = (
        "import sys\nfrom hf_jumplora.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('hf_jumplora.commands')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.strip().endswith("[]")


def test_python_m():
    """`python -m hf_jumplora` is the command: its help, its errors, its exit codes."""
    command = [sys.executable, "-m", "hf_jumplora"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf-jumplora ")
    done = subprocess.run([*command, "inspect", "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    # PEFT imports bitsandbytes, which on processors with bf16 says that it would like a package named `kernels`.
    (line,) = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert line.startswith("hf-jumplora: ")


@pytest.mark.parametrize("argv", [["inspect", "/nowhere"], ["verify", "/nowhere"]], ids=" ".join)
def test_an_error_is_one_line(argv, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-jumplora: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["inspct"], ["inspect"], ["--nonsense"]], ids=str)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: hf-jumplora" in capsys.readouterr().err


def test_methods(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert "jumplora         gated  incremental  JumpLoRA (arXiv 2604.16171)" in lines
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == next(iter(METHODS))


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("HF_JUMPLORA_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  torch {torch.__version__}" in shown
    assert "cpu (processor): backend blocked" in shown


def test_doctor_names_what_is_wrong(capsys, monkeypatch):
    """A library that is too old, an extra that is missing, and a backend that cannot run here."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    monkeypatch.setattr(doctor, "LOWEST", [("peft", Version("0.20"), Version("0.21"), "no hooks")])
    monkeypatch.setenv("HF_JUMPLORA_BACKEND", "nonsense")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "peft 0.20: no hooks; install peft>=0.21" in shown
    assert "ZeRO: pip install 'hf-jumplora[deepspeed]'" in shown
    assert "HF_JUMPLORA_BACKEND is one of" in shown

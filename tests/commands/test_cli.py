"""The `hf-jumplora` command: help, one-line errors, exit codes."""

import argparse
import importlib
import subprocess
import sys

import pytest

from hf_jumplora.cli import COMMANDS, main


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

"""Write a script for your shell that completes commands, options and their values.

    hf-jumplora completion bash

bash: add `eval "$(hf-jumplora completion bash)"` to ~/.bashrc
zsh: add `eval "$(hf-jumplora completion zsh)"` to ~/.zshrc
fish: hf-jumplora completion fish > ~/.config/fish/completions/hf-jumplora.fish

Starting a shell is quicker with the script in a file: write it once, and `source` the file instead. The script does
not update itself: write it again after an update, or after installing a package that adds methods.
"""

import argparse
import importlib

from . import COMMANDS


BASH = """\
_hf_jumplora() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        esac
        case "${{COMP_WORDS[1]}} $word" in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _hf_jumplora hf-jumplora
"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora completion`."""
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell to write for")


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    actions = {command: _actions(command) for command in COMMANDS}
    print(_fish(actions) if args.shell == "fish" else _bash(actions, zsh=args.shell == "zsh"), end="")


def _actions(command: str) -> list[argparse.Action]:
    """The arguments of a command, with `choices` for those whose values are known."""
    from ..methods import METHODS
    from ..options import recipe_parser

    module = importlib.import_module(f"{__package__}.{command}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    actions = list(parser._actions)
    if command in ("train", "eval", "router"):
        own = ("help", "config") if command == "train" else ("help",)  # that the command has itself
        actions += [a for a in recipe_parser(module.option_classes())._actions if a.dest not in own]
    for action in actions:
        names = reversed(action.option_strings)  # --max_steps and --max-steps are one option: the first stays
        action.option_strings = list({name.replace("_", "-"): name for name in names}.values())
        if action.dest in ("method", "methods"):
            action.choices = [*METHODS, *(["all"] if command == "bench" else [])]
    return actions


def _values(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _bash(actions: dict[str, list[argparse.Action]], zsh: bool) -> str:
    values, options = [], []
    for command, arguments in actions.items():
        for action in arguments:
            if action.choices:
                names = "|".join(f'"{command} {name}"' for name in action.option_strings or [command])
                values.append(f'        {names}) words="{_values(action)}" ;;')
        names = " ".join(name for action in arguments for name in action.option_strings)
        options.append(f'        "{command} -"*) words="{names}" ;;')
    script = BASH.format(commands=" ".join(actions), values="\n".join(values), options="\n".join(options))
    return (ZSH if zsh else "") + script


def _fish(actions: dict[str, list[argparse.Action]]) -> str:
    complete, lines = "complete -c hf-jumplora", []
    for command, line in COMMANDS.items():
        lines.append(f"{complete} -n __fish_use_subcommand -f -a {command} -d {_fish_quoted(line)}")
        seen = f"-n '__fish_seen_subcommand_from {command}'"
        for action in actions[command]:
            flags = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in action.option_strings]
            value = f"-x -a '{_values(action)}'" if action.choices else "" if action.nargs == 0 else "-r"
            if flags:
                help_line = (action.help or "").split(". ")[0]
                lines.append(" ".join([complete, seen, *flags, value, "-d", _fish_quoted(help_line)]))
            elif action.choices:
                lines.append(f"{complete} {seen} -f -a '{_values(action)}'")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    r"""A word of fish, in which \ and ' are escaped by \ within '...'."""
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'") + "'"

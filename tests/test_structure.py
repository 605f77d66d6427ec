"""What the layout of the package promises: the direction of imports, small modules, a light import, docstrings,
and a wheel that has all of it."""

import ast
import importlib
import inspect
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from forks import forks
from hatchling import build
from report.runs import write_run

import hf_jumplora


ROOT = Path(hf_jumplora.__file__).parents[1]
PACKAGE = ROOT / "hf_jumplora"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# part -> the parts of ours it may import. Later ones build on earlier ones; `metrics` stands alone.
ORDER = [
    "_compat",
    "escape",
    "schema",
    "disk",
    "kernels",
    "ops",
    "tuner",
    "stack",
    "strategies",
    "methods",
    "trainer",
    "options",
]
ORDER += ["memory", "bench", "commands", "cli", "__main__"]
ALLOWED = {part: set(ORDER[: i + 1]) for i, part in enumerate(ORDER)}
ALLOWED["metrics"] = {"metrics"}
ALLOWED["data"] = {"data", "metrics", "schema"}
ALLOWED["report"] = {"report", "metrics", "schema", "disk", "escape"}
ALLOWED["hub"] = {"hub", "report", "stack", "metrics", "schema", "disk", "escape"}
ALLOWED["trainer"] |= {"data", "metrics", "report", "hub"}
for part in ("options", "bench", "commands", "cli"):
    ALLOWED[part] |= {"data", "metrics", "report", "hub"}


def part_of(path: Path) -> str:
    if "kernels" in path.relative_to(ROOT).parts[:1]:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path):
    """(part, line) of every import of ours, inside functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base] if node.module else [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "jumplora_kernels" or name[:2] == ["kernels", "jumplora_kernels"]:
                yield "kernels", node.lineno
            elif name[0] == "hf_jumplora" and len(name) > 1:
                yield name[1], node.lineno


def test_imports_go_one_way():
    wrong = [
        f"{path}:{line} imports {other}"
        for path in MODULES
        if (part := part_of(path)) != "__init__"  # the package itself: tuner at once, the rest when it is first used
        for other, line in imported_parts(path)
        if other not in ALLOWED[part]
    ]
    assert not wrong


def test_the_rule_sees_imports():
    """The check above would find something."""
    assert {"ops", "tuner"} <= {part for part, _ in imported_parts(PACKAGE / "tuner" / "layer.py")}
    assert {"stack", "hub", "report"} <= {part for part, _ in imported_parts(PACKAGE / "trainer" / "run.py")}


def imported_modules(path: Path):
    """(file of ours that is imported, name taken from it or None, line) of every import, inside functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[tuple[list[str], str | None]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found = [(base, alias.name) for alias in node.names]
        for base, name in found:
            for parts, taken in (([*base, name], None), (base, name)) if name else ((base, None),):
                file = ROOT.joinpath(*parts)
                file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
                if file in MODULES:
                    yield file, taken, node.lineno
                    break


def test_no_circles_of_files():
    """No file imports itself by way of others, for types or inside functions either."""
    reached = {path: {file for file, _, _ in imported_modules(path)} for path in MODULES}
    for middle in MODULES:
        for path, files in reached.items():
            if middle in files:
                reached[path] = files | reached[middle]
    assert [str(path.relative_to(ROOT)) for path, files in reached.items() if path in files] == []


def test_no_private_imports():
    """What another module needs has a public name."""
    private = [
        f"{path}:{line} takes {name} of {file.name}"
        for path in MODULES
        for file, name, line in imported_modules(path)
        if name and name.startswith("_") and not name.startswith("__")
    ]
    assert private == []


def test_no_function_takes_a_run():
    """Parts of a run take its plan, a model or a folder: what they need shows in their arguments."""
    takers = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for argument in arguments:
                    kind = ast.unparse(argument.annotation) if argument.annotation else ""
                    if "ContinualRun" in kind or (argument.arg == "run" and not kind):
                        takers.append(f"{path}:{node.lineno} {node.name}({argument.arg})")
    assert takers == []


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """The three checks above would find something."""
    package = tmp_path / "hf_jumplora"
    package.mkdir()
    texts = {"a": "from .b import _secret", "b": "def f():\n    from . import a", "c": "def g(x: 'ContinualRun'): ..."}
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "MODULES", sorted(package.glob("*.py")))
    for check in (test_no_circles_of_files, test_no_private_imports, test_no_function_takes_a_run):
        with pytest.raises(AssertionError):
            check()


def test_modules_are_short_and_say_what_they_are():
    texts = {path: path.read_text() for path in MODULES}
    assert not [path for path, text in texts.items() if len(text.splitlines()) > 400]
    assert not [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))], "no docstring"


@pytest.fixture(scope="module")
def fresh():
    """Runs code in a process in which nothing of ours, PEFT or the extras has been imported."""
    with forks("transformers.modeling_utils") as run:
        run(
            "import sys\n"
            "extras = {'trl', 'datasets', 'matplotlib', 'transformers.trainer'}\n"
            "assert not {'peft', 'hf_jumplora', *extras} & set(sys.modules)"
        )
        yield run


BLOCK = """
import sys
for name in {names}:
    sys.modules[name] = None  # any import of it raises ImportError
"""


def test_imports_without_the_extras(fresh):
    """Without TRL, Triton, DeepSpeed, bitsandbytes and matplotlib everything but ContinualSFTTrainer is there."""
    names = ["trl", "triton", "deepspeed", "matplotlib", "bitsandbytes"]
    code = BLOCK.format(names=names) + (
        "import hf_jumplora\n"
        "for name in set(hf_jumplora.__all__) - {'ContinualSFTTrainer'}: getattr(hf_jumplora, name)\n"
        "try:\n    hf_jumplora.ContinualSFTTrainer\n"
        "except ImportError as error: print(error)\n"
    )
    assert "pip install trl" in fresh(code)


def test_check_does_not_wait_for_torch(tmp_path):
    """`hf-jumplora check` looks at files, and is started often; all commands' help is there at once."""
    write_run(tmp_path / "run", ["first", "second"])
    code = (
        "import sys\nfrom importlib import import_module\nfrom hf_jumplora.cli import COMMANDS, main\n"
        "for name in COMMANDS: import_module(f'hf_jumplora.commands.{name}')\n"
        f"code = main(['check', {str(tmp_path / 'run')!r}])\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("SHIP")


@pytest.mark.parametrize("first", ["hf_jumplora.tuner.config", "transformers.trainer"])
def test_the_method_is_registered(fresh, first):
    """Whatever is imported before what."""
    code = (
        f"import {first}\nimport hf_jumplora\nfrom peft import mapping, get_peft_config\n"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING['JUMPLORA'] is hf_jumplora.JumpLoraConfig\n"
    )
    fresh(code)


def test_import_is_light(fresh):
    """`import hf_jumplora` registers the method and loads neither trainers nor data sets nor plots."""
    code = (
        "import sys, hf_jumplora\nfrom peft import mapping\nassert 'JUMPLORA' in mapping.PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "heavy = {'trl', 'datasets', 'pandas', 'matplotlib', 'transformers.trainer', 'hf_jumplora.data'}\n"
        "heavy.add('hf_jumplora.trainer')\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert fresh(code).splitlines()[-1] == "[]"  # behind what bitsandbytes says on some processors


INSTALLED = """
import importlib.util, os, sys
os.chdir({there!r})
sys.path[:] = [{wheel!r}, *(path for path in sys.path if path not in ("", {root!r}, {root!r} + "/kernels"))]
from importlib.metadata import distribution
(command,) = distribution("hf-jumplora").entry_points.select(name="hf-jumplora")
main = command.load()
assert main(["doctor"]) == 0
sys.modules["matplotlib"] = None  # pictures are not what may be missing
assert main(["report", "run"]) == 0
from hf_jumplora import JumpLoraConfig
from hf_jumplora.data.streams import stream_path
from hf_jumplora.hub.card import template_path
files = [template_path(), stream_path("order1"), importlib.util.find_spec("jumplora_kernels").origin]
files += [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "hf_jumplora"]
print([str(file) for file in files if not str(file).startswith({wheel!r})])
"""


def test_wheel_and_sdist(fresh, tmp_path, monkeypatch):
    """The sdist is enough to build the wheel, as pip does; the wheel has every file of the package and nothing else,
    and works where there is no checkout."""
    monkeypatch.chdir(ROOT)
    sdist = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert {path.name for path in ROOT.glob("*.md")} <= {path.name for path in source.iterdir()}
    monkeypatch.chdir(source)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as archive:
        archive.extractall(tmp_path / "wheel")

    packaged = {PACKAGE: "hf_jumplora", ROOT / "kernels" / "jumplora_kernels": "jumplora_kernels"}
    packaged[ROOT / "recipes" / "streams"] = "hf_jumplora/streams"
    expected = {
        f"{name}/{path.relative_to(folder)}"
        for folder, name in packaged.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    expected.add("hf_jumplora/hub/model_card_template.md")
    files = [path for path in (tmp_path / "wheel").rglob("*") if path.is_file() and ".dist-info" not in str(path)]
    assert {str(path.relative_to(tmp_path / "wheel")) for path in files} == expected

    write_run(tmp_path / "run", ["first", "second"])
    shown = fresh(INSTALLED.format(there=str(tmp_path), wheel=str(tmp_path / "wheel"), root=str(ROOT)))
    assert shown.splitlines()[-1] == "[]"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("name", hf_jumplora.__all__)
def test_public_names_are_documented(name):
    """With a docstring of their own, not one that dataclass or Trainer made."""
    if name == "ContinualSFTTrainer":
        pytest.importorskip("trl")
    value = getattr(hf_jumplora, name)
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert not own.startswith(f"{name}(")
    assert len(own.split()) > 5


def test_public_methods_are_documented():
    for name in ("ContinualRun", "GateCallback", "TextTask", "Task"):
        for method, value in vars(getattr(hf_jumplora, name)).items():
            if not method.startswith(("_", "on_")) and inspect.isfunction(value):
                assert value.__doc__, f"{name}.{method}"


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'ContinualTrainr'"):
        hf_jumplora.ContinualTrainr  # noqa: B018


def test_declared_names_exist():
    """`__all__` of every part of the package."""
    for path in PACKAGE.glob("*/__init__.py"):
        module = importlib.import_module(f"hf_jumplora.{path.parent.name}")
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name) is not None

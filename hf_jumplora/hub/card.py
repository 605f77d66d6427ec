"""Model cards, generated from the manifest, metrics.json and run.json alone."""

import re
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..escape import cell
from ..metrics.units import units_of
from ..report.report import (
    GENERAL,
    NOT_MEASURED,
    data_rows,
    figures,
    general_rows,
    markdown,
    matrix_rows,
    measured_as,
    pairs,
    warning,
)
from ..report.verdict import judge_metrics, says
from ..stack.manifest import Manifest, is_folder


_HUB = "hf://datasets/"  # the prefix of a task's source that is a data set on the Hub
_SETTINGS = ("adapter.", "args.")


def template_path() -> Path:
    """model_card_template.md: next to this file in an installed package, at the top of a checkout."""
    packaged = Path(__file__).with_name("model_card_template.md")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "model_card_template.md"


def _dataset(info: dict[str, Any]) -> str | None:
    source = info.get("source") or ""
    return source.removeprefix(_HUB) if re.fullmatch(rf"{_HUB}[\w.-]+(/[\w.-]+)?", source) else None


def _base_id(manifest: Manifest) -> str | None:
    """The base model's id; None for a local folder."""
    base = manifest.base_model["name_or_path"]
    return base if base and not is_folder(base) else None


def _base_name(manifest: Manifest) -> str:
    base = manifest.base_model["name_or_path"]
    return _base_id(manifest) or PureWindowsPath(base).name or manifest.base_model["architecture"]


def _metric(result: dict[str, Any], name: str) -> str:
    """The name of the metric of a task."""
    return next((info["metric"] for info in result.get("data", ()) if info["name"] == name), None) or "accuracy"


def _scores(result: dict[str, Any]) -> list[tuple[dict[str, Any], float, str]]:
    """(info, score after the last task, name and unit such as "accuracy in %") of each trained task with a score."""
    columns = {
        name: (float(unit.show(score, 2)), _metric(result, name) + " in %" * unit.share)
        for name, score, unit in zip(result["tasks"], result["matrix"][-1], units_of(result), strict=True)
        if score is not None
    }
    return [(info, *columns[info["name"]]) for info in result["trained"] if info["name"] in columns]


def _verdict(result: dict[str, Any]) -> str:
    """SHIP or DON'T SHIP, by the default limits of `hf-jumplora check`, with the reasons."""
    verdict = judge_metrics(result)
    words = {True: "ok", False: "**failed**", None: "-"}
    rows = [["check", "", "what was found"]]
    rows += [[check["check"], words[check["ok"]], check["says"]] for check in verdict["checks"]]
    return f"**{says(verdict)}**\n\n{markdown(rows)}"


def _data(manifest: Manifest, result: dict[str, Any], name: str) -> ModelCardData:
    architecture = manifest.base_model["architecture"]
    kinds = {"ForCausalLM": "text-generation", "ForConditionalGeneration": "text2text-generation"}
    datasets = sorted({dataset for info in result["trained"] if (dataset := _dataset(info))})
    return ModelCardData(
        library_name="peft",
        base_model=_base_id(manifest),
        pipeline_tag=next((tag for end, tag in kinds.items() if architecture.endswith(end)), None),
        tags=list(dict.fromkeys(["continual-learning", "jumplora", "adapter", manifest.method])),
        datasets=datasets or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification" if info.get("labels") else "other",
                dataset_type=_dataset(info) or info["name"],
                dataset_name=info["name"],
                metric_type=_metric(result, info["name"]),
                metric_name=f"{what} after the last task",
                metric_value=score,
            )
            for info, score, what in _scores(result)
        ]
        or None,
    )  # fmt: skip


def eval_results(result: dict[str, Any]) -> str | None:
    """Content of `.eval_results/*.yaml`, the Hub's newer format of results; None if no data set is on the Hub."""
    entries = [
        EvalResultEntry(dataset, info["name"], score, notes=f"{what} after the last task of the stack")
        for info, score, what in _scores(result)
        if (dataset := _dataset(info))
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def stack_card(
    manifest: Manifest,
    result: dict[str, Any],
    settings: dict[str, Any] | None = None,
    where: str = ".",
    pictures: list[str] | tuple[str, ...] = (),
    template: str | Path | None = None,
) -> str:
    """README.md of a stack: what it is, how to load it, its training data, scores and settings.

    Args:
        result: the content of metrics.json. settings: the content of run.json.
        where: the stack's id on the Hub, or "." for a folder. pictures: file names of the pictures to show.
        template: a Jinja file that replaces model_card_template.md, which shows the available variables.
    """
    trained, quantization = result["trained"], (settings or {}).get("quantization") or {}
    hyper = [[key, str(value)] for key, value in (settings or {}).items() if key.startswith(_SETTINGS)]
    card = ModelCard.from_template(
        _data(manifest, result, where.split("/")[-1] if where != "." else f"{_base_name(manifest)} stack"),
        template_path=str(template or template_path()),
        where=where,
        base_model_name=_base_name(manifest),
        base_model_id=_base_id(manifest),
        base_revision=manifest.base_model["revision"],
        architecture=manifest.base_model["architecture"],
        method=manifest.method,
        quantization={k: cell(v) if isinstance(v, str) else v for k, v in quantization.items()},
        strategies=list(map(cell, (settings or {}).get("strategies") or [])),
        additive=manifest.additive,
        separate=manifest.separate,
        competing=manifest.competing,
        tasks=manifest.task_names,
        last_folder=manifest.tasks[-1]["folder"] if manifest.tasks else "task_000",
        trained=[{**info, "dataset": _dataset(info), "source": cell(info["source"] or "")} for info in trained],
        seconds=f"{sum(info['seconds'] for info in trained):.0f}",
        settings=markdown([["option", "value"], *hyper]) if hyper else "",
        measured=measured_as(result),
        matrix=markdown(matrix_rows(result)),
        general=markdown(general_rows(result)) if len(general_rows(result)) > 1 else "",
        about_general=GENERAL,
        not_measured=NOT_MEASURED,
        data=markdown(data_rows(result)) if len(data_rows(result)) > 1 else "",
        warning=warning(result),
        metrics=[(*figure, result["formulas"][key]) for key, figure in figures(result, 2).items()],
        pairs=markdown(pairs(result)) if len(pairs(result)) > 1 else "",
        verdict=_verdict(result),
        pictures=list(pictures),
        versions=manifest.versions,
    )
    return str(card)


def task_card(manifest: Manifest, name: str, folder: str, info: dict[str, Any], where: str = ".") -> str:
    """README.md of one task's folder. where: the stack's id on the Hub, or "." for the folder with stack.json."""
    rows = [["what", "value"]]
    for key, value in info.items():
        if key not in ("name", "index") and value not in (None, "", []):
            rows.append([key.replace("_", " "), str(value)])
    if manifest.competing:
        kind, how = f"The ranks of one task of an adapter stack (`{manifest.method}`)", "with the tasks before it"
        alone = "load_stack(stack)  # with all other tasks, whose ranks compete with this one's"
    elif manifest.additive:
        kind, how = (
            f"The update of one task of an adapter stack (`{manifest.method}`)",
            "with the tasks before it",
        )
        alone = f'load_stack(stack, tasks=["{name}"])  # this task alone'
    elif manifest.separate:
        kind, how = f"A task's own update (`{manifest.method}`)", "as it is"
        alone = f'load_stack(stack, tasks=["{name}"])'
    else:
        kind, how = (
            f"One adapter trained sequentially (`{manifest.method}`), as it was after this task",
            "as it is",
        )
        alone = "load_stack(stack)  # the last of its tasks"
    return f"""# {name}

{kind}, on {_base_name(manifest)} ({manifest.base_model["architecture"]}). {info["density"]:.2%} of the adapted entries
are changed. The README.md of the stack has the accuracy matrix and all settings.

```python
from hf_jumplora import load_stack

stack = "{where}"  # the stack: its id on the Hub, or the folder that holds stack.json
model = {alone}
```

With PEFT, {how}:

```python
import hf_jumplora  # registers the method with PEFT
from peft import PeftModel
from transformers import {manifest.base_model["architecture"]}

base_model = {manifest.base_model["architecture"]}.from_pretrained("{_base_name(manifest)}")
model = PeftModel.from_pretrained(base_model, "{where}", subfolder="{folder}")
```

{markdown(rows)}
"""

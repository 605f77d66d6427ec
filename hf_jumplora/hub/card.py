"""Model cards, made from the manifest and metrics.json alone."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..report.report import _NAMES, _markdown, _rows, pairs
from ..stack.manifest import Manifest


def template_path() -> Path:
    """model_card_template.md: beside this file in an installed package, at the top of a checkout."""
    packaged = Path(__file__).with_name("model_card_template.md")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "model_card_template.md"


def _data(manifest: Manifest) -> ModelCardData:
    base = manifest.base_model["name_or_path"]
    # A folder of this machine is no model id: the card then names no base model in its metadata.
    return ModelCardData(
        library_name="peft",
        base_model=base if base and not Path(base).exists() else None,
        tags=["continual-learning", "jumplora", manifest.method],
    )


def stack_card(manifest: Manifest, result: dict[str, Any]) -> str:
    """README.md of a stack: what it is, how to load it, the accuracy matrix and what follows from it."""
    card = ModelCard.from_template(
        _data(manifest),
        template_path=str(template_path()),
        base_model_name=Path(manifest.base_model["name_or_path"]).name or manifest.base_model["architecture"],
        architecture=manifest.base_model["architecture"],
        method=manifest.method,
        additive=manifest.additive,
        separate=manifest.separate,
        tasks=manifest.task_names,
        first_folder=manifest.tasks[0]["folder"] if manifest.tasks else "task_000",
        trained=result["trained"],
        matrix=_markdown(_rows(result)),
        metrics=[
            (name, f"{100 * result[key]:.2f}", result["formulas"][key]) for key, name in _NAMES.items() if key in result
        ],
        pairs=_markdown(pairs(result)) if len(pairs(result)) > 1 else "",
        versions=manifest.versions,
    )
    return str(card)


def task_card(manifest: Manifest, name: str, folder: str, info: dict[str, Any]) -> str:
    """README.md of one task's folder."""
    base = manifest.base_model["name_or_path"] or manifest.base_model["architecture"]
    return (
        f"# {name}\n\nThe update of one task of an adapter stack ({manifest.method}), trained on "
        f"{info['train_examples']} examples for {info['steps']} steps; {info['density']:.2%} of the adapted entries "
        "are changed.\n\n```python\nimport hf_jumplora  # registers the method with PEFT\nfrom peft import PeftModel\n"
        "\n"
        f'model = PeftModel.from_pretrained(base_model, stack, subfolder="{folder}")  # with the tasks before it\n'
        f'model = hf_jumplora.load_stack(stack, tasks=["{name}"])  # this task alone\n```\n\nBase model: '
        f"{Path(base).name if Path(base).exists() else base}. The stack's own README.md has the accuracy matrix.\n"
    )

"""The recipes as they are, started with the shipped configurations."""

import json
import subprocess

import launch
import pytest
import toy
import yaml

from hf_jumplora.stack import read_manifest, verify_stack


def write_stream(folder):
    """Two tasks as files, and the stream that names them."""
    entries = []
    for k, name in enumerate(["size", "light"]):
        for split, rows in (("train", toy.rows(k, 16)), ("eval", toy.rows(k, 5, 5))):
            (folder / f"{name}_{split}.json").write_text(json.dumps(rows))
        files = {
            "train_file": f"{name}_train.json",
            "text": "sentence",
            "label": "label",
            "eval_file": f"{name}_eval.json",
        }
        entries.append({"name": name, "instruction": name, "labels": toy.KINDS[k], **files})
    (folder / "stream.yaml").write_text(yaml.safe_dump({"prompt": toy.PROMPT, "tasks": entries}))
    return folder / "stream.yaml"


@pytest.mark.parametrize(
    ("recipe", "config"), [("llama2_cl", "zero3"), pytest.param("t5_cl", "fsdp2", marks=pytest.mark.slow)]
)
def test_recipe(recipe, config, toy_base, toy_t5, tmp_path):
    options = {
        "model_name_or_path": toy_t5 if recipe == "t5_cl" else toy_base,
        "stream": write_stream(tmp_path),
        "output_dir": tmp_path / "run",
        "r": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "max_length": 64,
        "eval_mode": "score",  # generating takes a gather of all weights for each token
        "learning_rate": 0.01,
        "use_cpu": "true",
        "report_to": "none",
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = launch.accelerate(launch.CONFIGS / f"{config}.yaml", launch.ROOT / "recipes" / f"{recipe}.py", *arguments)
    done = subprocess.run(
        command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rank0" in line)[-4000:]
    assert verify_stack(tmp_path / "run").task_names == ["size", "light"]
    info = json.loads((tmp_path / "run" / "task_001" / "task.json").read_text())
    assert (info["processes"], info["sharding"]) == (2, config)
    assert read_manifest(tmp_path / "run").base_model["architecture"] == (
        "T5ForConditionalGeneration" if recipe == "t5_cl" else "LlamaForCausalLM"
    )

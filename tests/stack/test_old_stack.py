"""A stack that an earlier version wrote (commit 94b97ca, beside this file): it loads, and goes on, as it did."""

import json
import shutil
from pathlib import Path

import pytest
import toy

from hf_jumplora import ContinualRun, load_stack
from hf_jumplora.stack import merge_stack, verify_stack
from hf_jumplora.stack.operations import open_tasks


OLD = Path(__file__).parent / "written_by_94b97ca"
UPDATES = {  # (norm, kept entries) of each layer's update, computed by that version
    "size": [(1.20635, 286), (0.7806, 137), (1.06108, 253), (1.13952, 246)],
    "light": [(0.86095, 211), (0.40428, 73), (1.19204, 429), (0.8861, 209)],
}


def test_it_loads(toy_base, tmp_path):
    assert verify_stack(OLD).task_names == ["size", "light"]
    for task in open_tasks(OLD)[2]:
        for layer, (norm, kept) in zip(task.shapes, UPDATES[task.name], strict=True):
            assert task.update(layer).double().norm().item() == pytest.approx(norm, abs=1e-4)
            assert int(task.support(layer).sum()) == kept
    merged = load_stack(OLD, toy_base, merge=True).state_dict()
    assert merge_stack(OLD, tmp_path / "out", toy_base) == 4
    written = toy.load_base(tmp_path / "out").state_dict()
    assert all((written[name] == merged[name]).all() for name in written)


def test_it_goes_on(toy_base, tmp_path):
    """In a folder of its own, where it is sealed anew; and in its own folder."""
    (new,) = toy.tasks(3)[2:]
    options = {"processing_class": toy.tokenizer(), "use_cpu": True, "disable_tqdm": True, "report_to": []}
    run = ContinualRun.from_stack(OLD, [new], tmp_path / "more", base_model=toy_base, save_strategy="no", **options)
    assert run.train()["matrix"][1][:2] == json.loads((OLD / "metrics.json").read_text())["matrix"][1]
    assert verify_stack(tmp_path / "more").task_names == ["size", "light", "mood"]
    shutil.copytree(OLD, tmp_path / "own")
    model = toy.load_base(toy_base)
    model.config._name_or_path = model.name_or_path = ""
    toy.make_run(model, tmp_path / "own", "jumplora-best", stream=toy.tasks(3)).train()
    files = [verify_stack(tmp_path / name).tasks[2]["files"] for name in ("more", "own")]
    assert files[0]["adapter_model.safetensors"] == files[1]["adapter_model.safetensors"]

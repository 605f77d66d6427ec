"""What a strategy says of itself: its requirements, the hooks it has, its memory, and a fresh start in every run."""

import pytest
import toy

from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies import Ella, Ewc, ILora, KFac, LayerSize, Lwf, Migu, Replay, SoRA, Strategy


def test_requirements_are_known():
    with pytest.raises(TypeError, match=r"Bad\.requires is a subset of .*'past_factors'.*got \['gpu'\]"):

        class Bad(Strategy):
            requires = frozenset({"gpu"})

    assert KFac.requires == {"forward", "softmax"}
    assert ILora.requires == {"whole_model"}


def test_old_flags_work_for_one_version():
    with pytest.warns(FutureWarning, match=r"Old\.needs_past_factors = True is deprecated: write requires = frozenset"):

        class Old(Strategy):
            needs_past_factors = True

    assert Old.requires == {"past_factors"}
    assert Strategy.requires == frozenset()


def test_hooks_are_those_that_a_class_or_its_base_overrides():
    assert Strategy.hooks == frozenset()
    assert Replay.hooks == {"training_data"}
    assert {"training_data", "penalty", "checkpoint_state"} < ILora.hooks
    assert "on_gradients" in Migu.hooks

    class Quiet(Ewc):
        pass

    assert Quiet.hooks == Ewc.hooks


def test_memory():
    """By hand: a layer [6, 4] with an adapter of rank 2, of whose entries a tenth, then all have changed."""
    few, all_changed = LayerSize(6, 4, 2, changed=0.1), LayerSize(6, 4, 2)
    assert Ella().memory_bytes([few], 3) == round(16 * 0.1 * 24 + 4 * 2 * 10)
    assert Ella().memory_bytes([all_changed], 3) == 4 * 24 + 4 * 2 * 10
    assert Ella().memory_bytes([few], 0) == 0
    assert KFac(memory="sum").memory_bytes([few], 3) == 4 * (36 + 16)
    assert KFac().memory_bytes([few], 3) == 3 * 4 * (36 + 16)
    assert KFac(memory=5).memory_bytes([few], 3) == 4 * (6 * 5 + 4 * 4 + 10 * 5)
    assert KFac().workspace_bytes([few, all_changed], 1) == 16 * 24
    assert KFac().workspace_bytes([LayerSize(6, 4, 2, gate=False)], 1) == 0
    assert Ewc().memory_bytes([few], 1) is None
    assert [Lwf().logit_bytes(100, 2, tasks) for tasks in (0, 1)] == [0, 2600]
    assert SoRA().memory_bytes([few, all_changed], 0) == 4 * (2 + 2)


def test_a_list_of_strategies_can_be_used_again(toy_base, tmp_path):
    """A second run knows nothing of the first one."""
    strategies = [Ewc(examples=8)]
    files = []
    for name in ("first", "second"):
        stream = toy.tasks(2, train=20, evaluate=2)
        toy.make_run(toy_base, tmp_path / name, "ewc", stream=stream, strategies=strategies).train()
        files.append([task["files"]["adapter_model.safetensors"] for task in read_manifest(tmp_path / name).tasks])
    assert files[0] == files[1]

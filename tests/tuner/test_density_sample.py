"""Holding a density from a sample of entries: exact where the sample is everything, near elsewhere, never waiting."""

import pytest
import torch

from hf_jumplora.tuner import density, density_sample, gate_groups, named_layers, set_threshold
from hf_jumplora.tuner.density_sample import DensitySample
from hf_jumplora.tuner.lookup import adapter_config


def taus(model):
    return [gate.log_tau.item() for gate, _ in gate_groups(model, "default")]


@pytest.mark.parametrize("scope", ["global", "block", "layer"])
def test_a_small_model_is_its_own_sample(gated, scope):
    """All entries: the same density, and a threshold between the entry that the exact search finds and the next, where
    the rounding of a product decides nothing."""
    model = gated(threshold_scope=scope)
    sample, config = DensitySample(model, "default"), adapter_config(model, "default")
    for share in (0.3, 0.017, 1.0):
        set_threshold(model, "default", share)
        exact, kept = taus(model), density(model, "default")
        sample.hold(config, share)
        assert all(held > tau - 1e-2 for held, tau in zip(taus(model), exact, strict=True))  # up to the next entry
        assert density(model, "default") == pytest.approx(kept, abs=1 / 700)  # an entry of the smallest gate
        assert sample.density().item() == pytest.approx(kept, abs=1 / 700)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_sample_holds_the_density_nearly_and_the_same_every_time(gated, scope, monkeypatch):
    """600 of 3,072 entries of four layers of two shapes. Two objects, as in two processes: the same bits."""
    monkeypatch.setattr(density_sample, "ENTRIES", 600)
    monkeypatch.setattr(density_sample, "AT_LEAST", 100)
    model = gated(threshold_scope=scope)
    config = adapter_config(model, "default")
    first, second = DensitySample(model, "default"), DensitySample(model, "default")
    first.hold(config, 0.3)
    held = taus(model)
    assert density(model, "default") == pytest.approx(0.3, abs=0.05)
    assert first.density().item() == pytest.approx(0.3, abs=0.01)
    set_threshold(model, "default", 0.9)
    second.hold(config, 0.3)
    assert taus(model) == held
    assert len({part.rows.numel() for part in first._parts}) > 1 or scope == "layer"


def test_entries_are_spread_over_the_layers_by_size(gated, monkeypatch):
    monkeypatch.setattr(density_sample, "ENTRIES", 600)
    monkeypatch.setattr(density_sample, "AT_LEAST", 1)
    model = gated()
    layers = [layer for _, layer in named_layers(model, "default")]
    entries = sum(layer.in_features * layer.out_features for layer in layers)
    for part in DensitySample(model, "default")._parts:
        size = sum(layer.in_features * layer.out_features for layer in part.layers)
        assert len(part.rows) == pytest.approx(600 * size / entries, rel=0.02)
        pairs = set(zip(part.rows.tolist(), part.columns.tolist(), strict=True))
        assert len(pairs) >= 0.95 * len(part.rows)  # hardly an entry twice


def test_closed_entries_are_not_kept(gated, add_task, monkeypatch):
    """Under hard isolation: of the entries of the sample, none that an earlier task has."""
    from hf_jumplora.tuner import finish_adapter

    model = gated(density=0.5)
    finish_adapter(model, "default", "task_000")
    model = add_task(model, ["task_000"], density=0.2, isolation="hard")
    sample = DensitySample(model, "default")
    sample.hold(adapter_config(model, "default"), 0.2)
    assert density(model, "default") == pytest.approx(0.2, abs=1e-3)
    sample.hold(adapter_config(model, "default"), 0.45)
    assert density(model, "default") == pytest.approx(0.45, abs=1e-3)


def test_nothing_waits_for_the_device(gated):
    """No number is read of a tensor, and the operations do not grow with the number of layers of a shape."""
    from counting import Count

    small, large = (
        gated(threshold_scope="global", target_modules=names) for names in (["q_proj"], ["q_proj", "o_proj"])
    )
    counts = []
    for model in (small, large):
        sample, config = DensitySample(model, "default"), adapter_config(model, "default")
        with torch.no_grad(), Count() as count:
            sample.hold(config, 0.3)
            sample.density()
        assert count.waits == {}
        counts.append(count.operations)
    assert counts[1] <= counts[0] + 4

"""Runs without what costs most of their time here: pictures, and collecting garbage among everything imported."""

import gc

import pytest

import toy  # noqa: F401  imports transformers, peft and hf_jumplora


gc.freeze()  # the Trainer collects garbage at its end: 0.7 s each time over the objects that the imports made


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """tests/report draws them."""
    monkeypatch.setattr("hf_jumplora.report.report.draw_matrix", lambda result, path: None)

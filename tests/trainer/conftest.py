"""Runs without pictures, which take a third of their time here; tests/report draws them."""

import pytest


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("hf_jumplora.report.report.draw_matrix", lambda result, path: None)

"""Versions of transformers and PEFT: what is said about those that do not work. `make test-versions` runs the rest."""

import warnings

import pytest
from packaging.version import Version
from transformers.integrations import peft as native

from hf_jumplora import JumpLoraConfig, _compat


def test_an_old_version_is_one_warning(monkeypatch):
    monkeypatch.setattr(_compat, "LOWEST", [("peft", Version("0.20"), Version("0.21"), "hooks"), *_compat.LOWEST[:1]])
    with pytest.warns(UserWarning, match="does not work with") as seen:
        _compat.warn_of_bad_versions()
    assert [str(w.message) for w in seen] == ["hf_jumplora does not work with peft 0.20 (hooks; install peft>=0.21)"]


def test_these_versions_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.warn_of_bad_versions()


def test_native_adapters_are_refused_where_no_peft_is_new_enough(monkeypatch, tiny_llama):
    monkeypatch.setattr(_compat, "PEFT_FOR_NATIVE", Version("99.0"))
    monkeypatch.setattr(native, "check_peft_version", lambda min_version: None)
    monkeypatch.setattr(native.PeftAdapterMixin, "add_adapter", native.PeftAdapterMixin.add_adapter)
    _compat.refuse_native_adapters(JumpLoraConfig)
    with pytest.raises(ImportError, match=r"needs PEFT 99.0 .*Use peft.get_peft_model"):
        tiny_llama().add_adapter(JumpLoraConfig(target_modules=["q_proj"]))
    from peft import LoraConfig

    tiny_llama().add_adapter(LoraConfig(target_modules=["q_proj"]))  # others' methods are as they were

"""Continual learning for Hugging Face models with JumpLoRA: one gated low-rank update a task, one model, no task id."""

from .tuner import JumpLoraConfig, JumpLoraModel, register


register()

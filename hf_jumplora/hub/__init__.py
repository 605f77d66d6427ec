"""What a stack looks like on the Hub: its model card."""

from .card import stack_card, task_card


__all__ = ["stack_card", "task_card"]

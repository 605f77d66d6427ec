"""Model cards of a stack, and pushing it to the Hub."""

from .card import stack_card, task_card
from .push import Pusher, explain, open_repository, push_options, push_stack, start_push


__all__ = [
    "Pusher",
    "explain",
    "open_repository",
    "push_options",
    "push_stack",
    "stack_card",
    "start_push",
    "task_card",
]

"""Methods side by side on the same data, prompts, seeds and effective batch, tuned by one protocol (docs/bench.md)."""

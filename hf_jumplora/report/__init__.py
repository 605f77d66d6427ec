"""One readable table at the end of a run, `report.md`, and pictures."""

from .report import table, write_report


__all__ = ["table", "write_report"]

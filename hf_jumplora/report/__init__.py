"""One readable table at the end of a run, `report.md`, and pictures."""

from .report import comparison, table, write_report


__all__ = ["comparison", "table", "write_report"]

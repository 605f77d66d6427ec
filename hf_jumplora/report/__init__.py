"""Reports: the table at the end of a run, `report.md`, pictures, report.html and the verdict, each imported on use."""

"""One readable table at the end of a run, `report.md`, pictures, the page and the verdict. Importing it loads none."""

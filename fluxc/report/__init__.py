"""The report of a bundle: its data as structs (report.json), the page that shows them, and two of them side by side."""

"""What was done and what it cost: one HTML page, one Markdown card, one JSON file."""

from secateur.report.comparison import write_comparison
from secateur.report.write import write_report

__all__ = ["write_comparison", "write_report"]

"""One self-contained HTML page, a Markdown card, and JSON."""

"""Writes what `benchmarks.pages` makes."""

from benchmarks.pages import documents

for path, text in documents().items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

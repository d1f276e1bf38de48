"""A page of tables and figures: one self-contained HTML file, with its tables as CSV and figures as PNG."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from timm_ext.errors import printable
from timm_ext.files import atomic_write
from timm_ext.study.sheets import Sheet, write_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 1180px; padding: 1rem 2rem 4rem; }
h1 { font-size: 1.8rem; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #bbb; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
figcaption, caption { color: #444; font-size: .92rem; max-width: 70rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; font-weight: 500; }
thead th { border-bottom: 2px solid #666; font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; }
dt { font-weight: 600; }
dd { margin: 0; }
li { max-width: 70rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table of texts on the page: name, caption, column heads and rows, whose first cell heads the row."""

    stem: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG with its file stem, caption and the text for readers who cannot see it."""

    stem: str
    caption: str
    alt: str
    png: bytes


Section = tuple[str, str]
"""Headline and HTML of a part of the page."""


def write_page(
    folder: Path,
    title: str,
    sections: Iterable[Section],
    sheets: Iterable[Sheet],
    pictures: Iterable[Picture],
) -> Path:
    """Write `report.html`, `tables/*.csv` and `figures/*.png` into a folder.

    Args:
        folder: is created where needed; files of an earlier report are replaced.
        title: of the page.
        sections: of the page, in order.
        sheets: written as CSV.
        pictures: written as PNG.

    Returns:
        Path of the page.

    Raises:
        InputError: the folder cannot be written.
    """
    for sheet in sheets:
        write_sheet(folder / "tables" / f"{sheet.stem}.csv", sheet)
    for picture in pictures:
        with atomic_write(folder / "figures" / f"{picture.stem}.png") as temporary:
            temporary.write_bytes(picture.png)
    page = folder / "report.html"
    with atomic_write(page) as temporary:
        temporary.write_text(render_page(title, sections), encoding="utf-8")
    return page


def render_page(title: str, sections: Iterable[Section]) -> str:
    """Return the page: no scripts, no fonts, no address outside itself."""
    body = "".join(f"<section><h2>{_text(head)}</h2>{content}</section>\n" for head, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{_text(title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def picture(stem: str, figure: "Figure", caption: str, alt: str) -> Picture:
    """Draw a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(stem, caption, alt, buffer.getvalue())


def html_picture(picture: Picture) -> str:
    """Return a figure with its caption, the image inside the page."""
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{_text(picture.alt)}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def html_table(table: Table) -> str:
    """Return a table with its caption."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in table.rows
    )
    return (
        f"<table><caption>{_text(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def html_items(sentences: Iterable[str]) -> str:
    """Return sentences as a list."""
    return "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences) + "</ul>"


def html_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Return pairs of name and value as a list."""
    pairs = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    return f"<dl>{pairs}</dl>"


def _text(value: str) -> str:
    """Return a text for HTML: no tag in it acts, and control characters, which names may hold, are shown."""
    return escape(printable(value, keep="\n"))


def signed(value: float) -> str:
    """Return a number with its sign and three digits; −0 is +0."""
    return f"{round(value, 3) + 0.0:+.3f}"


def spread(mean_and_deviation: tuple[float, float]) -> str:
    """Return mean ± standard deviation."""
    mean, deviation = mean_and_deviation
    return f"{mean:.3f} ± {deviation:.3f}" if np.isfinite(mean) else "–"

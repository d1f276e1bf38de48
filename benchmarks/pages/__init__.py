"""Writes the pages of docs/benchmarks, and the README's lines about them, from the committed results.

    python -m benchmarks.pages

The words of a page are its template in benchmarks/pages/templates, its figures come from benchmarks/results;
the first paragraph of a page is its line in the README and in the index.
"""

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.pages.speed import (
    adaptation_step,
    convolution,
    cuda_resources,
    fisher,
    merge,
    streamed_merge,
)
from benchmarks.pages.steps import inference, train_step
from benchmarks.pages.tables import ROOT, Facts, codes_of, machine, signed, span, told
from benchmarks.pages.training import (
    adaptation_search,
    barrier,
    demo,
    fitted_heads,
    nnunet_hippocampus,
    ratio_groups,
    study,
)

PAGES = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- benchmarks\.pages: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
MAKERS: tuple[Callable[[], Facts], ...] = (
    demo,
    study,
    adaptation_search,
    barrier,
    ratio_groups,
    fitted_heads,
    nnunet_hippocampus,
    merge,
    adaptation_step,
    streamed_merge,
    fisher,
    train_step,
    inference,
    convolution,
    cuda_resources,
)


def documents() -> dict[Path, str]:
    """Return every file that this script writes, with its text."""
    texts = pages()
    index = "# Benchmarks\n\nEach page is made from committed results by `python -m benchmarks.pages`.\n\n"
    written = {PAGES / f"{name}.md": text for name, text in texts.items()}
    written[PAGES / "README.md"] = index + lines(texts, texts, "")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    written[ROOT / "README.md"] = BLOCK.sub(
        lambda block: block[1] + lines(texts, block[2].split(), "docs/benchmarks/") + block[3], readme
    )
    return written


def pages() -> dict[str, str]:
    """Return the text of every page by its name."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    templates.globals |= {
        "span": span,
        "machine": machine,
        "told": told,
        "codes_of": codes_of,
        "signed": signed,
        "median": statistics.median,
    }
    templates.filters["signed"] = signed
    return {
        make.__name__: reflowed(templates.get_template(f"{make.__name__}.md").render(make()))
        for make in MAKERS
    }


def lines(texts: dict[str, str], names: Iterable[str], folder: str) -> str:
    """Return one item of a list for each page: its title, linked, and its first paragraph."""
    items = []
    for name in names:
        title, paragraph = texts[name].split("\n\n")[:2]
        items.append(filled(f"- [{title.removeprefix('# ')}]({folder}{name}.md): {paragraph}", "  "))
    return "\n".join(items) + "\n"


def reflowed(text: str) -> str:
    """Return Markdown with paragraphs of even lines, whatever the length of the figures in them."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(filled(block) if _is_paragraph(block) else block for block in blocks) + "\n"


def _is_paragraph(block: str) -> bool:
    return re.match(r"[\w`\[\"]", block) is not None and "```" not in block


def filled(text: str, indent: str = "") -> str:
    """Return a paragraph in lines of at most 118 characters."""
    text = " ".join(text.split())
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

"""Pages of executed notebooks: one self-contained HTML file each, no scripts, nothing from the network.

nbconvert turns cells into HTML through `site/notebook.html.j2`; formulas become MathML when the page is made.
"""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from notebook_sources import front, tags, write
from pygments.formatters import HtmlFormatter

FILES = Path(__file__).with_name("site")
NO_ALT = {None, "", "No description has been provided for this image"}  # the last is nbconvert's own filling


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as MathML; what cannot be converted is shown as typed and marked as a fault."""
    # latex2mathml knows align* but not aligned, and numbers the lines of a plain align.
    tex = re.sub(r"\{align(?:ed)?\}", "{align*}", tex)
    try:
        html = convert(tex, display=display)
    except Exception:
        html = "\\"
    # It passes an unknown command or a stray & through as text.
    unknown = re.search(r">(?:\\[^<]*|&)</m", html) or html == "\\"
    return f'<code class="unrendered">{jinja2.filters.escape(tex)}</code>' if unknown else html


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if "://" not in url:  # another notebook is another page
            url = re.sub(r"\.ipynb(?=#|$)", ".html", url)
        return super().link(text, url, title)

    def table(self, text: str) -> str:
        return f'<div class="rich"><table>{text}</table></div>'


def markdown(text: str) -> str:
    """Markdown with formulas as HTML."""
    renderer = _Renderer(escape=False, anchor_link_text="#")
    return MarkdownWithMath(renderer=renderer).render(text)


def _style() -> str:
    return (FILES / "style.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")


def page(nb: NotebookNode, about: dict) -> str:
    """The page of one executed notebook, as HTML.

    Parameters
    ----------
    nb : NotebookNode
        The notebook with its outputs; a figure's alternative text is its cell's metadata `alt`.
    about : dict
        `title`, and, where something went wrong, `problem` in words for a notice at the top.
    """
    exporter = HTMLExporter(template_name="base", template_file=str(FILES / "notebook.html.j2"))
    # Pictures before HTML (both are static), and no scripts or widgets: they would need the network.
    kinds = ["image/svg+xml", "image/png", "image/jpeg", "text/html", "text/markdown", "text/latex", "text/plain"]
    exporter.config.NbConvertBase.display_data_priority = kinds
    exporter.register_filter("markdown2html", markdown)
    return exporter.from_notebook_node(nb, {"about": about, "style": _style()})[0]


def index(rows: list[dict]) -> str:
    """The front page: a table with one row per notebook (name, title, goal, minutes, seconds, status)."""
    files = jinja2.Environment(loader=jinja2.FileSystemLoader(FILES), autoescape=True)
    # A goal is one paragraph of markdown; in a table cell it needs no <p> of its own.
    files.filters["inline"] = lambda text: re.sub(r"^<p>|</p>\s*$", "", markdown(text or ""))
    return files.get_template("index.html.j2").render(rows=rows, style=_style())


def faults(html: str) -> list[str]:
    """What a reader of the page would stumble over, each with its cell, in a few words."""
    soup, found = BeautifulSoup(html, "html.parser"), []

    def fault(element, what: str) -> None:
        cell = element if "cell" in element.get("class", []) else element.find_parent(class_="cell")
        text = cell.select_one("pre, p, h1, h2, h3, li") or cell
        found.append(f"{cell['data-name']} `{text.get_text().strip().partition(chr(10))[0]}` {what}")

    for image in soup.select("img"):
        if (image.get("alt") or "").strip() in NO_ALT:
            fault(image, 'shows a figure without alternative text: write `# %% alt="..."`')
    for formula in soup.select(".unrendered"):
        fault(formula, f"has a formula that cannot be shown: {formula.get_text()}")
    for element in soup.select("script[src], link[href], iframe, img:not([src^='data:'])"):
        fault(element, f"needs a file or the network: <{element.name}>")
    for cell in soup.select(".tag-raises-exception"):
        if cell["data-name"] != "Not run" and not cell.select_one("pre.error"):
            fault(cell, "is tagged raises-exception but raised nothing")
    return found


def site(root: Path) -> list[str]:
    """Render build/executed into build/site.

    Returns one sentence for every fault a reader would meet on a page.
    """
    executed, pages = root / "build" / "executed", root / "build" / "site"
    rows, found = [], []
    for twin in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        now = nbformat.read(twin, 4)
        row = {"name": twin.stem, **front(now), "seconds": None, "status": "not run"}
        rows.append(row)
        if not (executed / twin.name).exists():
            continue
        nb = nbformat.read(executed / twin.name, 4)
        row |= nb.metadata["run"]
        row["status"] = "not passed" if row["problem"] else "passed"
        # Ids come from the content, so they tell whether this notebook is the one that was run.
        if [cell.id for cell in now.cells] != [cell.id for cell in nb.cells if "injected-parameters" not in tags(cell)]:
            row |= {"status": "out of date", "problem": "The notebook has changed since it was run."}
        html = page(nb, row)
        found += [f"{twin.stem}: {fault}." for fault in faults(html)]
        write(pages / f"{twin.stem}.html", html)
    write(pages / "index.html", index(rows))
    return found

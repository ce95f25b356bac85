"""A chapter or a lab's brief as one HTML file that loads nothing else.

Formulas are drawn by KaTeX, which is part of those pages that have formulas; without JavaScript
they stay in TeX. A diagram in Mermaid's notation becomes a list of its arrows.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from minipaged.labs.chapters.openings import as_figure, with_opening
from minipaged.labs.chapters.reading import ROOT, Cell, Chapter, with_links, with_quotes
from minipaged.labs.chapters.running import Output

NOT_RUN = '<p class="note">This page has no outputs yet: run <code>minipaged learn {}</code>.</p>'
RUNNING = (
    '<meta http-equiv="refresh" content="4"><p class="note">The code of this chapter is running. '
    "The page will show its outputs when they are there: begin with your predictions.</p>"
)
_ASSETS = files("minipaged") / "assets"
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^\s$](?:[^$]*[^\s$])?)\$", re.DOTALL)
_FONTS = re.compile(r"KaTeX_(Main-Regular|Main-Bold|Math-Italic|Size\d-Regular|AMS-Regular)\.")
_NODE = re.compile(r"(\w+)\s*(?:[\[({]+\"?(.+?)\"?[\])}]+)?\s*")


def chapter_page(
    chapter: Chapter, outputs: Sequence[Output], chapters: Sequence[Chapter], running: bool = False
) -> str:
    """The page of a chapter. Without outputs, it says how to get them.

    Args:
        running: the outputs are being computed: the page loads itself anew until it has them.
    """
    shown = iter(outputs)
    parts: list[str] = []
    for cell in chapter.cells:
        text = with_opening(cell.source, chapter.opening, as_figure)
        parts.append(_code(cell) if cell.is_code else as_html(text))
        output = next(shown, None) if cell.is_code else None
        parts += [] if output is None else [_shown(output, cell.title)]
    note = "" if outputs else RUNNING if running else NOT_RUN.format(chapter.number)
    return _page(chapter.title, note + "\n".join(parts), chapters, chapter.number)


def lab_page(brief: Path, chapters: Sequence[Chapter]) -> str:
    """The page of a lab's brief."""
    text = brief.read_text(encoding="utf-8")
    title = re.match(r"# (.+)", text)
    return _page(title[1] if title else brief.stem, as_html(text), chapters)


def file_of(name: str) -> str:
    """The file name of a page: 03_blocks_and_block_tables.html, and lab_03.html of a lab."""
    return f"lab_{name}.html" if name.isdigit() else f"{name}.html"


def _page(title: str, body: str, chapters: Sequence[Chapter], number: int | None = None) -> str:
    def link(chapter: Chapter, text: str) -> str:
        here = ' aria-current="page"' if chapter.number == number else ""
        return f'<a href="{file_of(chapter.name)}"{here}>{text}</a>'

    listed = [f"<li>{link(c, f'{c.number}. {html.escape(c.title)}')}</li>" for c in chapters]
    near = {each.number: each for each in chapters} if number is not None else {}
    before, after = near.get((number or 0) - 1), near.get((number or 0) + 1)
    texts = {
        "title": html.escape(title),
        "style": _asset("chapters", "page.css"),
        "maths": _maths() if 'class="formula' in body else "",
        "list": "\n".join(listed),
        "before": link(before, f"&larr; {html.escape(before.title)}") if before else "",
        "after": link(after, f"{html.escape(after.title)} &rarr;") if after else "",
        "body": body,
    }
    return filled("page.html", texts)


def filled(template: str, texts: Mapping[str, str]) -> str:
    """An HTML file of assets/chapters with its texts, which it has as {{name}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: texts[m[1]], _asset("chapters", template))


# ---- cells ---------------------------------------------------------------------------------------


def _code(cell: Cell) -> str:
    return f'<div class="code">{_coloured(cell.source, "python")}</div>'


def _shown(output: Output, title: str) -> str:
    texts = [text.strip("\n") for text in (output.text, output.value) if text]
    parts = [f"<pre>{html.escape(text)}</pre>" for text in texts]
    parts = [f'<div class="output">{"".join(parts)}</div>'] if parts else []
    parts += [output.html] if output.html else []
    title = html.escape(title)
    for picture in output.pictures:
        data = base64.b64encode(picture.encode()).decode()
        parts.append(f'<figure><img alt="{title}" src="data:image/svg+xml;base64,{data}">')
        parts.append(f"<figcaption>{title}</figcaption></figure>")
    if output.error:
        parts.append(f'<p class="note">The chapter stopped here: {html.escape(output.error)}</p>')
    return "\n".join(parts)


# ---- Markdown ------------------------------------------------------------------------------------


def as_html(markdown: str) -> str:
    """Markdown of a chapter: with formulas, quotes of the library, and links between chapters."""
    return _markdown().render(with_quotes(with_links(markdown, _address)))


def _address(target: str) -> str | None:
    """The target of a page's link: another page, or the file in this installation."""
    chapter = re.fullmatch(r"(?:\.\./)?(\d\d_\w+)\.(?:md|py)", target)
    lab = re.fullmatch(r"(?:labs/)?(\d\d)\.md", target)
    if chapter or lab:
        return file_of((chapter or lab)[1])  # pyright: ignore[reportOptionalSubscript]
    path = re.sub(r"^(\.\./)+", "", target)
    for place in (ROOT / path, ROOT / "docs" / path):
        if place.is_file():
            return place.as_uri()
    return None


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.validateLink = lambda url: True  # file: as well, for sources of the library
    markdown.inline.ruler.before("escape", "formula", _formula)
    markdown.add_render_rule("formula", _render_formula)
    markdown.add_render_rule("fence", _render_fence)
    markdown.add_render_rule("heading_open", _render_heading)
    return markdown


def _formula(state: StateInline, silent: bool) -> bool:
    match = _FORMULA.match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content, token.block = match[1] or match[2], match[1] is not None
    state.pos = match.end()
    return True


def _render_formula(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    kind = "formula display" if tokens[index].block else "formula"
    return f'<span class="{kind}">{html.escape(tokens[index].content.strip())}</span>'


def _render_heading(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    words = re.findall(r"\w+", tokens[index + 1].content.lower())
    return f'<{tokens[index].tag} id="{"-".join(words)}">'


def _render_fence(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    language, _, rest = tokens[index].info.strip().partition(" ")
    code = tokens[index].content
    if language == "mermaid":
        return _arrows(code)
    title = re.match(r'title="([^"]*)"', rest)
    head = f'<div class="file">{html.escape(title[1])}</div>' if title else ""
    return f'<div class="code quoted">{head}{_coloured(code, language)}</div>'


def _coloured(code: str, language: str) -> str:
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f"<pre>{highlight(code, lexer, HtmlFormatter(nowrap=True)).rstrip()}</pre>"


def _arrows(diagram: str) -> str:
    """The arrows of a flowchart in Mermaid's notation, as text: a line for each of its lines."""
    names: dict[str, str] = {}
    rows: list[str] = []
    for line in diagram.splitlines()[1:]:
        row = ""
        for number, part in enumerate(re.split(r"\s*(<?-->(?:\|[^|]*\|)?)\s*", line.strip())):
            if number % 2:
                sign, label = ("&harr;" if part[0] == "<" else "&rarr;"), part.strip("<->|")
                row += f" {sign} <i>{html.escape(label)}</i> {sign} " if label else f" {sign} "
            elif node := _NODE.match(part):
                names[node[1]] = node[2] or names.get(node[1], node[1])
                row += html.escape(names[node[1]])
        rows.append(f"<li>{row}</li>")
    return f'<ul class="arrows">{"".join(rows)}</ul>'


# ---- other parts of a page -----------------------------------------------------------------------


def _asset(*names: str) -> str:
    return _ASSETS.joinpath(*names).read_text("utf-8")


@cache
def _maths() -> str:
    """KaTeX with those of its fonts that the chapters' formulas need."""
    inside = Path(str(_ASSETS)) / "katex"
    folder = inside if inside.is_dir() else ROOT / "docs" / "vendor" / "katex"

    def embedded(face: re.Match[str]) -> str:
        font = re.search(r"url\(fonts/([\w-]+\.woff2)\)", face[0])
        if font is None or not _FONTS.match(font[1]):
            return ""
        data = base64.b64encode((folder / "fonts" / font[1]).read_bytes()).decode()
        source = f'src:url(data:font/woff2;base64,{data}) format("woff2")'
        return re.sub(r"src:[^;}]*", lambda _: source, face[0])

    style = (folder / "katex.min.css").read_text("utf-8")
    style = re.sub(r"@font-face\{[^}]*\}", embedded, style)
    script = (folder / "katex.min.js").read_text("utf-8")
    return f"<style>{style}</style>\n<script>{script}</script>"

"""Chapters as HTML: a page each, with nothing from anywhere else and no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from tools.guide.chapters import Chapter, kind_of

LIGHT, DARK = "friendly", "github-dark"
STYLE = """
:root { --ground: #fdfdfb; --text: #1d2329; --faint: #68717a; --line: #dcdfe3; --card: #f2f4f5;
        --accent: #0b5cad; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181c; --text: #dde3e8; --faint: #929ca6; --line: #30373d; --card: #1d2328;
          --accent: #7db8f3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
       font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, nav, footer { max-width: 52rem; margin: 0 auto; padding: 0 1.1rem; }
main > p, main > ul, main > ol { max-width: 44rem; }
nav { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem 1.2rem; padding-top: 1rem;
      font-size: .9rem; color: var(--faint); }
footer { padding: 1.5rem 1.1rem 3rem; }
footer div { display: flex; justify-content: space-between; gap: 1rem;
             border-top: 1px solid var(--line); padding-top: 1rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1.6rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; }
a { color: var(--accent); text-underline-offset: .15em; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
p code, li code, td code { background: var(--card); border-radius: .25em; padding: .08em .3em; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
      line-height: 1.45; margin: .6rem 0; }
pre code { font-size: .79rem; }
figure { margin: 1.4rem 0; }
figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
             border-radius: .5rem; padding: .5rem; }
figcaption, .from { color: var(--faint); font-size: .88rem; }
.from { margin: 1.2rem 0 -.2rem; }
td code { white-space: nowrap; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .94rem; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left;
         vertical-align: top; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; }
nav details { border: 0; padding: 0; }
nav details[open] { width: 100%; }
ul.chapters { list-style: none; padding: 0; line-height: 1.9; }
summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""


def page(chapter: Chapter, chapters: Sequence[Chapter]) -> str:
    """The whole page of a chapter."""
    place = [one.name for one in chapters].index(chapter.name)
    before = chapters[place - 1] if place else None
    after = chapters[place + 1] if place + 1 < len(chapters) else None
    back = _link(before, f"\u2190 {before.title}") if before else ""
    on = _link(after, f"{after.title} \u2192") if after else ""
    rows = "".join(f"<li>{_link(one, one.title)}</li>" for one in chapters[1:])
    contents = f'<ul class="chapters">{rows}</ul>'
    body = _markdown().render(chapter.markdown)
    if chapter.name == "index":
        body += f"<h2>Chapters</h2>{contents}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(chapter.title)} - megalite</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav aria-label="Guide"><a href="index.html">The megalite guide</a>
<details><summary>Chapters</summary>{contents}</details></nav>
<main>
{body}</main>
<footer><div><span>{back}</span><span>{on}</span></div></footer>
</body>
</html>
"""


def style() -> str:
    """The style sheet of all pages."""
    light, dark = (HtmlFormatter(style=name) for name in (LIGHT, DARK))
    colours = _colours(light)
    return f"{STYLE}{colours}\n@media (prefers-color-scheme: dark) {{\n{_colours(dark)}\n}}\n"


def _colours(formatter: HtmlFormatter) -> str:
    rules = formatter.get_style_defs("pre").splitlines()
    # The ground is the page's own.
    return "\n".join(r for r in rules if r.startswith("pre .") and "background" not in r)


def write(chapters: Sequence[Chapter], out: Path) -> None:
    """Write a page for each chapter, and the style sheet, into `out`."""
    (out / "style.css").write_text(style(), encoding="utf-8")
    for chapter in chapters:
        (out / f"{chapter.name}.html").write_text(page(chapter, chapters), encoding="utf-8")


def _link(chapter: Chapter, text: str) -> str:
    return f'<a href="{chapter.name}.html">{escape(text)}</a>'


def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark").enable("table")
    made.add_render_rule("fence", _fence)
    made.add_render_rule("link_open", _link_open)
    return made


def _fence(self: RendererHTML, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
    content = tokens[idx].content
    kind, *rest = kind_of(tokens[idx].info)
    if kind == "figure":
        caption = escape(content.strip())
        image = f'<img src="figures/{rest[0]}.svg" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
    if kind == "code":
        return f'<p class="from"><code>{rest[0]}</code></p>\n{_block(content, "python")}'
    if kind == "answer":
        said = f"The answer is a test: <code>{rest[0]}</code>"
        block = _block(content, "python")
        return f"<details><summary>{said}</summary>\n{block}</details>\n"
    return _block(content, kind)


def _block(content: str, language: str) -> str:
    lexer = get_lexer_by_name("bash" if language == "sh" else language)
    shown = highlight(content, lexer, HtmlFormatter(nowrap=True))
    return f'<pre tabindex="0"><code>{shown}</code></pre>\n'


def _link_open(
    self: RendererHTML, tokens: Sequence[Token], idx: int, options: Any, env: Any
) -> str:
    href = str(tokens[idx].attrGet("href"))
    if href.endswith(".md"):
        tokens[idx].attrSet("href", href.removesuffix(".md") + ".html")
    return self.renderToken(tokens, idx, options, env)

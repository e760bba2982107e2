"""All chapters as one PDF, set by Typst."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from tools.guide.chapters import Chapter, kind_of, source_of

UNCUT = 30
"""Lines of code that stay on one page."""
HEAD = """
#set document(title: "The megalite guide")
#set page(paper: "a4", margin: (x: 2.6cm, y: 2.6cm), numbering: "1", number-align: center)
#set text(font: "Libertinus Serif", size: 10.5pt, lang: "en")
#set par(justify: true, leading: 0.62em)
#show raw: set text(font: "DejaVu Sans Mono", size: 0.82em)
#let code(it, breakable: true) = block(
  fill: luma(245), inset: 8pt, radius: 4pt, width: 100%, breakable: breakable, it)
#let from(it) = block(above: 1.2em, below: 0.5em, sticky: true, text(fill: luma(90), it))
#show table: set block(breakable: false)
#show link: set text(fill: rgb("#0b5cad"))
#show heading.where(level: 1): it => { pagebreak(weak: true); block(below: 1.2em, it) }
#show heading.where(level: 2): it => block(above: 1.6em, below: 0.9em, it)
#set table(stroke: (x: none, y: 0.4pt + luma(190)), inset: (x: 5pt, y: 4pt))
#v(7cm)
#align(center)[#text(26pt)[*megalite*] \\ #v(0.4em)
  #text(14pt)[from raw text to a model that chats]]
#pagebreak()
#outline(title: "Chapters", depth: 1)
"""


def write(chapters: Sequence[Chapter], figures: Path, path: Path) -> None:
    """Write `path`; `figures` has the pictures. Raises ImportError without the package `typst`."""
    import typst

    text = HEAD + "".join(_chapter(chapter) for chapter in chapters) + _answers(chapters)
    source = figures.parent / "guide.typ"
    source.write_text(text, encoding="utf-8")
    typst.compile(str(source), output=str(path), root=str(figures.parent))
    source.unlink()


def _chapter(chapter: Chapter) -> str:
    root = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(chapter.markdown))
    parts = [_node(node) for node in root.children]
    # Links from other chapters come to its title.
    return f"\n{parts[0].rstrip()} <{chapter.name}>\n\n" + "\n\n".join(parts[1:]) + "\n"


def _answers(chapters: Sequence[Chapter]) -> str:
    """The last chapter: the answers of all others, so that nobody reads one by accident."""
    parts = []
    for chapter in chapters:
        for one in chapter.directives():
            if one.kind == "answer":
                file, name = one.words.split()
                said = f"#from[#raw({_quoted(name)}) <{name}>, to #link(<{chapter.name}>)"
                said += f"[#emph[{_text(chapter.title)}]]]"
                parts.append(f"{said}\n\n{_block(source_of(file, name, one.where), 'python')}")
    return "\n#heading(level: 1)[Answers]\n\n" + "\n\n".join(parts) + "\n"


def _all(node: SyntaxTreeNode) -> str:
    return "".join(_node(child) for child in node.children)


def _node(node: SyntaxTreeNode) -> str:
    kind = node.type
    if kind in ("text", "html_inline", "html_block"):
        return _text(node.content)
    if kind in ("softbreak", "hardbreak"):
        return " "
    if kind == "code_inline":
        return f"#raw({_quoted(node.content)});"
    if kind in ("inline", "thead", "tbody"):
        return _all(node)
    if kind in ("strong", "em"):
        return f"#{'strong' if kind == 'strong' else 'emph'}[{_all(node)}];"
    if kind == "link":
        href = str(node.attrs["href"])
        to = f"<{href.removesuffix('.md')}>" if href.endswith(".md") else _quoted(href)
        return f"#link({to})[{_all(node)}];"
    if kind == "paragraph":
        return _all(node)
    if kind == "heading":
        return f"#heading(level: {node.tag[1:]})[{_all(node)}]"
    if kind in ("bullet_list", "ordered_list"):
        name = "list" if kind == "bullet_list" else "enum"
        items = ", ".join(f"[{_item(item)}]" for item in node.children)
        return f"#{name}({items})"
    if kind == "table":
        rows = list(_rows(node))
        cells = ", ".join(f"[{cell}]" for row in rows for cell in row)
        return f"#table(columns: {len(rows[0])}, {cells})"
    if kind == "fence":
        return _fence(node)
    raise ValueError(f"the PDF cannot show {kind} (line {node.map})")


def _item(item: SyntaxTreeNode) -> str:
    return "\n\n".join(_node(child) for child in item.children)


def _rows(table: SyntaxTreeNode) -> Iterator[list[str]]:
    for number, part in enumerate(table.children):
        for row in part.children:
            cells = [_all(cell) for cell in row.children]
            yield [f"#strong[{cell}];" for cell in cells] if number == 0 else cells


def _fence(node: SyntaxTreeNode) -> str:
    kind, *rest = kind_of(node.info)
    if kind == "figure":
        caption = _quoted(node.content.strip())
        image = f'image("figures/{rest[0]}.svg", width: 100%)'
        return f"#figure({image}, caption: text({caption}), numbering: none)"
    if kind == "code":
        return f"#from[#raw({_quoted(rest[0])})]\n\n{_block(node.content, 'python')}"
    if kind == "answer":
        page = f"#context counter(page).at(<{rest[1]}>).first();"
        return f"The answer is a test, on #link(<{rest[1]}>)[page {page}]."
    return _block(node.content, "bash" if kind == "sh" else kind)


def _block(content: str, language: str) -> str:
    """A block of code; one that fits on half a page is not cut."""
    breakable = "true" if content.count("\n") > UNCUT else "false"
    raw = f'raw({_quoted(content.rstrip())}, block: true, lang: "{language}")'
    return f"#code({raw}, breakable: {breakable})"


def _text(text: str) -> str:
    return f"#{_quoted(text)};"


def _quoted(text: str) -> str:
    """A string of Typst."""
    return json.dumps(text, ensure_ascii=False)

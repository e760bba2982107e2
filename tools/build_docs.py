"""Builds the guide of docs/guide: HTML pages and one PDF, with pictures of your own runs.

    make docs                                  into build/docs
    .venv-docs/bin/python tools/build_docs.py --run runs/demo --chat runs/demo-chat

Reads the runs that `make demo` leaves. Needs the packages of pyproject.toml's extra `docs`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.core.errors import UserError  # noqa: E402
from tools.guide import html, pdf  # noqa: E402
from tools.guide.chapters import GuideError, all_chapters  # noqa: E402

PDF = "megalite-guide.pdf"


def build(run: Path, chat: Path, out: Path, *, with_pdf: bool = True) -> list[Path]:
    """The pages and, unless told otherwise, the PDF. Raises GuideError, or UserError of a run."""
    from tools.guide.figures import FIGURES, Reader, draw_all  # slow to import

    for path in (run, chat):
        if not (path / "checkpoints").is_dir():
            raise GuideError(f"{path}: no run there (make demo makes it)")
    chapters = all_chapters()
    asked = [d for chapter in chapters for d in chapter.directives() if d.kind == "figure"]
    names = [d.words.partition(" ")[0] for d in asked]
    for directive, name in zip(asked, names, strict=True):
        if name not in FIGURES:
            known = ", ".join(FIGURES)
            raise GuideError(f"{directive.where}: no figure {name} (known: {known})")
    out.mkdir(parents=True, exist_ok=True)
    draw_all(Reader(run, chat), dict.fromkeys(names), out / "figures")
    html.write(chapters, out)
    made = [out / f"{chapter.name}.html" for chapter in chapters]
    if with_pdf:
        pdf.write(chapters, out / "figures", out / PDF)
        made.append(out / PDF)
    return made


def main(argv: list[str] | None = None) -> int:
    """Build, and say where; 2 for what the reader can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--chat", type=Path, default=Path("runs/demo-chat"))
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    parser.add_argument("--no-pdf", action="store_true", help="HTML alone")
    args = parser.parse_args(argv)
    try:
        made = build(args.run, args.chat, args.out, with_pdf=not args.no_pdf)
    except (GuideError, UserError) as error:
        print(f"build_docs: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(made)} files: {made[0]}" + ("" if args.no_pdf else f", {made[-1]}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

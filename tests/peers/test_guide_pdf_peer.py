"""The guide as one PDF, by the package that sets it: every chapter is in it, and opens."""

import re

import pytest

from tools.guide import pdf
from tools.guide.chapters import all_chapters
from tools.guide.figures import FIGURES

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="20">'
    '<rect width="60" height="20"/></svg>'
)


@pytest.mark.peers
def test_all_chapters_are_one_pdf(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in FIGURES:
        (tmp_path / "figures" / f"{name}.svg").write_text(SVG)
    chapters = all_chapters()
    made = tmp_path / "guide.pdf"
    pdf.write(chapters, tmp_path / "figures", made)
    data = made.read_bytes()
    assert data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF")
    pages = [int(n) for n in re.findall(rb"/Type\s*/Pages[^>]*?/Count (\d+)", data)]
    assert pages and max(pages) > len(chapters)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "guide.pdf"]

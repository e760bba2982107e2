"""The guide: every directive is filled in, every command runs, and the pages lead nowhere else."""

from __future__ import annotations

import re
import shutil
import signal
from html.parser import HTMLParser

import pytest
import torch

from megalite import __main__ as front
from tools import build_docs, run_guide
from tools.guide import commands, html
from tools.guide.chapters import ROOT, Chapter, GuideError, all_chapters
from tools.guide.figures import FIGURES

CHAPTERS = all_chapters()
ROAD = CHAPTERS[1:]
QUOTED = r"^````(?:code|answer) (\S+) (\S+)\n(.*?)^````"
NAMES = [chapter.name for chapter in CHAPTERS]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A folder in which every command of the guide has run in its small form."""
    here = run_guide.workplace(tmp_path_factory.mktemp("guide"))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ran = []

    def verb(argv: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            return front.main(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks of SMALL_PROCESS
    for command in run_guide.every_command():
        commands.run(command, smoke=True, here=here, verb=verb)
        ran.append(command.text)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    torch.set_num_threads(threads)
    return here, ran


def test_every_command_runs(read):
    """Counted in the Markdown by another way than the one that finds them."""
    count = 0
    for path in (ROOT / "docs" / "guide").glob("*.md"):
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.S | re.M):
            count += len(re.findall(r"(?<!\\)\n", block))
    assert len(read[1]) == count >= 25
    verbs = {line.split()[1] for line in read[1] if line.startswith("megalite ")}
    assert verbs == {verb.split()[0] for verb in front.VERBS}


def test_pages_are_built_of_what_the_commands_left(read, tmp_path):
    here, _ = read
    out = tmp_path / "docs"
    made = build_docs.build(here / "runs/demo", here / "runs/demo-chat", out, with_pdf=False)
    assert [path.stem for path in made] == NAMES
    shown = {path.stem for path in (out / "figures").glob("*.svg")}
    assert shown == set(FIGURES)  # none that no chapter shows
    for path in made:
        page = Page(path.read_text())
        assert page.kept == [] and page.forms == 0
        for target in page.targets:
            assert (out / target).exists(), (path.name, target)
    assert "@import" not in (out / "style.css").read_text()
    assert "url(" not in (out / "style.css").read_text()


class Page(HTMLParser):
    """What a page points at: files beside it, and whatever it should not."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.kept: list[str] = []
        self.forms = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.forms += tag in ("form", "iframe", "object")
        if tag == "script":
            self.kept.append("script")
        for name, value in attrs:
            if name in ("src", "href"):
                away = re.match(r"[a-z]+:|//", value)
                (self.kept if away else self.targets).append(value)
            if name.startswith("on") or name == "style":
                self.kept.append(f"{name}={value}")


@pytest.mark.parametrize("chapter", ROAD, ids=[chapter.name for chapter in ROAD])
def test_chapter_has_all_its_parts(chapter):
    kinds = [directive.kind for directive in chapter.directives()]
    assert {"code", "figure", "answer"} <= set(kinds)
    assert list(chapter.commands())
    assert "\n## Exercise" in chapter.path.read_text()
    assert chapter.markdown.count("````") == 2 * len(kinds)


def test_answers_are_tests_that_are_run():
    """Each exercise has one of its own, and no answer is left without an exercise."""
    asked = [
        directive.words.split()
        for chapter in CHAPTERS
        for directive in chapter.directives()
        if directive.kind == "answer"
    ]
    assert {file for file, _ in asked} == {"tests/guide/test_answers.py"}
    written = re.findall(r"^def (test_\w+)", (ROOT / asked[0][0]).read_text(), re.M)
    assert sorted(name for _, name in asked) == sorted(written)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{{ code megalite/none.py f }}", "x.md:3: no file megalite/none.py"),
        ("{{ code megalite/layers/mlp.py MLP.none }}", "x.md:3: megalite/layers/mlp.py has no"),
        ("{{ figure tokens }}", "x.md:3: figure tokens: has no caption"),
        ("{{ picture tokens }}", "x.md:3: {{ picture tokens }}: expected {{ code FILE NAME }}"),
        ("{{ code", "x.md:3: {{ code: expected"),
    ],
)
def test_mistake_in_a_chapter_has_its_line(tmp_path, line, words):
    (tmp_path / "x.md").write_text(f"# A title\n\n{line}\n")
    with pytest.raises(GuideError) as raised:
        Chapter(tmp_path / "x.md").markdown  # noqa: B018 (it is a property)
    assert str(raised.value).startswith(words)


def test_quoted_code_is_the_source():
    """Found anew in its file, line by line."""
    for chapter in CHAPTERS:
        blocks = re.findall(QUOTED, chapter.markdown, re.S | re.M)
        assert len(blocks) == sum(d.kind != "figure" for d in chapter.directives())
        for file, name, quoted in blocks:
            source = [line.strip() for line in (ROOT / file).read_text().splitlines()]
            lines = [line.strip() for line in quoted.splitlines()]
            at = [i for i in range(len(source)) if source[i : i + len(lines)] == lines]
            assert len(at) == 1 and name.split(".")[-1] in " ".join(lines[:2]), (file, name)


def test_run_that_is_not_there_is_one_line(tmp_path, capsys):
    out = tmp_path / "docs"
    assert build_docs.main(["--run", str(tmp_path / "none"), "--out", str(out)]) == 2
    said = "no run there (make demo makes it)"
    assert capsys.readouterr().err == f"build_docs: error: {tmp_path}/none: {said}\n"
    assert not out.exists()


def test_text_that_looks_like_html_is_shown_as_text(tmp_path):
    text = "# A <b>title</b>\n\n`<script>` & ```x```\n\n```text\n<i>\n```\n"
    (tmp_path / "index.md").write_text(text)
    chapter = Chapter(tmp_path / "index.md")
    made = html.page(chapter, [chapter])
    assert "<script" not in made and "&lt;script&gt;" in made and "&lt;i&gt;" in made


def test_small_form_keeps_the_command_and_changes_its_size():
    line = ["megalite", "pretrain", "--train-steps", "40", "--hidden-size", "64", "--out", "x"]
    made = commands.small(line)
    assert made[:2] == line[:2] and "--hidden-size" in made and made.count("--train-steps") == 1
    assert made[made.index("--train-steps") + 1] == "2"
    dry = ["megalite", "pretrain", "--dry-run"]
    assert commands.small(dry) == dry and commands.small(["make", "demo"]) == ["make", "demo"]


def test_failing_command_says_where_it_stands(tmp_path):
    run_guide.workplace(tmp_path)
    command = commands.Command("python tools/draw_schedule.py --schedule none", "08-x.md:7")
    with pytest.raises(commands.CommandError, match=r"(?s)08-x.md:7: python .*no such schedule"):
        commands.run(command, smoke=True, here=tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)

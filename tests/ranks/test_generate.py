"""Generation at any tp and pp says what one process says; its ranks end with who asked, or say why
they failed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from megalite.core.config import ModelConfig
from megalite.core.errors import RunError
from megalite.generate.engine import STOP, Request, complete
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.generate.remote import FOR_EVER, Remote, Serving
from megalite.generate.sample import Sampling
from tests.ranks.client import Ranks

SHAPES = {
    "gpt2": {"position": "learned", "bias": True},
    "llama": {
        "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "num_kv_heads": 2, "tie_embeddings": False,
    },
}  # fmt: skip
LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory, run_ranks) -> Path:
    """A run directory of an untrained model."""
    run = tmp_path_factory.mktemp("generate") / request.param
    model = ModelConfig(
        num_layers=3, hidden_size=32, num_heads=4, vocab_size=67, seq_len=40, init_std=0.3,
        **SHAPES[request.param],
    )  # fmt: skip
    run_ranks("tests.ranks.generate_jobs:save_untrained", 1, run=str(run), model=vars(model))
    return run


def requests() -> list[Request]:
    """Sixteen, of several lengths and kinds."""
    kinds = [
        Sampling(temperature=0),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.9, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.3),
    ]
    return [
        Request(
            tokens=[(7 * i + 3 * j) % 67 for j in range(1 + i)],
            how=kinds[i % 3],
            max_tokens=12 + i % 4,
            stop=frozenset([5, 11, 40]),
            rivals=2 if i % 5 == 0 else None,
        )
        for i in range(16)
    ]


@pytest.fixture(scope="module")
def alone(checkpoint) -> list[list[int]]:
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    return complete(load_share(open_checkpoint(checkpoint), place), requests())


def started(ranks: Ranks, run: Path, **how) -> Remote:
    saved = open_checkpoint(run)

    def start(target, world, kwargs):
        ranks.run(target, world, kwargs=kwargs, timeout=FOR_EVER, grace=0.5)

    return Remote(saved.directory, saved.model, Serving(**{"slots": 6, "chunk": 8, **how}), start)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_ranks_say_what_one_process_says(checkpoint, alone, ranks, tp, pp):
    remote = started(ranks, checkpoint, tp=tp, pp=pp)
    try:
        place = {remote.submit(request): i for i, request in enumerate(requests())}
        made: list[list[int]] = [[] for _ in place]
        likely: list[int] = [0] * len(place)
        ended: dict[int, str] = {}
        while remote.has_work:
            for event in remote.step():
                made[place[event.request]] += event.tokens
                likely[place[event.request]] += len(event.likely)
                ended[place[event.request]] = event.ended
    finally:
        remote.close()
    assert made == alone
    # The token that ends a text is told of, too.
    whole = [len(tokens) + (ended[number] == STOP) for number, tokens in enumerate(made)]
    assert likely == [count if i % 5 == 0 else 0 for i, count in enumerate(whole)]
    assert STOP in ended.values() and set(ended.values()) <= {"stop", "length"}


def test_cancelled_request_is_heard_of_no_more(checkpoint, ranks):
    remote = started(ranks, checkpoint, tp=2)
    try:
        long = Request(tokens=[1, 2], how=Sampling(temperature=0), max_tokens=30)
        first, second = remote.submit(long), remote.submit(long)
        remote.step()
        remote.cancel(first)
        heard = set()
        while remote.has_work:
            heard |= {event.request for event in remote.step()}
    finally:
        remote.close()
    assert heard == {second}


def test_killed_rank_ends_what_waits_for_it(checkpoint, ranks):
    remote = started(ranks, checkpoint, tp=2)
    try:
        assert ranks.process is not None
        children = Path(f"/proc/{ranks.process.pid}/task/{ranks.process.pid}/children")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        with pytest.raises(RunError, match="(?s)ranks of the model failed.*SIGKILL"):
            remote.submit(Request(tokens=[1], max_tokens=3))
            while True:
                remote.step()
    finally:
        remote.close()


def test_model_that_is_not_there_is_said(tmp_path, checkpoint, ranks):
    saved = open_checkpoint(checkpoint)

    def start(target, world, kwargs):
        kwargs = {**kwargs, "path": str(tmp_path / "nothing")}
        ranks.run(target, world, kwargs=kwargs, timeout=FOR_EVER, grace=0.5)

    with pytest.raises(RunError, match="(?s)did not start.*nothing: no such directory"):
        Remote(saved.directory, saved.model, Serving(), start)

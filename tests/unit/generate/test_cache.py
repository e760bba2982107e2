"""A cache changes nothing: logits with one are those of the whole text run again, at every step."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from examples.my_attention import MyAttention
from megalite.core.call import Cached
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.core.precision import default_dtype
from megalite.generate import record
from megalite.generate.cache import KeyValues, Part, Step, Texts
from megalite.generate.engine import Generation, Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.record import Recorded
from megalite.generate.sample import Sampling
from megalite.generate.share import make_share
from megalite.models.build import build_stages
from megalite.parallel.pipeline import Pipeline
from megalite.schedule.generators import gpipe

TOL = 1e-10
CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 61, "seq_len": 24}
MODELS = {
    "gpt2": {"position": "learned"},
    "llama": {
        "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "num_kv_heads": 2, "tie_embeddings": False,
    },
    "window": {"position": "rope", "sliding_window": 5},
    "caps": {"position": "rope", "attention_soft_cap": 3.0, "logit_soft_cap": 5.0},
    "qk-norm": {"position": "rope", "qk_norm": True, "num_kv_heads": 1},
}  # fmt: skip


def share_of(dtype, slots=3, seed=1, **model):
    config = ModelConfig(**{**SHAPE, "init_std": 0.2, **model})
    return untrained_share(config, Place(slots=slots, dtype=dtype, device=CPU), seed=seed)


def uncached(share):
    memory = Texts(slots=share.slots, seq_len=share.model.seq_len, device=CPU)
    return replace(share, memory=memory)


def random_steps(rng, slots):
    """Steps that read, go on and begin anew in any order, as no Generation would mix them."""
    length = [0] * slots
    for _ in range(40):
        parts = []
        for slot in rng.sample(range(slots), rng.randint(1, slots)):
            if length[slot] == SHAPE["seq_len"] or rng.random() < 0.15:
                length[slot] = 0
            room = SHAPE["seq_len"] - length[slot]
            count = min(room, rng.choice((1, 1, 1, 2, 7)))
            tokens = tuple(rng.randrange(SHAPE["vocab_size"]) for _ in range(count))
            parts.append(Part(slot, length[slot], tokens, rng.randint(0, count)))
            length[slot] += count
        yield Step(tuple(parts))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cached_logits_are_those_of_the_whole_text(model):
    share = share_of(torch.float64, **model)
    plain = uncached(share)
    assert isinstance(share.memory, KeyValues)
    compared = 0
    for step in random_steps(random.Random(3), share.slots):
        ours, reference = share.run(step), plain.run(step)
        assert ours.shape == (sum(part.wanted for part in step.parts), SHAPE["vocab_size"])
        assert ((ours - reference).abs() <= TOL).all()
        compared += len(ours)
    assert compared > 50


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_steps_that_can_be_recorded_have_the_same_logits(model, monkeypatch):
    """What a GPU replays, run here as it is: every slot, whether something runs in it or not."""
    monkeypatch.setattr(record, "SPAN", 8)
    share = share_of(torch.float64, **model)
    recorded = Recorded(share.memory, replay=False)
    spans, call_of = [], recorded._call
    monkeypatch.setattr(recorded, "_call", lambda span: spans.append(span) or call_of(span))
    ours, plain = replace(share, recorded=recorded), uncached(share)
    for step in random_steps(random.Random(5), share.slots):
        found, reference = ours.run(step), plain.run(step)
        assert found.shape == reference.shape
        assert ((found - reference).abs() <= TOL).all()
    assert set(spans) == {8, 16, 24} and len(spans) > 5


@pytest.mark.parametrize("lengths", [range(1, 10), (5, 5, 5, 6)], ids=["any", "alike"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bits_of_a_request_do_not_depend_on_its_batch(model, lengths):
    share = share_of(torch.float32, slots=16, **model)
    seen = {}

    class Watched:
        def __init__(self):
            self.model, self.slots = share.model, share.slots

        def run(self, step):
            logits = share.run(step)
            rows_of = logits.split([part.wanted for part in step.parts])
            for part, rows in zip(step.parts, rows_of, strict=True):
                seen.setdefault(part.slot, []).append(rows)
            return logits

    def bits(requests):
        seen.clear()
        made = complete(Watched(), requests)
        return made, {slot: torch.cat(rows) for slot, rows in seen.items()}

    rng = random.Random(7)
    requests = [
        Request(
            tokens=[rng.randrange(61) for _ in range(rng.choice(lengths))],
            how=Sampling(temperature=1.0, seed=i),
            max_tokens=10,
        )
        for i in range(16)
    ]
    together, rows = bits(requests)
    for slot, request in enumerate(requests):
        alone, by_slot = bits([request])
        assert alone[0] == together[slot]
        assert torch.equal(by_slot[0], rows[slot])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bits_of_a_last_chunk_of_one_token_do_not_depend_on_what_is_read_beside_it(model):
    tokens, long = tuple(range(7, 16)), tuple(range(20, 26))
    found = []
    for beside in ((), (Part(1, 0, long, 1),)):
        share = share_of(torch.float32, slots=2, **model)
        share.run(Step((Part(0, 0, tokens[:8], 0),)))
        found.append(share.run(Step((Part(0, 8, tokens[8:], 1), *beside)))[0])
    assert torch.equal(found[0], found[1])


def test_neighbours_of_one_length_run_together():
    found = Cached({}, slots=(2, 3, 4, 7, 6, 5), before=(9, 9, 8, 8, 8, 8), rows=(1,) * 6)
    assert [(r.mine, r.slots, r.before) for r in found.alike] == [
        (slice(0, 2), slice(2, 4), 9),
        (slice(2, 3), slice(4, 5), 8),
        (slice(3, 4), slice(7, 8), 8),
        (slice(4, 5), slice(6, 7), 8),
        (slice(5, 6), slice(5, 6), 8),
    ]
    assert [(r.first, r.slot, r.count) for r in found.each] == [
        (i, slot, 1) for i, slot in enumerate(found.slots)
    ]


def test_chunks_change_no_token():
    share = share_of(torch.float64, **MODELS["llama"])
    request = Request(tokens=range(1, 18), how=Sampling(temperature=0), max_tokens=6)
    made = []
    for chunk in (1, 5, 17, 100):
        generation = Generation(share, chunk=chunk)
        generation.submit(request)
        tokens = []
        while generation.has_work:
            tokens += [t for event in generation.step() for t in event.tokens]
        made.append(tokens)
    assert len(made[0]) == 6 and made.count(made[0]) == 4


def test_attention_that_keeps_no_keys_runs_the_whole_text_again():
    config = ModelConfig(**SHAPE, position="rope")
    with default_dtype(torch.float64):
        stages = build_stages(
            config, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1,
            attention=MyAttention,
        )  # fmt: skip
    initialize(stages[0], 1)
    pipeline = Pipeline(
        partial(gpipe, 1), stages, Mesh({}), dtype=torch.float64, device=CPU,
        enter=print, reduce=print,
    )  # fmt: skip
    share = make_share(config, stages, pipeline, slots=2)
    assert isinstance(share.memory, Texts)
    requests = [
        Request(tokens=tokens, how=Sampling(temperature=0), max_tokens=5)
        for tokens in ([3, 1, 4], [1, 5, 9, 2, 6])
    ]
    together = complete(share, requests)
    assert together == [complete(share, [request])[0] for request in requests]


def test_frequencies_of_the_engine_match_the_softmax():
    share = share_of(torch.float64, slots=50, vocab_size=7, **MODELS["gpt2"])
    prompt, draws = [3, 1, 4], 3000
    logits = share.run(Step((Part(0, 0, tuple(prompt), 1),)))[0]
    requests = [
        Request(tokens=prompt, how=Sampling(temperature=1.0, seed=9), max_tokens=1, number=i)
        for i in range(draws)
    ]
    found = torch.bincount(torch.tensor(complete(share, requests)).flatten(), minlength=7)
    want = torch.softmax(logits, -1) * draws
    assert (want >= 5).all()
    # 6 degrees of freedom; beyond 27.9 lies one in 10,000, and the seed is fixed.
    assert ((found - want) ** 2 / want).sum() < 27.9

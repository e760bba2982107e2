"""Continuous batching around any model: who runs when, what each request gets, where it ends."""

from __future__ import annotations

import pytest
import torch

from megalite.core.config import ModelConfig
from megalite.core.errors import UserError
from megalite.generate.cache import Part, Step
from megalite.generate.engine import LENGTH, STOP, Event, Generation, Request, complete
from megalite.generate.sample import Sampling

VOCAB, SEQ_LEN = 10, 8
GREEDY = Sampling(temperature=0.0)


class Counting:
    """The next token is the last one plus 1, modulo 10. Remembers texts, and every step it ran."""

    def __init__(self, slots=4):
        self.model = ModelConfig(vocab_size=VOCAB, seq_len=SEQ_LEN)
        self.slots, self.steps = slots, []
        self.texts = {}

    def run(self, step):
        self.steps.append(step)
        rows = []
        assert len({part.slot for part in step.parts}) == len(step.parts)
        for part in step.parts:
            assert 0 <= part.slot < self.slots
            text = [] if part.before == 0 else self.texts[part.slot]
            assert len(text) == part.before
            self.texts[part.slot] = [*text, *part.tokens]
            rows += self.rows(part)
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    def rows(self, part):
        wanted = part.tokens[len(part.tokens) - part.wanted :]
        return [torch.nn.functional.one_hot(torch.tensor((t + 1) % VOCAB), VOCAB).double() * 9
                for t in wanted]  # fmt: skip


class Flat(Counting):
    """All tokens are as likely."""

    def rows(self, part):
        return [torch.zeros(VOCAB)] * part.wanted


def ask(prompt, max_tokens=5, **how):
    return Request(tokens=prompt, **{"how": GREEDY, "max_tokens": max_tokens, **how})


def run(prompts, share=None, **how):
    return complete(share or Counting(), [ask(p, **how) for p in prompts])


def drain(generation):
    """All events until there is no work."""
    events = []
    while generation.has_work:
        events += generation.step()
    return events


def test_tokens_follow_the_prompt():
    assert run([[3]]) == [[4, 5, 6, 7, 8]]


def test_requests_of_any_length_get_what_they_get_alone():
    prompts = [[1], [5, 5, 5, 2], [0] * 7, [9, 9], [4], [2, 3]]
    assert run(prompts) == [run([p])[0] for p in prompts]


def test_stop_token_ends_a_request_and_is_left_out():
    assert run([[3], [5], [0]], stop=frozenset([7])) == [[4, 5, 6], [6], [1, 2, 3, 4, 5]]
    assert run([[6]], stop=frozenset([7])) == [[]]


def test_text_ends_where_the_context_does():
    assert run([[1] * 6], max_tokens=9) == [[2, 3]]
    assert run([[1] * 8], max_tokens=9) == [[]]


@pytest.mark.parametrize(
    "request_, ended", [(ask([3], 2), LENGTH), (ask([3], 9, stop=frozenset([5])), STOP)]
)
def test_last_event_says_why_a_request_ended(request_, ended):
    generation = Generation(Counting())
    generation.submit(request_)
    events = drain(generation)
    assert [event.ended for event in events][-1] == ended
    assert not any(event.ended for event in events[:-1])


def test_freed_slots_go_to_those_that_wait_in_the_order_they_came():
    share = Counting(slots=2)
    generation = Generation(share)
    numbers = [generation.submit(ask([i], max_tokens=n)) for i, n in enumerate((1, 3, 2, 2))]
    assert generation.waiting == 4 and generation.running == 0
    generation.step()
    assert generation.waiting == 2 and generation.running == 1
    ended = [event.request for event in drain(generation) if event.ended]
    assert ended == [numbers[1], *numbers[2:]]
    assert not generation.has_work and max(len(step.parts) for step in share.steps) == 2


def test_reading_a_long_prompt_takes_turns_with_those_that_run():
    share = Counting()
    generation = Generation(share, chunk=2)
    generation.submit(ask([1], max_tokens=6))
    generation.step()
    generation.submit(ask([3] * 7, max_tokens=1))
    drain(generation)
    reads = [len(step.parts) == 1 and step.parts[0].slot == 1 for step in share.steps[1:]]
    assert reads == [False, True] * 4 + [False]


def test_chunks_of_a_prompt_do_not_depend_on_what_is_read_beside_it():
    def chunks(prompts):
        share = Counting()
        run_share = Generation(share, chunk=4)
        for prompt in prompts:
            run_share.submit(ask(prompt, max_tokens=1))
        drain(run_share)
        parts = [part for step in share.steps for part in step.parts]
        return [(p.before, p.tokens) for p in parts if p.slot == len(prompts) - 1]

    long = [1, 2, 3, 4, 5, 6, 7]
    assert chunks([long]) == [(0, (1, 2, 3, 4)), (4, (5, 6, 7))]
    assert chunks([[9], [8, 8], long]) == chunks([long])


def test_step_reads_no_more_than_a_chunk():
    share = Counting(slots=8)
    generation = Generation(share, chunk=6)
    for size in (2, 3, 1, 7, 2):
        generation.submit(ask([1] * size, max_tokens=1))
    drain(generation)
    assert [[len(p.tokens) for p in step.parts] for step in share.steps] == [
        [2, 3], [1], [6], [1, 2]
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "reading", "running"])
def test_cancelled_request_leaves_its_slot(steps):
    share = Counting(slots=1)
    generation = Generation(share, chunk=2)
    first = generation.submit(ask([1] * 4))
    second = generation.submit(ask([5], max_tokens=1))
    for _ in range(steps):
        generation.step()
    generation.cancel(first)
    generation.cancel(first)
    assert drain(generation) == [Event(second, tokens=(6,), ended=LENGTH)]


def test_request_draws_the_same_whatever_is_beside_it():
    how = Sampling(temperature=1.0, seed=5)
    prompts = [[1], [2, 2], [1], [7, 7, 7]]
    requests = [ask(p, how=how, number=i) for i, p in enumerate(prompts)]
    together = complete(Flat(), requests)
    assert together == [complete(Flat(), [request])[0] for request in requests]
    assert together[0] != together[2]  # two texts of one seed
    others = [ask([3], how=Sampling(temperature=1.0, seed=6)), *requests[::-1]]
    assert complete(Flat(slots=2), others)[:0:-1] == together


def test_likelihoods_come_with_the_tokens_they_are_of():
    generation = Generation(Counting(), chunk=2)
    generation.submit(ask([3, 4, 4, 9], max_tokens=2, rivals=2, echo=True))
    events = drain(generation)
    echoed = [told for event in events for told in event.echoed]
    likely = [told for event in events for told in event.likely]
    assert [told.token for told in echoed] == [4, 4, 9]
    assert [told.token for told in likely] == [0, 1]
    sure = torch.log_softmax(torch.tensor([9.0] + [0.0] * 9, dtype=torch.float64), 0).tolist()
    assert [told.logprob for told in echoed] == pytest.approx([sure[0], sure[1], sure[1]])
    assert [told.rivals[0][0] for told in likely] == [0, 1]
    assert [len(told.rivals) for told in likely] == [2, 2]


def test_echo_of_a_prompt_alone_needs_no_new_token():
    generation = Generation(Counting())
    generation.submit(ask([3, 4], max_tokens=0, rivals=1, echo=True))
    events = drain(generation)
    assert [told.token for event in events for told in event.echoed] == [4]
    assert [event.ended for event in events] == ["", LENGTH]


@pytest.mark.parametrize(
    "prompt, text",
    [
        ([], "the prompt is empty (give at least one token)"),
        ([1] * 9, "the prompt has 9 tokens, and the model's context is 8"),
        ([1, 10], "token 10 of the prompt is not in the vocabulary (0 to 9)"),
        ([-1], "token -1 of the prompt is not in the vocabulary (0 to 9)"),
    ],
)
def test_prompt_that_the_model_cannot_run_is_refused(prompt, text):
    with pytest.raises(UserError) as raised:
        Generation(Counting()).submit(ask(prompt))
    assert str(raised.value) == text


def test_step_is_known_from_its_numbers():
    step = Step((Part(3, 0, (7, 8, 9), 1), Part(0, 5, (2,), 0)))
    assert Step.of(step.numbers()) == step

"""The real openai client understands the server."""

from __future__ import annotations

import ssl
import time

import openai
import pytest

from tests.ranks.proxy import proxied
from tests.ranks.serving import Client

HELLO = [{"role": "user", "content": "hello"}]
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def ask(server: Client):
    base = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=base, api_key="t" * 40, max_retries=0) as client:
        yield client


def test_models_are_listed(ask) -> None:
    assert [model.id for model in ask.models.list()] == ["tiny"]


def test_chat_is_answered_with_probabilities(ask) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 9}
    answer = ask.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.finish_reason in ("length", "stop") and choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for token in choice.logprobs.content:
        assert token.logprob == max(t.logprob for t in token.top_logprobs) <= 0
    said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert said.decode("utf-8", "replace") == choice.message.content


def test_stream_says_what_the_whole_answer_says(ask) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 1, "seed": 3, "max_tokens": 30}
    whole = ask.chat.completions.create(**asked)
    stream = ask.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_completions_take_prompts_of_tokens(ask) -> None:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 4, "logprobs": 2, "echo": True}
    answer = ask.completions.create(prompt=[[5, 6, 7], [8, 9]], **asked)
    assert [choice.index for choice in answer.choices] == [0, 1]
    told = answer.choices[0].logprobs
    assert len(told.tokens) == 7 == len(told.token_logprobs) and told.token_logprobs[0] is None
    streamed = ask.completions.create(
        model="tiny", prompt="abc", max_tokens=5, temperature=0, stream=True
    )
    assert len("".join(chunk.choices[0].text for chunk in streamed)) > 0


def test_errors_are_its_own_kinds(ask, server: Client) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not here"):
        ask.chat.completions.create(model="gpt-5", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="context 96"):
        ask.completions.create(model="tiny", prompt="a", max_tokens=500)
    with pytest.raises(openai.RateLimitError):
        ask.completions.create(model="tiny", prompt=["a"] * 128, max_tokens=4)
    stranger = openai.OpenAI(base_url=str(ask.base_url), api_key="x" * 40, max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_closing_a_stream_cancels_it(ask, server: Client) -> None:
    stream = ask.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=60, n=8, stream=True
    )
    next(iter(stream))
    stream.close()
    for _ in range(600):
        _, text, _ = server.send("GET", "/metrics", Authorization="Bearer " + "t" * 40)
        if "megalite_open_requests 0" in text:
            return
        time.sleep(0.05)
    raise AssertionError("the answer still runs")


def test_it_talks_through_a_proxy_with_tls(server: Client, tmp_path) -> None:
    with (
        proxied(server.port, tmp_path) as (url, cert),
        openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(cert))) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="t" * 40, http_client=http) as client,
    ):
        asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 9}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == whole

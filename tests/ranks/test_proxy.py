"""Behind nginx with TLS: streams come as they are made, the token is asked for, chat works."""

from __future__ import annotations

import json
import ssl
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from megalite.data.chat import Message
from megalite.serve.client import Server
from megalite.serve.talk_args import Drawing
from tests.ranks.proxy import proxied
from tests.ranks.serving import make_run, serving

TOKEN = "t" * 40


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, run_ranks, ranks):
    """URL, certificate, and the server behind."""
    run = make_run(tmp_path_factory.mktemp("proxy") / "tiny", run_ranks)
    with (
        serving(run, ranks, token=TOKEN, slots=2) as client,
        proxied(client.port, tmp_path_factory.mktemp("nginx")) as (url, cert),
    ):
        yield url, cert, client


def ask(proxy, path, body=None, token=TOKEN):
    url, cert, _ = proxy
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    trust = ssl.create_default_context(cafile=str(cert))
    return urlopen(Request(url + path, data, headers), timeout=60, context=trust)


def test_token_is_needed_behind_the_proxy(proxy):
    with ask(proxy, "/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    with pytest.raises(HTTPError) as raised:
        ask(proxy, "/v1/models", token="x" * 40)
    assert raised.value.code == 401


def test_stream_comes_while_it_is_made(proxy):
    _, _, client = proxy
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 16}
    with ask(proxy, "/v1/chat/completions", {**body, "max_tokens": 60}) as answer:
        for line in answer:
            if b'"content": "' in line and b'"role"' not in line:
                break
        # Had it been held back, the first words would have come after the last were made.
        _, metrics, _ = client.send("GET", "/metrics", Authorization=f"Bearer {TOKEN}")
        assert "megalite_open_requests 0" not in metrics
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_chat_in_the_terminal_talks_through_it(proxy, tmp_path):
    url, cert, _ = proxy
    (tmp_path / "token").write_text(TOKEN + "\n")
    server = Server(url, token_file=str(tmp_path / "token"), ca_file=str(cert))
    assert server.model() == "tiny"
    how = Drawing(temperature=0, max_tokens=8, top_k=5)
    said = "".join(server.answer([Message("user", "hello")], how))
    asked = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    with ask(proxy, "/v1/chat/completions", asked) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == said

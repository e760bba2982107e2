"""The server as its clients see it, over HTTP: what it answers, refuses, and lives through."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from megalite.data.chat import Message, Template
from megalite.generate.cache import Part, Step
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.generate.sample import Sampling
from megalite.serve.guard import Guard
from megalite.serve.protocol import Wrong
from tests.ranks.serving import Client, make_run, serving
from tests.unit.data.samples import make_tokenizer
from tools.fuzz_server import fuzz

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOKEN = "k" * 40


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_ranks) -> Path:
    return make_run(tmp_path_factory.mktemp("serve") / "tiny", run_ranks)


@pytest.fixture(scope="module")
def client(run, ranks):
    with serving(run, ranks, slots=4, max_queue=8) as client:
        yield client


@pytest.fixture(scope="module")
def says(run):
    """What the model says greedily after some tokens, in this process."""
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    share = load_share(open_checkpoint(run), place)

    def say(ids, count, stop=frozenset()):
        how = Sampling(temperature=0)
        return complete(share, [Request(tokens=ids, how=how, max_tokens=count, stop=stop)])[0]

    return say


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(600)


def test_model_is_named_after_its_run(client):
    status, answer, _ = client.send("GET", "/v1/models")
    (model,) = answer["data"]
    assert status == 200 and model["id"] == "tiny" and model["object"] == "model"
    assert model["context"] == 96 and model["chat"] is True


def test_chat_answers_after_the_template(client, says, tokenizer):
    template = Template(tokenizer)
    ids = template.prompt([Message("system", "be kind"), Message("user", "hello")])
    want = says(ids, 12, frozenset([template.end]))
    parts = [{"type": "text", "text": text} for text in ("hel", "lo")]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts},
    ]
    answer = client.post(CHAT, messages=messages, temperature=0, max_completion_tokens=12)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(want)}
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(want),
        "total_tokens": len(ids) + len(want),
    }


def test_stream_adds_up_to_the_whole_answer(client):
    asked = {"messages": HELLO, "temperature": 1, "seed": 5, "max_tokens": 40, "n": 2}
    whole = client.post(CHAT, **asked, logprobs=True, top_logprobs=2)
    events = client.events(
        CHAT, **asked, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}
    )
    assert events.pop()["usage"] == whole["usage"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(m["delta"].get("content", "") for m in mine) == choice["message"]["content"]
        told = [t for m in mine if m["logprobs"] for t in m["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]
        assert [m["finish_reason"] for m in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    first, second = whole["choices"]
    assert first["message"] != second["message"]


def test_streamed_pieces_are_whole_characters(client):
    # An untrained model makes bytes of every kind.
    for seed in range(4):
        events = client.events(CHAT, messages=HELLO, temperature=1.5, seed=seed, max_tokens=60)
        pieces = [e["choices"][0]["delta"].get("content", "") for e in events]
        whole = client.post(CHAT, messages=HELLO, temperature=1.5, seed=seed, max_tokens=60)
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]


def test_seed_gives_the_same_answer_whatever_else_runs(client):
    asked = {"messages": HELLO, "temperature": 1, "seed": 7, "max_tokens": 30}
    alone = client.post(CHAT, **asked)["choices"]
    others = [
        threading.Thread(
            target=client.post, args=(CHAT,), kwargs={"messages": HELLO, "max_tokens": 40}
        )
        for _ in range(5)
    ]
    for thread in others:
        thread.start()
    together = client.post(CHAT, **asked)["choices"]
    for thread in others:
        thread.join()
    assert together == alone
    assert client.post(CHAT, **{**asked, "seed": 8})["choices"] != alone


def test_completions_take_texts_and_tokens(client, says, tokenizer):
    texts = ["def f(", "import os"]
    ids = [tokenizer.encode(text) for text in texts]
    want = [tokenizer.decode(says(i, 6, frozenset([tokenizer.eod]))) for i in ids]
    how = {"temperature": 0, "max_tokens": 6}
    for prompt in (texts, ids):
        answer = client.post(TEXT, prompt=prompt, **how)
        assert [choice["text"] for choice in answer["choices"]] == want
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    for prompt in (texts[0], ids[0]):
        (choice,) = client.post(TEXT, prompt=prompt, **how)["choices"]
        assert choice["text"] == want[0]


def test_echoed_prompt_has_the_probabilities_of_its_tokens(client, run, tokenizer):
    ids = tokenizer.encode("def f(x): return x")
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    share = load_share(open_checkpoint(run), place)
    logits = share.run(Step((Part(0, 0, tuple(ids), len(ids)),))).double()
    logs = torch.log_softmax(logits, -1)
    want = [logs[i, token].item() for i, token in enumerate(ids[1:])]
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    for prompt in ([ids], [ids, ids[:3]]):
        choice = client.post(TEXT, prompt=prompt, **asked)["choices"][0]
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == pytest.approx(want, abs=1e-5)
        best = [max(top.values()) for top in told["top_logprobs"][1:]]
        assert best == pytest.approx(logs.max(-1).values.tolist(), abs=1e-5)
        assert len(told["tokens"]) == len(ids) + 1 == len(told["text_offset"])
        assert choice["text"].startswith("def f(x): return x")


def test_stop_string_ends_the_text_before_it(client):
    asked = {"prompt": "def f(", "temperature": 0, "max_tokens": 30}
    whole = client.post(TEXT, **asked)["choices"][0]["text"]
    stop = whole[8:11]
    (choice,) = client.post(TEXT, **asked, stop=["never there", stop])["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    parts = client.events(TEXT, **asked, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in parts) == choice["text"]


def test_tokenizer_shows_tokens_and_their_bytes(client, tokenizer):
    answer = client.post("/tokenize", text="h\u00e9llo")
    assert [t["id"] for t in answer["tokens"]] == tokenizer.encode("h\u00e9llo")
    assert b"".join(bytes(t["bytes"]) for t in answer["tokens"]).decode() == "h\u00e9llo"
    assert answer["count"] == len(answer["tokens"]) and answer["context"] == 96
    talk = client.post("/tokenize", messages=HELLO)
    assert talk["count"] == len(Template(tokenizer).prompt([Message("user", "hello")]))


WRONG = [
    (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item"),
    (CHAT, {"messages": [{"role": "user", "content": 4}]}, 400, "messages[0].content: "),
    (CHAT, {"messages": [{"role": "usr", "content": "a"}]}, 400, "messages[0].role: "),
    (CHAT, {"messages": HELLO, "temprature": 1}, 400, "temprature: no such field here"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature: "),
    (CHAT, {"messages": HELLO, "temperature": "1"}, 400, "temperature: "),
    (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p: "),
    (CHAT, {"messages": HELLO, "presence_penalty": 1}, 400, "presence_penalty: "),
    (CHAT, {"messages": HELLO, "seed": 2**63}, 400, "seed: "),
    (CHAT, {"messages": HELLO, "model": "gpt-5"}, 404, "model 'gpt-5' is not here"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 400}]}, 400, "context is 96"),
    (TEXT, {"prompt": "a", "max_tokens": 96}, 400, "prompt 1 + max_tokens 96 > context 96"),
    (TEXT, {"prompt": ""}, 400, "the prompt is empty"),
    (TEXT, {"prompt": []}, 400, "prompt: "),
    (TEXT, {"prompt": [600]}, 400, "token 600 of the prompt is not in the vocabulary"),
    (TEXT, {"prompt": [[1], [-1]]}, 400, "token -1 of the prompt is not in the vocabulary"),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt: "),
    (TEXT, {"prompt": "a", "top_k": 601}, 400, "the model knows 600 tokens"),
    (TEXT, {"prompt": "a", "echo": True, "stream": True}, 400, "echo: not offered with stream"),
    (TEXT, b"{", 400, "not JSON"),
    (TEXT, b"\xff", 400, "not UTF-8 at byte 0"),
    (TEXT, b"[1]", 400, "the body is a list, expected an object"),
    (TEXT, b'{"prompt": "a", "prompt": "b"}', 400, '"prompt" stands twice'),
    (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, "NaN is not a number"),
    (TEXT, b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", 400, "nested deeper than 32"),
    (TEXT, b'{"prompt": ' + b"[" * 99_999 + b"}", 400, "nested deeper than 32"),
    (TEXT, b'{"seed": ' + b"9" * 9999 + b"}", 400, "a number too long"),
    (TEXT, b" " * (2 << 20), 413, "the body is longer than 1048576 bytes"),
    ("/tokenize", {}, 400, "give text or messages"),
    ("/nothing", {}, 404, "POST /nothing: Not Found"),
    ("/v1/models", {}, 405, "POST /v1/models: Method Not Allowed"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, status, text", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_mistake_is_said_in_words(client, path, body, status, text):
    found, answer, _ = client.send("POST", path, body)
    assert found == status and text in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert client.send("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:9"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
    ],
)
def test_other_sites_cannot_reach_the_server(client, headers, status):
    found, _, given = client.send("GET", "/health", **headers)
    assert found == status and given["Access-Control-Allow-Origin"] is None
    assert "default-src 'none'" in given["Content-Security-Policy"]
    assert given["X-Content-Type-Options"] == "nosniff"


def test_token_is_needed_where_there_is_one():
    guard = Guard(None, token=TOKEN, names={"localhost"})

    def status(path, *authorization):
        headers = [(b"host", b"localhost")] + [(b"authorization", a) for a in authorization]
        try:
            guard._check({"headers": headers, "path": path})
        except Wrong as wrong:
            return wrong.status
        return 200

    right = b"Bearer " + TOKEN.encode()
    assert status("/v1/models") == status("/metrics") == status("/tokenize") == 401
    assert status("/v1/models", b"Bearer wrong") == status("/v1/models", right, right) == 401
    assert status("/v1/models", TOKEN.encode()) == 401
    assert status("/v1/models", right) == 200
    assert status("/") == status("/health") == status("/page/app.js") == 200


def stream_raw(client, **body) -> socket.socket:
    """A stream whose answer has begun."""
    data = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 60, **body}).encode()
    raw = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    assert raw.recv(1000).startswith(b"HTTP/1.1 200")
    return raw


def wait_until(what) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to be")


def test_client_that_leaves_frees_its_place(client: Client):
    wait_until(lambda: client.open() == 0)
    leaving = [stream_raw(client, seed=i, n=2) for i in range(6)]  # 12: all places
    assert client.open() > 0
    for raw in leaving:
        raw.close()
    wait_until(lambda: client.open() == 0)


def test_too_many_requests_are_told_to_try_again(client: Client):
    wait_until(lambda: client.open() == 0)
    status, answer, headers = client.send("POST", CHAT, {"messages": HELLO, "n": 13})
    assert (status, headers["Retry-After"]) == (429, "1") and "try again" in str(answer)
    assert client.open() == 0


def test_slow_headers_are_cut_off(client: Client, monkeypatch):
    monkeypatch.setattr("megalite.serve.guard.HEADER_SECONDS", 0.3)
    for start in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
        raw = socket.create_connection(("127.0.0.1", client.port), timeout=30)
        raw.sendall(start)
        with raw, contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""


def test_slow_body_is_cut_off(client: Client, monkeypatch):
    monkeypatch.setattr("megalite.serve.guard.BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as raw:
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_fuzzed_requests_never_fail_the_server(client: Client):
    answers = fuzz(client.port, 150, seed=1)
    assert all(status < 500 for status in answers) and answers[200] > 0 and answers[400] > 50
    assert client.send("GET", "/health")[0] == 200


def test_failed_rank_is_told_to_all(run, ranks, client: Client):
    # The last test with this server: it does not come back.
    raw = stream_raw(client, n=8)
    pid = ranks.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    with raw:
        text = b""
        while more := raw.recv(1 << 16):
            text += more
            if b"0\r\n\r\n" in text:
                break
    assert b"the model has failed" in text or b"[DONE]" in text
    wait_until(lambda: client.send("GET", "/health")[0] == 503)
    status, answer, _ = client.send("POST", CHAT, {"messages": HELLO})
    assert status == 503 and answer["error"]["message"] == "the model has failed"

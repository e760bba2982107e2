"""Attacks a server of its own: broken requests, slow clients, a killed rank.

    python tools/fuzz_server.py RUN --count 2000 --seed 0

Starts `megalite serve RUN --tp 2` on a free port and prints what came of it: answers to `--count`
mutated requests by status (none may be 5xx, and the process must stay, no larger than before);
median latency of a normal request alone, and beside 200 clients that never end their headers and 20
that never read their stream; seconds from the kill of a rank to 503. The exit code is 1 where a
bound is missed: 0 answers of 5xx, latency at most doubled, 503 within 5 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
         "max_tokens": 2, "stream": True, "logprobs": True, "top_logprobs": 2, "top_p": 0.9},
    ),
    ("/v1/completions", {"prompt": "def f(", "max_tokens": 2, "temperature": 0.5, "stop": ["a"]}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "logprobs": 1, "echo": True}),
    ("/tokenize", {"text": "hello"}),
]  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**63, -(2**70), 10**400, "", "a", "\0",
    "\ud800", "\U0001f600" * 50, "<|im_end|>", "<script>alert(1)</script>", "../../etc", "x" * 5000,
    [], {}, [[]], [None], {"a": {"b": {}}}, [1] * 500, ["a"] * 200, {"role": "user"}, [-1], [10**9],
]  # fmt: skip
NORMAL = VALID[0]
SLOW_HEADERS, NEVER_READ = 200, 20


def mutated(rng: random.Random) -> bytes:
    """The bytes of a request that was valid before."""
    path, body = rng.choice(VALID)
    value = json.loads(json.dumps(body))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        _mutate(value, rng)
    try:
        data = json.dumps(value).encode()
    except ValueError:
        data = b"{}"
    kind = rng.random()
    if kind < 0.25:
        data = _damaged(data, rng)
    method = "POST" if rng.random() < 0.9 else rng.choice(["GET", "PUT", "DELETE", "X", "OPTIONS"])
    if rng.random() < 0.08:
        path = rng.choice(
            ["/", "/v1", "/v1/models/../../x", "/%00", "/page/../server.py", "/\u00e9", "*"]
        )
    headers = ["Host: localhost", "Connection: close", "Content-Type: application/json"]
    length: Any = len(data)
    if rng.random() < 0.15:
        length = rng.choice([0, -1, len(data) + 9, "abc", 10**20, f"{len(data)}, 3"])
    framing = f"Content-Length: {length}"
    if rng.random() < 0.08:
        framing = "Transfer-Encoding: chunked"
        size = rng.choice([f"{len(data):x}", "zz", "-1", "fffffffffffffff"])
        data = size.encode() + b"\r\n" + data + b"\r\n0\r\n\r\n"
        if rng.random() < 0.3:
            framing += f"\r\nContent-Length: {len(data)}"
    if rng.random() < 0.15:
        headers.append(rng.choice([
            "Host: other", "Origin: null", "Authorization: Bearer x", "X: " + "y" * 20_000,
            "Expect: 100-continue", "Upgrade: websocket\r\nConnection: upgrade", "Bad Header",
            "Content-Encoding: gzip", "\x00: 1", "Cookie: " + "a=b; " * 900,
        ]))  # fmt: skip
    version = "HTTP/1.1" if rng.random() < 0.97 else rng.choice(["HTTP/9.9", "HTTP/1.0", ""])
    lines = [f"{method} {path} {version}", *headers, framing, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + data


def _mutate(value: Any, rng: random.Random) -> None:
    """Change something somewhere in a JSON value."""
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.5:
            value = value[key]
            continue
        act = rng.random()
        if act < 0.6:
            value[key] = rng.choice(ODD)
        elif act < 0.75:
            del value[key]
        elif isinstance(value, dict):
            value[rng.choice(["n", "seed", "stop", "model", "top_k", "echo", "zzz"])] = rng.choice(
                ODD
            )
        else:
            value.insert(0, rng.choice(ODD))
        return


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Not quite JSON, or a great deal of it."""
    act = rng.randrange(6)
    if act == 0:
        return data[: rng.randrange(len(data) + 1)]
    if act == 1:
        at = rng.randrange(len(data))
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if act == 2:
        return b"[" * rng.choice((30, 40, 100_000)) + data
    if act == 3:
        return rng.randbytes(rng.randrange(300))
    if act == 4:
        return data[:-1] + b',"temperature":NaN}'
    return data + b" " * (1 << 20)


def send(port: int, request: bytes, patience: float = 30.0) -> int:
    """The status of the answer; 0 where there is none when the server closes, or patience ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as raw:
        answer = b""
        with contextlib.suppress(OSError):
            raw.sendall(request)
            while more := raw.recv(1 << 16):
                answer = answer or more
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(found[1]) if found else 0


def fuzz(port: int, count: int, seed: int) -> Counter[int]:
    """Answers to so many mutated requests, by status."""
    rng = random.Random(seed)
    return Counter(send(port, mutated(rng), 1.0) for _ in range(count))


def post(port: int, path: str, body: dict[str, Any], **more: str) -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    named = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{named}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def latency(port: int, rounds: int = 40) -> float:
    """Median seconds of a normal request."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        assert send(port, post(port, *NORMAL, Connection="close")) == 200
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def besieged(port: int) -> float:
    """The same beside slow clients."""
    with contextlib.ExitStack() as stack:

        def connect(data: bytes) -> None:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.sendall(data)

        streaming = {**NORMAL[1], "stream": True, "max_tokens": 40}
        for _ in range(NEVER_READ):
            connect(post(port, NORMAL[0], streaming))
        for _ in range(SLOW_HEADERS):
            connect(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A")
        return latency(port)


def rss_mb(pid: int) -> float:
    """Memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def ranks_of(pid: int) -> list[int]:
    """Processes under a process that have none under them."""
    # A child stands under the thread that started it.
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for thread in threads for word in thread.read_text().split()]
    return [rank for child in children for rank in ranks_of(child) or [child]]


def seconds_to_503(port: int, pid: int) -> float:
    """From the kill of a rank until the server says that it cannot serve."""
    os.kill(ranks_of(pid)[-1], signal.SIGKILL)
    began = time.perf_counter()
    while time.perf_counter() - began < 30:
        if send(port, post(port, *NORMAL, Connection="close")) == 503:
            break
    return time.perf_counter() - began


def main() -> int:
    """Print a table; give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="run directory of the model to serve")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [sys.executable, "-m", "megalite", "serve", args.run, "--tp", "2", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            port = int(re.search(r":(\d+) \(", ready)[1])  # type: ignore[index]
            idle, before = latency(port), rss_mb(server.pid)
            answers = fuzz(port, args.count, args.seed)
            after = rss_mb(server.pid)
            slow = besieged(port)
            ended = server.poll() is not None
            down = seconds_to_503(port, server.pid)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    errors = sum(n for status, n in answers.items() if status >= 500)
    by_status = ", ".join(f"{n} {s or 'closed'}" for s, n in sorted(answers.items()))
    print(f"fuzzed    {args.count} requests: {by_status}; {errors} of 5xx")
    print(f"memory    {before:.0f} MB before, {after:.0f} MB after")
    print(f"latency   {1e3 * idle:.1f} ms idle, {1e3 * slow:.1f} ms besieged ({slow / idle:.2f})")
    print(f"failure   {down:.2f} s from a killed rank to 503")
    return int(bool(errors) or ended or slow > 2 * idle or down > 5)


if __name__ == "__main__":
    sys.exit(main())

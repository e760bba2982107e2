"""nginx with TLS in front of a server, by examples/nginx.conf."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def proxied(upstream: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """The URL of nginx before that port, and the certificate to trust."""
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (on Debian: apt-get install {program})")
    cert, key, port = folder / "cert.pem", folder / "key.pem", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-out", str(cert), "-keyout", str(key)],
        check=True, capture_output=True,
    )  # fmt: skip
    text = (ROOT / "examples" / "nginx.conf").read_text()
    for old, new in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("/etc/ssl/chat.example.org.pem", str(cert)),
        ("/etc/ssl/chat.example.org.key", str(key)),
        ("127.0.0.1:8000", f"127.0.0.1:{upstream}"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(re.sub(r"worker_processes auto", "worker_processes 1", text))
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as nginx:
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert nginx.poll() is None, nginx.stderr and nginx.stderr.read()
                time.sleep(0.05)
            yield f"https://localhost:{port}", cert
        finally:
            nginx.terminate()
            nginx.wait(20)

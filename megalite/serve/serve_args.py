"""What `megalite serve` takes. No torch here, so that its --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from megalite.core.config import PathText
from megalite.serve.talk_args import Placing


@dataclass(frozen=True, kw_only=True)
class ServeArgs(Placing):
    """Serve a model to OpenAI's clients and to the page at /; Ctrl-C ends it."""

    checkpoint: tyro.conf.Positional[PathText]
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    host: str = "127.0.0.1"
    """Address to listen at; beyond loopback only with --token-file."""
    port: int = 8000
    """Port to listen at (0: any that is free)."""
    token_file: str = ""
    """File with the token, of 32 characters or more, that every client must send."""
    tls_cert: str = ""
    """Certificate chain (PEM): speak HTTPS."""
    tls_key: str = ""
    """Its private key (PEM)."""
    allow_host: str = ""
    """More names by which clients may call this server, as a,b: those of a proxy in front."""
    slots: int = 16
    """Requests that run at once."""
    max_queue: int = 64
    """Requests that may wait for a slot; the next ones are told to try again."""
    max_seconds: float = 600.0
    """How long one request may take; what it has then is its answer."""

"""What `megalite generate` and `megalite chat` take. No torch here, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from megalite.core.config import PathText


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where a model runs."""

    tp: int = 1
    """Ranks that each layer is cut over, whatever it was trained at."""
    pp: int = 1
    """Ranks that the layers are spread over."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where torch sees one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of weights and matmuls; auto: fp32 on CPU, bf16 on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the next token is drawn."""

    max_tokens: int = 128
    """New tokens at most."""
    temperature: float = 0.8
    """Spread of the choice; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Choose among tokens at least this likely, as a share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there before become less likely."""
    seed: int = 1234
    """Names the random numbers: the same seed gives the same text."""
    stop: str = ""
    """A text that ends the answer, and is no part of it."""


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(Drawing, Placing):
    """Go on from a prompt with a trained model."""

    checkpoint: tyro.conf.Positional[PathText]
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    prompt: tyro.conf.Positional[str]
    """Text to go on from."""
    chat: bool = False
    """The prompt is a question: print what a fine-tuned model answers."""
    num_samples: int = 1
    """Texts to print."""


@dataclass(frozen=True, kw_only=True)
class ChatArgs(Drawing, Placing):
    """Talk in the terminal with a fine-tuned model, or with a server that runs one."""

    checkpoint: tyro.conf.Positional[PathText] = ""
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    url: str = ""
    """Talk with this OpenAI-compatible server, such as http://127.0.0.1:8000, in place of a run."""
    token_file: str = ""
    """File with the token that the server asks for."""
    ca_file: str = ""
    """Certificates to trust in place of the system's, for a server that made its own."""
    system: str = ""
    """What the model is told before the conversation."""

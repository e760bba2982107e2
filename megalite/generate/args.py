"""What `megalite generate` takes. No torch here, so that its --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from megalite.core.config import PathText


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Go on from a prompt with a trained model, in one process."""

    checkpoint: tyro.conf.Positional[PathText]
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    prompt: tyro.conf.Positional[str]
    """Text to go on from."""
    chat: bool = False
    """The prompt is a question: print what a fine-tuned model answers."""
    max_tokens: int = 128
    """New tokens at most."""
    temperature: float = 0.8
    """Spread of the choice; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability."""
    seed: int = 1234
    """Names the random numbers: the same seed gives the same text."""
    num_samples: int = 1
    """Texts to print."""

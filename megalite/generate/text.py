"""From tokens to text while they come: whole characters only, and an end at the first stop string.

A character may be cut over tokens, and a stop string over characters: what could still become
either is held back until it is known, or until the text ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from megalite.data.tokenizer import Tokenizer


class TextStream:
    """The text of one request, in pieces that add up to it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing after it is text."""

    def add(self, tokens: Iterable[int]) -> str:
        """What these tokens let be known of the text beyond the pieces before."""
        return self._tell(self._decode(self._tokenizer.decode_bytes(tokens)))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed."""
        piece = self._tell(self._decode(b"", True))
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _tell(self, more: str) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_begins(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begins(text: str, stop: str) -> int:
    """How many of the last characters of `text` could be the first of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

"""What `megalite verify` takes: all flags of pretrain and a few. No torch, so --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from megalite.core.config import Config, PathText


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What is compared. The precision is fp64 where --precision does not say."""

    random: int | None = None
    """Compare this many drawn layouts (None: the one of the flags); --seed draws others."""
    max_ranks: int = 16
    """Ranks of a drawn layout at most."""
    steps: int = 3
    """Train steps that are compared."""
    fixed_order: bool = False
    """Make every float64 sum exact, so that no order of it matters: then not a single bit of a
    layout's numbers may differ from one process, and rounding is told apart from mistakes."""
    json: PathText = ""
    """Write the table to this file as JSON, too."""


@dataclass(frozen=True, kw_only=True)
class VerifyRun(Config):
    """Show that a layout computes what one process computes, on ranks that this command starts.

    The model is a small one of the same form. With --random, settings that differ from their
    default stay as they are in every drawn layout.
    """

    verify: VerifyConfig = field(default_factory=VerifyConfig)

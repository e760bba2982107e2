"""A user's own code: checked before a run starts, and named with its hash in all that a run leaves.

`--attention`, `--optimizer` and `--schedule` may each name a file. What is in it is part of what
the run computes and of no version of megalite, so config.json keeps its path and sha256, ranks must
agree on it (agree.py), and a run that goes on with another says so. It is no refusal: megalite
cannot tell a comment from other numbers, and a file that had a mistake must be mended somehow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from megalite.core.config import FILES, Config
from megalite.core.errors import UserError
from megalite.layers.attention import load_attention
from megalite.optim.rules import Rules
from megalite.schedule.custom import sha256_of

OwnFiles = dict[str, dict[str, str]]
"""Field -> `path` (with the name in it) and `sha256`."""


def attention_of(config: Config) -> Callable[..., nn.Module]:
    """The attention class of a run. Raises UserError if it is not there, or not for this run."""
    spec = config.model.attention
    made = load_attention(spec)
    if config.data.keeps_documents_apart and not getattr(made, "keeps_documents_apart", False):
        data = config.data
        names = {"--reset-attention-mask": data.reset_attention_mask, "--dpo-beta": data.prefers}
        asked = next((name for name, is_asked in names.items() if is_asked), "--pack")
        raise UserError(
            f"{asked}: --attention {spec} does not say that it minds documents "
            "(mask by call.starts, then set keeps_documents_apart = True in the class)"
        )
    return made


def check_own_code(config: Config) -> None:
    """Raise UserError, in one line, unless what --attention and --optimizer name can be called.

    Runs the files. --schedule is checked with the layout (core/check.py).
    """
    attention_of(config)
    Rules(config.optim)


def own_files(config: Config) -> OwnFiles:
    """The files of this user that the run is made of. Raises UserError if one cannot be read."""
    specs = {
        "attention": config.model.attention,
        "optimizer": config.optim.optimizer,
        "schedule": config.layout.schedule,
    }
    found: OwnFiles = {}
    for name, spec in specs.items():
        try:
            sha256 = sha256_of(spec)
        except ValueError as error:
            raise UserError(f"--{name} {error}") from None
        if sha256 is not None:
            found[name] = {"path": spec, "sha256": sha256}
    return found


def as_tree(config: Config, files: OwnFiles) -> dict[str, Any]:
    """The config as config.json has it: its groups, and the files beside them if there are any."""
    return {**config.to_dict(), **({FILES: files} if files else {})}


def changed_files(before: OwnFiles, now: OwnFiles) -> list[str]:
    """A line for each file that is not what it was when the checkpoint was written."""
    lines = []
    for name in sorted(before.keys() & now.keys()):
        was, is_now = before[name]["sha256"], now[name]["sha256"]
        if was != is_now:
            lines.append(
                f"--{name} {now[name]['path']}: has changed since the checkpoint was written "
                f"(sha256 {was[:12]}, now {is_now[:12]})"
            )
    return lines

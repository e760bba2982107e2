"""The mistakes a user can make, each with the exit code of its kind.

Broken invariants of ours are `assert`; these are for what comes from outside. Each text is one
line: the field, its value, the rule, and the way out. `megalite/__main__.py` prints it once, as
`megalite: error: <text>`, on rank 0.
"""


class UserError(ValueError):
    """A command line, config or layout that cannot work (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """Text, tokens or a tokenizer that is damaged or does not fit (exit code 3)."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model (exit code 4)."""

    exit_code = 4


class RunError(UserError):
    """The run failed: a rank died, the disk is full, a loss is not a number (exit code 5)."""

    exit_code = 5


class PeerFailed(RunError):
    """Another rank failed first and says why: this one ends without a word."""

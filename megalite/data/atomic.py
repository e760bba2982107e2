"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megalite.core.errors import RunError


def temporary_path(path: Path) -> Path:
    """The name under which `path` is written; one a process, so that two runs never share it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that is at `path` once the block ends; if the block raises, nothing is left.

    Raises RunError when the place cannot be written (no permission, disk full).
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise RunError(f"{path}: is a directory, expected a file name")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], tree: Any) -> None:
    """`tree` as JSON, one item a line. Raises as write_atomic."""
    with write_atomic(path) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())

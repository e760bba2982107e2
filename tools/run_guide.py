"""Runs every command of the guide, in order: the road of docs/guide without the reading.

python tools/run_guide.py            as it stands there: some ten minutes
python tools/run_guide.py --smoke    in a small form, in a temporary folder
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.guide import commands  # noqa: E402
from tools.guide.chapters import Command, all_chapters  # noqa: E402

SHARED = ("examples", "tools", "megalite", "kernels", "Makefile", ".venv")
"""What a folder needs of the repository for commands to run there."""


def workplace(folder: Path) -> Path:
    """`folder`, with what commands need of the repository."""
    for name in SHARED:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def every_command() -> list[Command]:
    """Of all chapters, in the order in which they are read."""
    return [command for chapter in all_chapters() for command in chapter.commands()]


def main(argv: list[str] | None = None) -> int:
    """Run all; 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="in a small form, elsewhere")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="megalite-guide-") as scratch:
        here = workplace(Path(scratch)) if args.smoke else ROOT
        for command in every_command():
            print(f"+ {command.text}", flush=True)
            began = time.monotonic()
            try:
                commands.run(command, smoke=args.smoke, here=here)
            except commands.CommandError as error:
                print(f"run_guide: error: {error}", file=sys.stderr)
                return 1
            print(f"  {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

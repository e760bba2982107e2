"""Takes the pictures of the page in docs/: light, dark and phone, of a real conversation.

    python tools/screenshot_page.py runs/demo-chat

Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from browser import Browser, NoBrowser, browser

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUESTIONS = ("What is the capital of France?", "What does len do?", "Who are you?")
ENTER = "\ue007"


def talk(window: Browser, url: str) -> None:
    """Ask the questions, tokens coloured, and point at one."""
    window.open(url)
    window.until("return document.getElementById('model').textContent !== 'megalite'")
    window.js("settings.temperature.value = 0.6; settings.seed.value = 4")
    window.js("document.querySelector('[name=probabilities]').click()")
    for number, question in enumerate(QUESTIONS, start=1):
        window.type("#draft", question + ENTER)
        acts = "document.querySelectorAll('.assistant .acts button').length"
        window.until(f"return {acts} >= {2 * number}")


def main() -> int:
    """Write the pictures; give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="run directory of a fine-tuned model")
    args = parser.parse_args()
    command = [sys.executable, "-m", "megalite", "serve", args.run, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.search(r"http://\S+", server.stdout.readline())
            assert url is not None, "the server did not start"
            with browser() as window:
                window.resize(1080, 720)
                talk(window, url[0])
                window.hover(".assistant:last-child .t:nth-child(2)")
                (DOCS / "page-light.png").write_bytes(window.screenshot())
                window.click("#theme")
                (DOCS / "page-dark.png").write_bytes(window.screenshot())
                window.resize(390, 760)
                (DOCS / "page-phone.png").write_bytes(window.screenshot())
        except NoBrowser as missing:
            print(f"screenshot_page: error: {missing}", file=sys.stderr)
            return 5
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Makes this clone's Python environment, .venv, or with --peers or --docs one more for an extra.

Called by make. Runs on the bare interpreter before anything is installed, so: standard library
only, and the syntax of Python 3.6, so that an old interpreter reads a line that says so instead of
a SyntaxError. It may be stopped at any time: the stamp is written last, and without it the next
call goes on from what is there.

Environment: TORCH holds pip arguments that name the torch to install; SYSTEM_TORCH=1 reuses the
torch that the calling interpreter already has. Without --this-python, a .venv that has another
Python than the calling one keeps it.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 10), (3, 13)
OLDEST_TORCH = (2, 11)
TORCH_WITHOUT_GPU, TORCH_WITH_GPU = "torch==2.13.0", "torch>=2.11"
DISK_GB = 5
# What must import before the environment counts as complete.
MODULES = ["torch", "numpy", "regex", "tensorboard", "safetensors", "tyro", "tqdm", "matplotlib"]
MODULES += ["fastapi", "uvicorn", "pytest", "hypothesis", "setuptools"]


class SetupError(Exception):
    """What is wrong, with the fix, in one line."""


class Environment:
    """One venv of the clone and its stamp, which says what a complete one was made from."""

    def __init__(self, name):
        self.path = os.path.join(ROOT, name)
        self.python = os.path.join(self.path, "bin", "python")
        self.stamp = os.path.join(self.path, "stamp")

    def read_stamp(self):
        try:
            with open(self.stamp) as f:
                return json.load(f)
        except (OSError, ValueError):
            return {}

    def write_stamp(self, made_from):
        with open(self.stamp + ".new", "w") as f:
            json.dump(made_from, f, indent=1, sort_keys=True)
        os.replace(self.stamp + ".new", self.stamp)

    def create(self, *options):
        """Makes the venv, or gives one that was stopped half-way what it lacks."""
        if "--clear" in options or ask(self.python, "import pip") is None:
            run(sys.executable, "-m", "venv", *(list(options) + [self.path]))

    def pip_install(self, *arguments):
        run(self.python, "-m", "pip", "install", "--no-input", *arguments)

    def link(self, python):
        """Lets this venv see the packages of another interpreter, behind its own."""
        code = "import sys; print('\\n'.join(p for p in sys.path if p.endswith('-packages')))"
        folders = ask(python, code) or ""
        here = ask(self.python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        with open(os.path.join(here, "shared_packages.pth"), "w") as f:
            f.write(folders + "\n")


def say(text):
    print("set-up: " + text, flush=True)


def run(*command):
    """Prints and runs a command in the clone. Raises SetupError if it fails."""
    shown = [os.path.relpath(c, ROOT) if c.startswith(ROOT + os.sep) else c for c in command]
    print("+ " + " ".join(shlex.quote(c) for c in shown), flush=True)
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_USER="0")
    if subprocess.call(command, cwd=ROOT, env=env) != 0:
        raise SetupError(
            "the last command failed, its reason stands above (run make again to go on from here)"
        )


def ask(python, code, *arguments):
    """What `python -c code` prints, or None if it fails."""
    try:
        answer = subprocess.check_output(
            [python, "-c", code] + list(arguments), cwd=ROOT, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.decode().strip()


def check_machine():
    """Raises SetupError unless this interpreter, system and disk will do."""
    version = platform.python_version()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        names = ["python3.%d" % minor for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
        found = next((name for name in names if ask(name, "import venv") is not None), None)
        fix = "" if found else "install one, then "
        raise SetupError(
            "Python %s at %s will not do: megalite runs on 3.10 to 3.13 (%smake PYTHON=%s .venv)"
            % (version, sys.executable, fix, found or "python3.12")
        )
    if os.name == "nt":
        raise SetupError("on Windows megalite runs inside WSL (wsl --install, then clone there)")
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise SetupError("torch has no Intel Mac builds (on Apple silicon: use an arm64 Python)")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "Python %s has no venv module (Debian, Ubuntu: apt install python3.%d-venv)"
            % (version, sys.version_info[1])
        ) from None
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            "%.1f GB free at %s and the set-up needs %d (free some, or clone onto another disk)"
            % (free, ROOT, DISK_GB)
        )
    say("Python %s, %.0f GB free" % (version, free))


def check_system_torch():
    """Raises SetupError unless the calling interpreter has a torch to share."""
    version, text = torch_version(sys.executable)
    if version is None:
        raise SetupError(
            "SYSTEM_TORCH=1, but %s has no working torch "
            "(install it there, or leave SYSTEM_TORCH out)" % sys.executable
        )
    if version < OLDEST_TORCH:
        raise SetupError(
            "SYSTEM_TORCH=1, but %s has torch %s and megalite needs 2.11 or later "
            "(update it there, or leave SYSTEM_TORCH out)" % (sys.executable, text)
        )


def torch_version(python):
    """The torch that `python` imports, as (2, 13) and as text; (None, None) without one."""
    text = ask(python, "import torch; print(torch.__version__)")
    if text is None:
        return None, None
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2]), text


def has_gpu():
    """Whether the NVIDIA driver lists a GPU."""
    try:
        listed = subprocess.check_output(["nvidia-smi", "-L"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return b"GPU" in listed


def choose_torch(wish):
    """The pip arguments that name torch."""
    return wish["torch"] or (TORCH_WITH_GPU if has_gpu() else TORCH_WITHOUT_GPU)


def say_downloads(torch, is_chosen):
    """Says what pip is about to fetch, and how to fetch less."""
    say("will download the packages of requirements.txt, about 110 MB, and %s:" % torch)
    if sys.platform == "darwin":
        say("about 100 MB. In all 1 GB on disk.")
        return
    say("about 200 MB as a CPU build (in all 1.3 GB on disk), several GB as a CUDA build.")
    if not is_chosen and not has_gpu():
        say("On Linux pip may choose the CUDA build. For the CPU one stop here with Ctrl-C and run")
        say("    make TORCH='%s --index-url URL' .venv" % torch)
        say("with the URL that PyTorch's install page shows for Linux, Pip, CPU.")


def read_wish(env, this_python):
    """What .venv shall be made from. What is not given stays as it was at the last set-up."""
    before = env.read_stamp()
    python = "%d.%d" % sys.version_info[:2]
    torch, shares = os.environ.get("TORCH", "").strip(), os.environ.get("SYSTEM_TORCH") == "1"
    if not torch and not shares:
        torch, shares = before.get("torch", ""), before.get("system_torch", False)
    with open(os.path.join(ROOT, "requirements.txt"), "rb") as f:
        requirements = hashlib.sha256(f.read()).hexdigest()
    return {
        "python": python if this_python else before.get("python", python),
        "torch": "" if shares else torch,
        "system_torch": shares,
        "requirements": requirements,
    }


def why_unfit(env, wish):
    """Why the venv that stands there cannot be completed to the wish, or None."""
    cfg = os.path.join(env.path, "pyvenv.cfg")
    if not os.path.exists(cfg):
        return None
    held = ask(env.python, "import sys; print('%d.%d' % sys.version_info[:2])")
    if held != wish["python"]:
        return "its Python is %s, wanted is %s" % (held or "broken", wish["python"])
    with open(cfg) as f:
        shares = "include-system-site-packages = true" in f.read().lower()
    if shares != wish["system_torch"]:
        return "SYSTEM_TORCH is now %d" % wish["system_torch"]
    return None


def fill(env, wish):
    """Installs torch, the requirements and megalite; whether all of it imports."""
    if wish["system_torch"] and sys.prefix != sys.base_prefix:
        # This Python is itself a venv, and --system-site-packages shows only its base's packages.
        env.link(sys.executable)
    if wish["torch"] or torch_version(env.python)[0] is None:
        env.pip_install(*shlex.split(choose_torch(wish)))
    env.pip_install("-r", "requirements.txt")
    # No build isolation: it would download a second setuptools, and fail without a network.
    env.pip_install("--quiet", "--no-deps", "--no-build-isolation", "-e", ".")
    add_disassemblers(env)
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    return ask(env.python, code, *MODULES) is not None


def add_disassemblers(env):
    """pyproject.toml's `kernels`, where nvcc is: one test needs them, and is skipped without."""
    if shutil.which("nvcc") is None and not os.path.exists("/usr/local/cuda/bin/nvcc"):
        return
    try:
        env.pip_install("--quiet", "--no-build-isolation", "-e", ".[kernels]")
    except SetupError:
        say("nothing can disassemble the CUDA kernels: the test of their machine code is skipped")


def make_main(this_python):
    """.venv: torch first, then requirements.txt, then megalite itself as an editable install."""
    env = Environment(".venv")
    wish = read_wish(env, this_python)
    if env.read_stamp() == wish:
        os.utime(env.stamp)
        return
    check_machine()
    unfit = why_unfit(env, wish)
    has_torch = not unfit and torch_version(env.python)[0] is not None
    options = []
    if wish["system_torch"]:
        options = ["--system-site-packages"]
        if not has_torch:
            check_system_torch()
    elif wish["torch"] or not has_torch:
        say_downloads(choose_torch(wish), is_chosen=bool(wish["torch"]))
    if unfit:
        say("making .venv anew: %s" % unfit)
    env.create(*(options + ["--clear"] if unfit else options))
    if not fill(env, wish):
        say("making .venv anew: a package in it is broken, as when an install was stopped half-way")
        env.create(*(options + ["--clear"]))
        if not fill(env, wish):
            broken = [name for name in MODULES if ask(env.python, "import " + name) is None]
            raise SetupError(
                ".venv is made, but %s does not import (.venv/bin/python -c 'import %s' says why)"
                % (broken[0], broken[0])
            )
    version, text = torch_version(env.python)
    if version < OLDEST_TORCH:
        raise SetupError("torch %s is too old: megalite needs 2.11 or later (TORCH=...)" % text)
    env.write_stamp(wish)
    say("done: .venv has Python %s and torch %s" % (wish["python"], text))


def make_extra(name, megabytes):
    """.venv-NAME: .venv's packages, torch among them, and those of pyproject.toml's extra."""
    base, env = Environment(".venv"), Environment(".venv-" + name)
    check_machine()
    say(
        "will download the packages of pyproject.toml's `%s` that are not in .venv: %d MB"
        % (name, megabytes)
    )
    if ask(env.python, "import pip") is None:
        run(base.python, "-m", "venv", "--clear", env.path)
    env.link(base.python)
    # A new venv of Python 3.10 or 3.11 has an old setuptools of its own, which hides .venv's.
    env.pip_install("--quiet", "setuptools>=77")
    env.pip_install("--no-build-isolation", "-e", ".[%s]" % name)
    env.write_stamp(base.read_stamp())
    say("done: .venv-" + name)


def main():
    try:
        if "--peers" in sys.argv[1:]:
            make_extra("peers", 45)
        elif "--docs" in sys.argv[1:]:
            make_extra("docs", 35)
        else:
            make_main("--this-python" in sys.argv[1:])
    except SetupError as error:
        print("set-up: error: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nset-up: stopped (run make again to go on from here)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds the CUDA kernels into one shared library that knows nothing of torch or Python.

    python kernels/build.py                  for GPUs: sm_80, sm_90, sm_100, and PTX for later ones
    python kernels/build.py --emulated       for this machine's CPU, by g++: what the tests run
    python kernels/build.py --emulated --sanitize

The first goes beside megalite/ops/library.py, where a run finds it, and needs nvcc of CUDA 12.8 or
later; no GPU. It fails if a kernel's registers spill. The second goes to build/, and needs a C++17
compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from megalite.ops.library import BUILT, SOURCES, source_hash  # noqa: E402

ARCHITECTURES = ("80", "90", "100")
CPP = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


class BuildFailed(Exception):
    """A compiler is missing, or says no."""


def nvcc() -> str:
    """The path of nvcc. Raises BuildFailed if there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise BuildFailed(
            "no nvcc here (not in PATH, CUDA_HOME or /usr/local/cuda): install CUDA's"
        )
    return found


def compiler() -> str:
    """The path of a C++ compiler. Raises BuildFailed if there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise BuildFailed("no C++ compiler here (g++ or c++ in PATH, or CXX)")
    return found


def build(out: Path, *, architectures: tuple[str, ...] = ARCHITECTURES) -> list[str]:
    """Compile for GPUs; gives a line with the registers of each kernel.

    Raises BuildFailed with the compiler's words, and for kernels that spill.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    host = ",".join(CPP[1:])
    command = [nvcc(), "-O3", CPP[0], "-Xptxas", "-v", "-Xcompiler", host, *codes]
    report = _compile(command, [nvcc(), "-shared", *codes], out)
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    spills = [f"{name} for {arch}" for name, arch, out, back, _ in kernels if int(out) + int(back)]
    if spills:
        raise BuildFailed(f"registers of {len(spills)} kernels spill: {', '.join(spills)}")
    return [f"{arch} {used:>4} registers  {name}" for name, arch, _, _, used in kernels]


def build_emulated(out: Path, *, sanitize: bool = False, sources: Path = SOURCES) -> None:
    """Compile for the CPU. Raises BuildFailed with the compiler's words."""
    cxx = compiler()
    flags = [*CPP, *(SANITIZE if sanitize else []), "-O1", "-Wall", "-Wextra"]
    # Loops are CUDA's to unroll.
    flags += ["-Wno-unknown-pragmas", "-x", "c++"]
    _compile([cxx, *flags], [cxx, "-shared", *(SANITIZE if sanitize else [])], out, sources)


def _compile(compiler: list[str], linker: list[str], out: Path, sources: Path = SOURCES) -> str:
    """Each source by `compiler`, two at a time, then one library; gives what compilers print."""
    work = (HERE.parent / "build" if sources == SOURCES else sources) / out.stem
    work.mkdir(parents=True, exist_ok=True)
    define = f'-DSOURCE_HASH="{source_hash(sources)}"'

    def compiled(source: Path) -> tuple[str, str]:
        made = str(work / f"{source.stem}.o")
        return made, _run([*compiler, define, "-c", str(source), "-o", made])

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiled, sorted(sources.glob("*.cu"))))
    part = out.with_suffix(".part")  # a library in use is replaced, never written over
    out.parent.mkdir(parents=True, exist_ok=True)
    _run([*linker, "-o", str(part), *(name for name, _ in made)])
    part.replace(out)
    return "\n".join(words for _, words in made)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    """Parse and build; 1 with the reason if that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", help="for the CPU")
    parser.add_argument("--sanitize", action="store_true", help="with the sanitizers of g++")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="GPUs, as 80,90,100")
    parser.add_argument("--out", type=Path, help="the library")
    parser.add_argument("--registers", action="store_true", help="list them for each kernel")
    args = parser.parse_args()
    name = "libmegalite_sanitized.so" if args.sanitize else "libmegalite_emulated.so"
    out = args.out or (HERE.parent / "build" / name if args.emulated else BUILT)
    try:
        if args.emulated:
            build_emulated(out, sanitize=args.sanitize)
            lines = []
        else:
            lines = build(out, architectures=tuple(args.arch.split(",")))
    except BuildFailed as failed:
        print(f"kernels/build.py: error: {failed}", file=sys.stderr)
        return 1
    if args.registers:
        print("\n".join(lines))
    count = f"{len(lines)} kernels, none of which spills: " if lines else ""
    print(f"{count}{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

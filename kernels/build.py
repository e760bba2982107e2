"""Builds the CUDA kernels into one shared library that knows nothing of torch or Python.

    python kernels/build.py                  for GPUs: sm_80, sm_90, sm_100, and PTX for later ones
    python kernels/build.py --sass           the same, and insists on a look at the machine code
    python kernels/build.py --emulated       for this machine's CPU, by g++: what the tests run
    python kernels/build.py --emulated --sanitize

The first goes beside megalite/ops/library.py, where a run finds it, and needs nvcc of CUDA 12.8 or
later; no GPU. It fails if a kernel's registers spill, and, where cuobjdump and nvdisasm are there,
if one that moves packs does not do so 16 bytes at a time, or computes for longer than that takes.
With --emulated it goes to build/, and needs a C++17 compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from megalite.ops.library import BUILT, SOURCES, source_hash  # noqa: E402

ARCHITECTURES = ("80", "90", "100")
CPP = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
ONE_A_ROW = ("cross_entropy_forward",)
"""Kernels that read packs and write none."""
MOST_NARROW = {"LDG": 6, "STG": 4}
"""Narrower accesses that a kernel of packs may have: a row's statistics, its label or mask, the
last few numbers of a range. A row that is moved in halves would have more."""
HALVES = re.compile(r"adamwILi\d+E(?!ffE)")
"""Kernels of packs of float32 whose gradients or copies, being narrower, go in halves of a pack."""
MOST_INSTRUCTIONS = 124
"""For each access of 16 bytes, those of rare cases counted, too. An H200's 132 processors issue 128
threads' instructions each at 1.98 GHz: eight for each byte of its 4.3 TB/s. A kernel of more would
compute for longer than it moves."""
MORE_INSTRUCTIONS = {
    "Li0E": "K is 0: rows too long for registers are read again",
}
"""Parts of the names of kernels that may have more, and why."""
MORE_BARRIERS = ("norm_backwardI",)
"""Kernels that may have more than one: a block of those with 16 is one of four on a processor."""
ANY = ("", 0)
"""Where a kernel's instructions of all kinds are counted, beside its accesses."""


class BuildFailed(Exception):
    """A compiler is missing, or says no; or the machine code is not what it should be."""


def cuda_tool(name: str, remedy: str) -> str:
    """The path of a program of CUDA's. Raises BuildFailed, with what to do, if there is none."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [f"{home}/bin" for home in homes]
    # Where pip puts NVIDIA's programs.
    places += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise BuildFailed(f"no {name} here (not in PATH, CUDA_HOME or /usr/local/cuda): {remedy}")
    return found


def nvcc() -> str:
    """The path of nvcc. Raises BuildFailed if there is none."""
    return cuda_tool("nvcc", "install CUDA's")


def disassemblers() -> tuple[str, str]:
    """The paths of cuobjdump and of nvdisasm, which it calls. Raises BuildFailed without them."""
    remedy = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return cuda_tool("cuobjdump", remedy), cuda_tool("nvdisasm", remedy)


def compiler() -> str:
    """The path of a C++ compiler. Raises BuildFailed if there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise BuildFailed("no C++ compiler here (g++ or c++ in PATH, or CXX)")
    return found


def build(
    out: Path, *, architectures: tuple[str, ...] = ARCHITECTURES, sources: Path = SOURCES
) -> list[str]:
    """Compile for GPUs; gives a line with the registers of each kernel.

    Raises BuildFailed with the compiler's words, and for kernels that spill.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = architectures[-1]
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    host = ",".join(CPP[1:])
    command = [nvcc(), "-O3", CPP[0], "-Xptxas", "-v", "-Xcompiler", host, *codes]
    report = _compile(command, [nvcc(), "-shared", *codes], out, sources)
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:, used (\d+) barriers)?",
        report,
        flags=re.DOTALL,
    )
    spills = [f"{name} for {arch}" for name, arch, out, back, *_ in kernels if int(out) + int(back)]
    if spills:
        raise BuildFailed(f"registers of {len(spills)} kernels spill: {', '.join(spills)}")
    for name, arch, *_, barriers in kernels:
        if int(barriers or 0) > 1 and not any(part in name for part in MORE_BARRIERS):
            raise BuildFailed(f"{name} for {arch} reserves {barriers} barriers")
    return [f"{arch} {used:>4} registers  {name}" for name, arch, _, _, used, _ in kernels]


def check_machine_code(library: Path, architecture: str) -> int:
    """How many kernels of a built library move packs. Raises BuildFailed for those that do it by
    other accesses than of 16 bytes, or with too many instructions; and without the programs that it
    takes to see that.
    """
    cuobjdump, nvdisasm = disassemblers()
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    sass = _run([cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(library)], PATH=path)
    kernels = accesses(sass)
    packed = {name: found for name, found in kernels.items() if moves_packs(name)}
    if not packed:
        raise BuildFailed(f"{library}: no kernel for sm_{architecture} moves packs")
    faults = [fault for name, found in packed.items() for fault in faults_of(name, found)]
    if faults:
        raise BuildFailed(f"machine code for sm_{architecture}: {'; '.join(faults)}")
    return len(packed)


def moves_packs(kernel: str) -> bool:
    """Whether V, the first number among the mangled name's template arguments, is more than 1."""
    width = re.search(r"Li(\d+)E", kernel)
    return width is not None and int(width[1]) > 1


def accesses(sass: str) -> dict[str, Counter[tuple[str, int]]]:
    """Of each kernel, how many instructions load (LDG) or store (STG) how many bits; and ANY."""
    found: dict[str, Counter[tuple[str, int]]] = {}
    for line in sass.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            counts = found.setdefault(name[1], Counter())
            continue
        if re.match(r"\s+/\*[0-9a-f]+\*/\s+(?!NOP)\S.*;", line):
            counts[ANY] += 1
        # LDGSTS loads into shared memory.
        if access := re.search(r"\b(LDG|STG)(?:STS)?\b((?:\.\w+)*)", line):
            bits = re.search(r"\.[US]?(8|16|64|128)\b", access[2])
            counts[access[1], int(bits[1]) if bits else 32] += 1
    return found


def faults_of(kernel: str, found: Counter[tuple[str, int]]) -> Iterator[str]:
    """What is wrong with a kernel that moves packs: its accesses, or too much beside them."""
    whole = 64 if HALVES.search(kernel) else 128
    for kind, most in MOST_NARROW.items():
        narrow = sum(n for (of, bits), n in found.items() if of == kind and bits < whole)
        if narrow > most:
            yield f"{kernel} has {narrow} {kind} of less than {whole} bits"
        writes_none = kind == "STG" and any(name in kernel for name in ONE_A_ROW)
        if not found[kind, 128] and not writes_none:
            yield f"{kernel} has no {kind} of 128 bits"
    packs = found["LDG", 128] + found["STG", 128]
    may_have_more = any(part in kernel for part in MORE_INSTRUCTIONS)
    if packs and found[ANY] > MOST_INSTRUCTIONS * packs and not may_have_more:
        yield f"{kernel} has {found[ANY] // packs} instructions for each access of 16 bytes"


def build_emulated(out: Path, *, sanitize: bool = False, sources: Path = SOURCES) -> None:
    """Compile for the CPU. Raises BuildFailed with the compiler's words."""
    cxx = compiler()
    # Sanitized code is compiled four times as fast without optimization.
    how = [*SANITIZE, "-O0"] if sanitize else ["-O1"]
    flags = [*CPP, *how, "-Wall", "-Wextra"]
    # Loops are CUDA's to unroll.
    flags += ["-Wno-unknown-pragmas", "-x", "c++"]
    _compile([cxx, *flags], [cxx, "-shared", *(SANITIZE if sanitize else [])], out, sources)


def _compile(compiler: list[str], linker: list[str], out: Path, sources: Path = SOURCES) -> str:
    """Each source by `compiler`, one on each core, then one library; gives what they print."""
    define = f'-DSOURCE_HASH="{source_hash(sources)}"'
    out.parent.mkdir(parents=True, exist_ok=True)
    # Another build of it may run beside this one; a library in use is replaced, never written over.
    with TemporaryDirectory(prefix=f"{out.stem}-", dir=out.parent) as work:

        def compiled(source: Path) -> tuple[str, str]:
            made = os.path.join(work, f"{source.stem}.o")
            return made, _run([*compiler, define, "-c", str(source), "-o", made])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compiled, sorted(sources.glob("*.cu"))))
        linked = os.path.join(work, out.name)
        _run([*linker, "-o", linked, *(name for name, _ in made)])
        os.replace(linked, out)
    return "\n".join(words for _, words in made)


def _run(command: list[str], **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _build_and_look(out: Path, built: tuple[str, ...], args: argparse.Namespace) -> None:
    lines = build(out, architectures=built)
    if args.registers:
        print("\n".join(lines))
    print(f"{len(lines)} kernels, none of which spills")
    try:
        disassemblers()
    except BuildFailed as missing:
        if args.sass:
            raise
        print(f"their machine code is not looked at: {missing}")
        return
    seen = "90" if "90" in built else built[0]
    packed = check_machine_code(out, seen)
    print(f"{packed} of those for sm_{seen} move packs, by accesses of 16 bytes and little beside")


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
    parser.add_argument("--sass", action="store_true", help="fail if nothing can disassemble it")
    args = parser.parse_args()
    name = "libmegalite_sanitized.so" if args.sanitize else "libmegalite_emulated.so"
    out = args.out or (HERE.parent / "build" / name if args.emulated else BUILT)
    try:
        if args.emulated:
            build_emulated(out, sanitize=args.sanitize)
        else:
            _build_and_look(out, tuple(args.arch.split(",")), args)
    except BuildFailed as failed:
        print(f"kernels/build.py: error: {failed}", file=sys.stderr)
        return 1
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

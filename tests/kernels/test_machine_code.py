"""What nvcc makes of the kernels: no register spills, and packs are moved 16 bytes at a time."""

from __future__ import annotations

import shutil

import pytest

import build
from megalite.ops.library import SOURCES, Library

PACKS = "_ZN8megalite12norm_forwardIfLi4ELi4ELb0EEEvNS_11NormForwardIT_EE"
WIDE = "template <> struct Word<16> { using type = uint4; };"
NARROW = "struct Four { uint32_t x, y, z, w; }; template <> struct Word<16> { using type = Four; };"
ONE = f"""
    Function : {PACKS}
        /*0100*/  LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0110*/  LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0120*/  @P0 STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*0130*/  @!P0 STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0140*/  LDS.128 R4, [R2] ;
        /*0150*/  LDGSTS.E.BYPASS.128 [R93], desc[UR6][R88.64] ;
        /*0160*/  LDGDEPBAR ;
"""


def needs(tool):
    """Skips, with the reason, without the programs that `tool` looks for."""
    try:
        tool()
    except build.BuildFailed as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library for sm_90, and the lines of its build."""
    needs(build.nvcc)
    out = tmp_path_factory.mktemp("kernels") / "kernels.so"
    return out, build.build(out, architectures=("90",))


def test_kernels_compile_for_a_gpu_and_none_spills(built):
    out, lines = built
    assert len(lines) > 50 and all(line.startswith("sm_90") for line in lines)
    assert not Library(out).emulated


def test_packs_are_moved_by_accesses_of_16_bytes(built):
    needs(build.disassemblers)
    assert build.check_machine_code(built[0], "90") > 50


def built_with(folder, unit, right, wrong):
    """A library of one unit, in whose common.cuh `wrong` stands in place of `right`."""
    needs(build.nvcc)
    needs(build.disassemblers)
    for name in ("common.cuh", f"{unit}.cuh", f"{unit}.cu"):
        shutil.copy(SOURCES / name, folder)
    text = (folder / "common.cuh").read_text()
    assert right in text
    (folder / "common.cuh").write_text(text.replace(right, wrong))
    out = folder / "kernels.so"
    build.build(out, architectures=("90",), sources=folder)
    return out


def test_packs_that_are_moved_in_parts_are_found(tmp_path):
    out = built_with(tmp_path, "adamw", WIDE, NARROW)
    with pytest.raises(build.BuildFailed, match=r"5adamwILi4EffEE\S+ has no LDG of 128 bits"):
        build.check_machine_code(out, "90")


def test_accesses_are_counted_by_width():
    counts = {("LDG", 128): 2, ("LDG", 32): 1, ("STG", 128): 1, ("STG", 16): 1, build.ANY: 7}
    assert build.accesses(ONE) == {PACKS: counts}
    assert build.moves_packs(PACKS) and not build.moves_packs(PACKS.replace("Li4E", "Li1E", 1))


def test_halves_beside_whole_packs_are_found():
    """Of weights that stay whole while rows are moved in two."""
    assert not list(build.faults_of(PACKS, build.accesses(ONE)[PACKS]))
    rows = ONE + "  LDG.E.64 R4, [R2] ;\n" * 8
    found = list(build.faults_of(PACKS, build.accesses(rows)[PACKS]))
    assert found == [f"{PACKS} has 9 LDG of less than 128 bits"]


@pytest.mark.parametrize("types, whole", [("13__nv_bfloat16f", 64), ("f6__half", 64), ("ff", 128)])
def test_packs_of_float32_beside_narrower_numbers_may_take_halves(types, whole):
    kernel = f"_ZN8megalite5adamwILi4E{types}EEvNS_5AdamWIT0_T1_EE"
    for bits, wrong in ((whole, False), (whole // 2, True)):
        width = {32: "", 64: ".64", 128: ".128"}[bits]
        rows = ONE + f"  LDG.E{width} R4, [R2] ;\n" * 8
        found = list(build.faults_of(kernel, build.accesses(rows)[PACKS]))
        assert found == [f"{kernel} has 9 LDG of less than {whole} bits"] * wrong


def test_more_instructions_than_can_be_issued_meanwhile_are_found():
    """Three accesses of 16 bytes leave time for so many; a kernel with a reason may have more."""
    most = 3 * build.MOST_INSTRUCTIONS
    for kernel, more, wrong in ((PACKS, 0, False), (PACKS, 1, True), (f"{PACKS}Li0E", 1, False)):
        code = ONE + "        /*0200*/  FADD R4, R4, R5 ;\n" * (most - 7 + more)
        code += "        /*0300*/  NOP ;\n" * 9
        found = list(build.faults_of(kernel, build.accesses(code)[PACKS]))
        assert found == [f"{kernel} has 124 instructions for each access of 16 bytes"] * wrong


def test_a_function_of_the_library_in_place_of_one_instruction_is_found(tmp_path):
    out = built_with(tmp_path, "cross_entropy", "power_of_2(1.44269504f * x)", "expf(x)")
    with pytest.raises(build.BuildFailed, match="cross_entropy_forward.* instructions for each"):
        build.check_machine_code(out, "90")


def test_kernel_that_reserves_all_barriers_is_found(tmp_path):
    """Four blocks of it would fill a processor, however few threads they have."""
    with pytest.raises(build.BuildFailed, match="softmax.* for sm_90 reserves 16 barriers"):
        built_with(tmp_path, "softmax", "bool APART = false", "bool APART = true")

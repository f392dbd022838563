"""How instructions are counted in machine code, on code written down here."""

import pytest

from helpers.checkout import benchmarks

sass = benchmarks("_sass")


def code(*lines: str) -> str:
    """Return the lines as the disassembler prints them, 16 bytes each; `name:` marks the next one for branches."""
    places, instructions = {}, []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(instructions)
        else:
            instructions.append(line)
    text = " Function softmax_kernel:\n  REG:64 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:672 TEXTURE:0\n"
    for place, instruction in enumerate(instructions):
        *front, last = instruction.split(" ")
        target = f"0x{places[last]:x}" if last in places else last
        text += f"        /*{16 * place:04x}*/                   {' '.join([*front, target])} ;    /* 0x00000a00 */\n"
    return text


def count(*lines: str, ids_per_step: float = 4) -> list:
    """Return the passes over a row of bf16 in one tensor: a thread loads 4 ids by 64 bits."""
    return list(sass.passes(code(*lines), 2, ids_per_step))


LOAD, STORE, WORK = "LDG.E.64 R2, desc[UR4][R2.64]", "STG.E.64 desc[UR4][R6.64], R2", "FADD R1, R1, R2"
MASKED, MERGE = f"@!P0 {LOAD}", "BAR.SYNC.DEFER_BLOCKING 0x0"
FIRST = ("first:", LOAD, "MUFU.EX2 R3, R2", *[WORK] * 5, "@P1 BRA first")
SECOND = ("second:", LOAD, *[WORK] * 8, "MUFU.RCP R3, R2", STORE, "@!P1 BRA second")
END = ("EXIT", "stop:", "BRA stop")


def test_registers_and_what_spills():
    assert sass.usage(code(*END)) == {"REG": 64, "STACK": 8, "LOCAL": 16}


def test_two_passes():
    first, second = count(WORK, *FIRST, "SHFL.BFLY PT, R1, R2", MERGE, *SECOND, *END)
    assert first == sass.Pass(8 / 4, 1 / 4, 2.0, 0.0, 0.0, 1, 64)
    assert second == sass.Pass(12 / 4, 1 / 4, 2.0, 2.0, 0.0, 1, 64)


def test_barriers_within_a_loop_are_its_own_and_part_no_passes():
    (one,) = count("first:", LOAD, MERGE, WORK, MERGE, "BRA.U !UP0, first", *END)
    assert (one.barriers, one.instructions) == (2, 5 / 4)


@pytest.mark.parametrize("tail", ["straight", "loop"])
def test_a_masked_tail_is_no_pass(tail):
    rest = ("rest:", MASKED, *[WORK] * 30, *(["@P2 BRA rest"] if tail == "loop" else []))
    one, two = count(*FIRST, WORK, *rest, MERGE, *SECOND, *END)
    assert (one.instructions, two.instructions) == (8 / 4, 12 / 4)


def test_an_unrolled_loop_has_more_ids_and_a_rest():
    unrolled = ("main:", *[LOAD] * 4, *[WORK] * 19, "@P1 BRA main")
    one, two = count(*unrolled, *FIRST, MERGE, *SECOND, *END)
    assert (one.unrolled, one.instructions, one.loaded_bytes) == (4, 24 / 16, 2)
    assert two.unrolled == 1


def test_width_of_loads():
    wide = "LDG.E.LTC128B.128 R4, [R2.64]"
    (one,) = count("first:", wide, "@P1 BRA first", *END, ids_per_step=8)
    assert (one.loaded_bytes, one.narrowest, one.instructions) == (2, 128, 2 / 8)
    (one,) = count("first:", *["@P0 LDG.E.U16.CONSTANT R4, [R2.64]"] * 4, "@P1 BRA first", *END)
    assert (one.narrowest, one.instructions) == (16, 5 / 4)


def test_what_is_no_pass():
    zeros = ("zeros:", STORE, "@P1 BRA zeros")
    assert count(*zeros, *END) == []
    # the row within a loop over rows, and the path of divergent threads, behind the end, that jumps back
    outer = ("rows:", "LDG.E R9, [R8.64]", *FIRST, MERGE, "back:", *SECOND, "@P3 BRA rows", *END, WORK, "BRA back")
    assert [one.instructions for one in count(*outer)] == [8 / 4, 12 / 4]


def test_loads_that_are_no_whole_steps_are_an_error():
    with pytest.raises(ValueError, match="no multiple of a step's 4"):
        count("first:", LOAD, "LDG.E R9, [R8.64]", "@P1 BRA first", *END)

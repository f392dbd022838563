"""Check how instructions are counted in machine code, on code written down here."""

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


LOOP = """
  %d:2 = scf.for %i = %c0 to %n step %c1024 iter_args(%a = %b, %c = %b) -> (tensor<1024xf32>, i32) {
    %s = tt.load %places : tensor<1024x!tt.ptr<bf16>>
    %e = "tt.reduce"(%s) <{axis = 1 : i32}> ({
    ^bb0(%x: f32, %y: f32):
      tt.reduce.return %x : f32
    }) : (tensor<128x8xf32>) -> tensor<128xf32>
    STORE
    scf.yield %e, %c : tensor<1024xf32>, i32
  }"""
REDUCE = """
  %m = "tt.reduce"(%d) <{axis = 0 : i32}> ({
  ^bb0(%x: f32, %y: f32):
    tt.reduce.return %x : f32
  }) : (tensor<128xf32>) -> f32"""
BRANCH = """
  %r = scf.if %odd -> (f32) {
    WITHIN
    scf.yield %m : f32
  } else {
    scf.yield %z : f32
  }"""
STORE_BLOCK = "tt.store %p, %s : tensor<1024x!tt.ptr<bf16>>"
TAIL = "%s = tt.load %p : tensor<1024x!tt.ptr<bf16>>"


def source(*passes: str) -> str:
    """Return intermediate code whose passes "load", also "store", are in a "branch", or the "tail" of the one before.

    With what is no pass: a loop that writes zeros, and a tail in straight code.
    """
    text = "module {\n  tt.func public @f(%s: !tt.ptr<bf16> {tt.divisibility = 16 : i32}) attributes {no = false} {"
    text += LOOP.replace("%s = tt.load %places", "").replace("STORE", STORE_BLOCK)
    for one in passes:
        loop = LOOP.replace("STORE", STORE_BLOCK if "store" in one else "")
        loop = BRANCH.replace("WITHIN", loop + REDUCE) if "branch" in one else loop
        text += loop if "tail" in one else REDUCE + loop
    return text + REDUCE + BRANCH.replace("WITHIN", TAIL) + "\n  }\n}"


def count(*lines: str, ids_per_step: float = 4, written: tuple = ("load", "load store")) -> list:
    """Return the passes over a row of bf16 in one tensor: a thread loads 4 ids by 64 bits."""
    return list(sass.passes(code(*lines), source(*written), 2, ids_per_step))


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
    (one,) = count("first:", LOAD, MERGE, WORK, MERGE, "BRA.U !UP0, first", *END, written=("load",))
    assert (one.barriers, one.instructions) == (2, 5 / 4)


@pytest.mark.parametrize("tail", ["straight", "loop"])
def test_a_masked_tail_is_no_pass(tail):
    rest = ("rest:", MASKED, *[WORK] * 30, *(["@P2 BRA rest"] if tail == "loop" else []))
    written = ("load", "load tail", "load store") if tail == "loop" else ("load", "load store")
    one, two = count(*FIRST, WORK, *rest, MERGE, *SECOND, *END, written=written)
    assert (one.instructions, two.instructions) == (8 / 4, 12 / 4)


def test_an_unrolled_loop_has_more_ids_and_a_rest():
    unrolled = ("main:", *[LOAD] * 4, *[WORK] * 19, "@P1 BRA main")
    one, two = count(*unrolled, *FIRST, MERGE, *SECOND, *END)
    assert (one.unrolled, one.instructions, one.loaded_bytes) == (4, 24 / 16, 2)
    assert two.unrolled == 1


def test_width_of_loads():
    wide = "LDG.E.LTC128B.128 R4, [R2.64]"
    (one,) = count("first:", wide, "@P1 BRA first", *END, ids_per_step=8, written=("load",))
    assert (one.loaded_bytes, one.narrowest, one.instructions) == (2, 128, 2 / 8)
    (one,) = count("first:", *["@P0 LDG.E.U16.CONSTANT R4, [R2.64]"] * 4, "@P1 BRA first", *END, written=("load",))
    assert (one.narrowest, one.instructions) == (16, 5 / 4)


def test_what_a_branch_in_a_loop_skips_is_for_few_blocks():
    loop = ("first:", LOAD, WORK, "@!P2 BRA usual", *[WORK] * 9, STORE, "usual:", WORK, "@P1 BRA first")
    (one,) = count(*loop, *END, written=("load",))
    assert (one.instructions, one.stored_bytes) == (5 / 4, 0)
    either = ("first:", LOAD, "BRA.U !UP2, other", *[WORK] * 9, "BRA both", "other:", WORK, "both:", "@P1 BRA first")
    (one,) = count(*either, *END, written=("load",))
    assert one.instructions == 4 / 4


def test_what_is_no_pass():
    zeros = ("zeros:", STORE, "@P1 BRA zeros")
    assert count(*zeros, *END, written=()) == []
    # the row within a loop over rows, and the path of divergent threads, behind the end, that jumps back
    outer = ("rows:", "LDG.E R9, [R8.64]", *FIRST, MERGE, "back:", *SECOND, "@P3 BRA rows", *END, WORK, "BRA back")
    assert [one.instructions for one in count(*outer)] == [8 / 4, 12 / 4]


def test_a_pass_for_few_rows_is_left_out():
    rare = ("rare:", LOAD, *[WORK] * 3, "@P1 BRA rare")
    code = (*FIRST, MERGE, "@P4 BRA skip", *rare, MERGE, "skip:", MERGE, *SECOND, *END)
    one, two = count(*code, written=("load", "load branch", "load store"))
    assert (one.instructions, two.instructions) == (8 / 4, 12 / 4)
    with pytest.raises(ValueError, match="has 3 passes and its source 2"):
        count(*code)
    with pytest.raises(ValueError, match="do not store alike"):
        count(*code, written=("load", "load store", "load branch"))


def test_a_kernel_that_may_do_nothing_is_counted_as_if_it_did():
    (one,) = count(*SECOND, *END, written=("load store branch",))
    assert one.instructions == 12 / 4


def test_loads_that_are_no_whole_steps_are_an_error():
    with pytest.raises(ValueError, match="no multiple of a step's 4"):
        count("first:", LOAD, "LDG.E R9, [R8.64]", "@P1 BRA first", *END, written=("load",))

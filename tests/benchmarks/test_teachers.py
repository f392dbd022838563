"""``benchmarks.teachers``: its tables, from numbers that are easy to divide."""

from helpers.checkout import benchmarks

teachers = benchmarks("teachers")


def run(tokens, peak):
    return {"tokens_per_second": tokens, "loaded": 2**30, "peak": peak * 2**30, "cpu_seconds": 2.0}


def test_tables_hold_medians_ratios_and_shares(capsys):
    read = {state: {"wall_ms": wall, "cpu_ms": 5.0} for state, wall in (("cold", 9.0), ("warm", 3.0))}
    error = {"tokens": 9, "kl_mean": 5.2e-4, "kl_max": 0.013, "top1_changed": 0.0117, "gradient_error": 0.012}
    teachers.print_report(
        {
            "errors": {"int8 cache": error},
            "written": {"hidden int8": {"tokens": 100, "bytes": 57800, "seconds": 0.25, "error": error}},
            "reading": {"hidden int8": read},
            "training": {
                "LoRA": {
                    "live": [run(100, 3), run(300, 3), run(200, 4)],
                    "hidden int8": [run(270, 2), run(280, 2), run(260, 2)],
                }
            },
        }
    )
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    assert [len(table) for table in tables] == [2, 2, 3]
    assert tables[0][1].split() == ["int8", "cache", "0.00052", "0.013", "1.17%", "1.20%"]
    assert tables[1][1].split() == ["hidden", "int8", "578", "400", "9.00", "3.00", "5.00"]
    assert tables[2][1].split() == ["live", "200.0", "1.00x", "1.00", "3.00"]
    assert tables[2][2].split() == ["hidden", "int8", "270.0", "1.35x", "1.00", "2.00", "0.25", "%"]

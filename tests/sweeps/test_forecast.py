"""FLOPs of a sweep's runs, by the plan of each."""

from types import SimpleNamespace

import pytest

from helpers.measured import sized_config
from helpers.several import members, with_teachers
from torchtune_kd.plan import plan_run, read_request
from torchtune_kd.sweeps.forecast import Flops


@pytest.mark.parametrize("names", [("wide", "narrow"), ("base",), ("ema", "wide")], ids="+".join)
def test_the_flops_of_all_teachers_count(tmp_path, names):
    cfg = sized_config(tmp_path, 1, "lora")
    cfg = with_teachers(cfg, *(members(cfg)[name] for name in names))
    run = SimpleNamespace(cell=SimpleNamespace(name="cell"), written=cfg)
    teacher, rest = Flops(1).per_token(run)
    plan = plan_run(*read_request(cfg))
    assert teacher * plan.tokens_per_step == pytest.approx(plan.flops["teacher"])
    assert (teacher + rest) * plan.tokens_per_step == pytest.approx(sum(plan.flops.values()))

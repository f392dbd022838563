"""FLOPs of a sweep's runs against the plans of each teacher alone."""

from types import SimpleNamespace

import pytest

from helpers.measured import SIZES, sized_config
from helpers.several import NARROW, members, with_teachers
from torchtune_kd.plan import plan_run, read_request
from torchtune_kd.sweeps.forecast import Flops

SIZE = 1
*_, WIDTH, _, VOCAB = SIZES[SIZE]
WIDTHS = {"wide": WIDTH, "narrow": NARROW["embed_dim"], "ema": WIDTH}


@pytest.mark.heavy
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("names", [("wide", "narrow"), ("base",), ("ema", "wide")], ids="+".join)
def test_the_flops_of_all_teachers_count(tmp_path, names, devices):
    """Per token, on any number of devices: all forwards, and one product more with each further head."""
    cfg = sized_config(tmp_path, SIZE, "lora")
    entries = [members(cfg)[name] for name in names]
    run = SimpleNamespace(cell=SimpleNamespace(name="cell"), written=with_teachers(cfg, *entries))
    teacher, rest = Flops(devices).per_token(run)
    alone = [plan_run(*read_request(with_teachers(cfg, entry))) for entry in entries]
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * (cfg.tokenizer.max_seq_len - 1)
    assert teacher * tokens == pytest.approx(sum(plan.flops["teacher"] for plan in alone))
    of_one = sum(alone[0].flops.values()) - alone[0].flops["teacher"]
    assert rest == pytest.approx(of_one / tokens + sum(2 * VOCAB * WIDTHS[name] for name in names[1:]))

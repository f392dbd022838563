"""The plan of several teachers against the plans of each, and of a student that teaches itself."""

import json
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from helpers.cached import cached, write
from helpers.measured import SIZES, sized_config
from helpers.several import NARROW, members, with_teachers
from torchtune_kd.errors import UserError
from torchtune_kd.plan import as_dict, as_text, build_models, plan_run, read_request
from torchtune_kd.plan.communication import sharded_weights
from torchtune_kd.plan.meta_models import as_run

B, S, STEPS = 4, 128, 2  # of sized_config: rows and tokens of a microbatch, microbatches of a step
SIZE = 12
*_, VOCAB = SIZES[SIZE]


@pytest.fixture
def config(tmp_path):
    return lambda kind="full", **more: sized_config(tmp_path, SIZE, kind, **more)


def planned(cfg, *entries, **more):
    cfg = with_teachers(cfg, *entries) if entries else cfg
    return plan_run(*read_request(OmegaConf.merge(cfg, {"device": "cuda"} | more)))


def head(width):
    """FLOPs of a step's product with a head."""
    return STEPS * 2 * B * S * VOCAB * width


@pytest.mark.heavy
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_an_ensemble_takes_the_flops_of_its_members(config, mix):
    """To the unit: the student's once, each member's forward, and one product more with a head."""
    cfg = config()
    wide, narrow = (members(cfg)[name] for name in ("wide", "narrow"))
    both = planned(cfg, wide, narrow, ensemble=mix)
    one, other = planned(cfg, wide), planned(cfg, narrow)
    assert both.flops["teacher"] == one.flops["teacher"] + other.flops["teacher"]
    assert both.flops["student"] == one.flops["student"] == other.flops["student"]
    assert both.flops["backward"] == one.flops["backward"] == other.flops["backward"]
    assert both.flops["loss"] == one.flops["loss"] + head(NARROW["embed_dim"])
    student = sum(one.flops.values()) - one.flops["teacher"] - head(cfg.teacher_model.embed_dim)
    assert sum(both.flops.values()) == sum(one.flops.values()) + sum(other.flops.values()) - student
    assert both.parameters.teacher == one.parameters.teacher + other.parameters.teacher
    assert both.memory.teachers == (one.memory.teacher, other.memory.teacher)
    assert both.times["H100"].total > one.times["H100"].total
    listed = json.loads(json.dumps(as_dict(both)))["teachers"]
    assert [(each["name"], each["kind"], each["share"]) for each in listed] == [
        ("wide", "live", 0.5),
        ("narrow", "live", 0.5),
    ]
    assert sum(each["parameters"] for each in listed) == both.parameters.teacher
    assert sum(each["bytes"] for each in listed) == both.memory.teacher


@pytest.mark.heavy
def test_the_mean_of_probabilities_takes_a_chunk_in_fp32(config):
    cfg = config()
    entries = [members(cfg)[name] for name in ("wide", "narrow")]
    loss = {mix: planned(cfg, *entries, ensemble=mix).memory.loss for mix in ("probabilities", "logits")}
    chunk, block = 4 * B * S * VOCAB, 4 * 2**23  # all tokens of the microbatch; PyTorch's temporaries on CUDA
    assert chunk <= loss["probabilities"] - loss["logits"] <= chunk + 2 * block


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("entry", "flat"),
    [({}, {}), ({"weights": "nf4", "head": "float8"}, {"teacher_weights": "nf4", "teacher_head": "float8"})],
    ids=["plain", "quantised"],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_list_of_one_is_the_teacher_of_the_flat_keys(config, entry, flat, devices):
    cfg = config("lora")
    wide = members(cfg)["wide"] | entry
    one, listed = planned(cfg, devices=devices, **flat), planned(cfg, wide, devices=devices)
    assert as_text(one) == as_text(listed)
    found, expected = as_dict(listed), as_dict(one)
    assert (found["teachers"][0].pop("name"), expected["teachers"][0].pop("name")) == ("wide", "teacher")
    assert found == expected


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_list_of_one_cache_is_the_teacher_cache(config, tmp_path, kind):
    cfg = config("lora")
    cfg.kd_loss.temperature = 1.0
    write(cfg, tmp_path / "cache", kind=kind, dtype="int8" if kind == "hidden" else None)
    one, listed = planned(cached(cfg, tmp_path / "cache")), planned(cfg, {"cache": str(tmp_path / "cache")})
    assert as_text(one) == as_text(listed) and one.memory == listed.memory and one.flops == listed.flops


@pytest.mark.heavy
@pytest.mark.parametrize("devices", [1, 2])
def test_what_members_hold_and_gather_adds_up(config, tmp_path, devices):
    """Gathered are the embeddings and heads of all members, and the layers of one at a time, at most the largest."""
    cfg = config("lora")
    write(cfg, tmp_path / "cache")
    wide, narrow = (members(cfg)[name] for name in ("wide", "narrow"))
    stored = {"name": "stored", "cache": str(tmp_path / "cache")}
    entries = [wide | {"weights": "int8"}, narrow | {"head": "float8"}, stored]
    together = planned(cfg, *entries, devices=devices)
    alone = [planned(cfg, entry, devices=devices) for entry in entries]
    assert together.memory.teachers == tuple(each.memory.teacher for each in alone)
    assert together.flops["teacher"] == sum(each.flops.get("teacher", 0) for each in alone)
    travels = [each.communication for each in alone]
    assert together.communication.teacher_layers == sum(each.teacher_layers for each in travels)
    without = planned(cfg, kd_ratio=0.0, devices=devices)
    settings, layout = together.settings, together.layout
    config = read_request(OmegaConf.merge(with_teachers(cfg, *entries), {"devices": devices}))[1]
    models = as_run(build_models(config, layout.shards))
    parts = [sharded_weights(teacher.model, settings, layout) for teacher in models.teachers]
    gathered = sum(part.rest for part in parts) + max(part.layers for part in parts)
    assert together.memory.gathered - without.memory.gathered == gathered
    assert (gathered > 0) == (devices > 1)
    kinds = [(each.kind, each.float8_head, each.cache_bytes_per_token) for each in together.teachers]
    assert kinds == [("live", False, None), ("live", True, None), ("cache", False, 4 * cfg.teacher_model.embed_dim)]
    assert together.stored_bytes == 4 * cfg.teacher_model.embed_dim
    page = as_text(together)
    assert "teachers, mean of probabilities" in page and "stored (from a cache)" in page
    assert ("teachers' layers, gathered" in page) == (devices > 1)
    assert f"from the cache: {together.stored_bytes:,} bytes" in page
    stored = together.teachers[-1]
    assert f"from caches: {2 * stored.cache_bytes_per_token:,} bytes" in as_text(
        replace(together, teachers=[stored] * 2)
    )


def test_columns_are_as_wide_as_their_numbers(config):
    plan = planned(config("lora"), members(config("lora"))["base"])
    (only,) = plan.teachers
    for parameters in (10**6, 8_030_261_248, 70_553_706_496):
        page = as_text(replace(plan, teachers=[replace(only, parameters=parameters)]))
        (table,) = (part.splitlines() for part in page.split("\n\n") if part.startswith("teachers"))
        assert f"  {parameters:,}  " in table[-1] and len({len(line) for line in table}) == 1


def test_the_base_adds_no_weights_and_a_forward_without_adapters(config):
    plain, base = planned(config()), planned(config("lora"), members(config())["base"])
    assert base.memory.teacher == base.parameters.teacher == base.teachers[0].bytes == 0
    assert base.flops["teacher"] == plain.flops["student"] < base.flops["student"]
    assert base.flops["loss"] == 2 * head(SIZES[SIZE][2]) + head(SIZES[SIZE][2])
    assert "base (the student, adapters off)" in as_text(base)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("devices", [1, 2])
def test_an_average_takes_four_bytes_of_each_trained_weight_and_a_forward(config, kind, devices):
    cfg = config(kind)
    plan, alone = (planned(cfg, *entries, devices=devices) for entries in ((members(cfg)["ema"],), ()))
    trained = plan.parameters.trained
    assert plan.memory.teachers == (4 * trained // devices,) and plan.parameters.teacher == trained
    assert plan.flops["teacher"] == plan.flops["student"] == alone.flops["student"]
    assert plan.memory.student == alone.memory.student
    # a copy of what trains, of the head, and the hidden states
    copies = 2 * trained // devices + 2 * VOCAB * SIZES[SIZE][2]
    without = planned(cfg, kd_ratio=0.0, devices=devices).memory
    held = plan.memory.teacher + without.teacher + without.student + without.gathered + (plan.memory.optimizer or 0)
    assert plan.memory.phases["teacher"] > held + without.gradients + copies
    assert "ema (the student's average, fp32)" in as_text(plan)


@pytest.mark.heavy
def test_what_a_student_that_teaches_itself_gathers(config):
    """Both gather the layers once more; an average has to be gathered apart from the student, with its head."""
    cfg = config("lora", gradient_accumulation_steps=3)
    without = planned(cfg, kd_ratio=0.0, devices=2).communication
    base, ema = (planned(cfg, members(cfg)[name], devices=2).communication for name in ("base", "ema"))
    once = without.student_layers // 6
    assert base.teacher_layers == ema.teacher_layers == 3 * once
    assert base.student_layers == ema.student_layers == without.student_layers
    assert base.heads == without.heads and ema.heads == 6 * without.heads
    stay = {"devices": 2, "fsdp_reshard_after_forward": False}
    base, ema = (planned(cfg, members(cfg)[name], **stay).communication for name in ("base", "ema"))
    assert (base.teacher_layers, base.student_layers) == (0, once)
    assert (ema.teacher_layers, ema.student_layers) == (3 * once, 3 * once)


def specialists(cfg):
    cfg.dataset = [cfg.dataset, cfg.dataset]
    entries = [members(cfg)[name] for name in ("wide", "narrow")]
    return entries, [entry | {"datasets": [at]} for at, entry in enumerate(entries)]


@pytest.mark.heavy
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_specialists_share_the_rows_equally_in_time(config, batch_size):
    """One without a row runs on one: both teachers do so in every batch of one."""
    cfg = config(batch_size=batch_size)
    entries, taught = specialists(cfg)
    plan = planned(cfg, *taught)
    alone = [planned(cfg, entry) for entry in entries]
    forwards = sum(each.flops["teacher"] for each in alone)
    assert plan.flops["teacher"] == (forwards if batch_size == 1 else forwards // 2)
    assert 2 * plan.flops["loss"] == sum(each.flops["loss"] for each in alone)
    assert plan.flops["student"] == alone[0].flops["student"] and plan.flops["backward"] == alone[0].flops["backward"]
    page = as_text(plan)
    assert "in equal shares for the 2 teachers, memory the worst case" in page and "datasets" in page
    assert plan.ensemble is None and [each.datasets for each in plan.teachers] == [(0,), (1,)]


@pytest.mark.heavy
def test_specialists_need_the_memory_of_the_larger_one_with_all_rows(config):
    cfg = config()
    entries, taught = specialists(cfg)
    plan = planned(cfg, *taught)
    alone = [planned(cfg, entry).memory for entry in entries]
    assert plan.memory.teachers == tuple(each.teacher for each in alone)
    for phase in ("teacher", "loss"):
        needed = [each.phases[phase] - each.teacher + plan.memory.teacher for each in alone]
        assert max(needed) <= plan.memory.phases[phase] <= 1.3 * max(needed)


@pytest.mark.heavy
def test_the_largest_batch_has_room_for_all_teachers(tmp_path):
    cfg = sized_config(tmp_path, 1, "lora")
    wide, narrow = (members(cfg)[name] for name in ("wide", "narrow"))
    one, both = (planned(cfg, *each, device_memory="1250MiB") for each in ((wide,), (wide, narrow)))
    assert 4 < both.largest_batch < one.largest_batch


@pytest.mark.parametrize(
    ("kind", "entries", "more", "sentence"),
    [
        ("full", [{"self": "base"}], {}, "`model` is a full-weight one"),
        ("full", [{"self": "ema"}], {"devices": 2, "fsdp_cpu_offload": True}, "which `fsdp_cpu_offload: True` copies"),
        ("full", ["wide", {"cache": "nowhere"}], {}, "but nowhere is none: correct the path"),
        ("full", [{"head": "float8"}, "narrow"], {"ensemble": "logits"}, r"`teachers\[0\]\.head: float8` cannot be"),
        ("full", [{"vocab_size": 3000}, "narrow"], {}, "`model` and `teacher_model` do not fit"),
        ("full", ["wide", "stored"], {}, "Several teachers give hidden states, but .* holds the 64 likeliest ids"),
        ("full", ["stored"], {"head": "float8"}, "`teacher_head: float8` needs hidden states"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_mistakes_are_one_sentence(tmp_path, kind, entries, more, sentence):
    cfg = sized_config(tmp_path, 1, kind)
    known = members(cfg) | {"stored": {"cache": str(tmp_path / "cache")}}
    if "stored" in entries:
        cfg.kd_loss.temperature = 1.0
        write(cfg, tmp_path / "cache", kind="top_k", dtype=None)
        known["stored"] |= {key: more.pop(key) for key in ("head",) if key in more}
    listed = []
    for entry in entries:
        if isinstance(entry, str):
            entry = known[entry]
        elif "head" in entry:
            entry = known["wide"] | entry
        elif "vocab_size" in entry:
            entry = known["wide"] | {"model": known["wide"]["model"] | entry}
        listed.append(entry)
    with pytest.raises(UserError, match=sentence) as caught:
        planned(cfg, *listed, **more)
    assert "\n" not in str(caught.value)

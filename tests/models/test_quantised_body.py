"""A teacher's layers in 4 or 8 bits."""

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from helpers.cached import cached, write
from helpers.forked import ForkedRun
from helpers.tiny import make_config, read_log, run_in_process
from torchtune_kd.errors import UserError
from torchtune_kd.models.quantised_body import Int8Linear, Int8Weights, quantise_rows


def test_rows_are_within_half_a_step():
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1)
    weight[3] = 0
    quantised, scale = quantise_rows(weight)
    assert quantised.dtype == torch.int8 and quantised.abs().max() == 127
    assert ((quantised * scale - weight).abs() <= 0.5001 * scale).all() and (quantised[3] == 0).all()


def run(folder, name, **more):
    cfg = make_config(folder, output_dir=str(folder / name), max_steps_per_epoch=2, **more)
    return cfg, run_in_process(cfg)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_teacher_computes_with_what_its_weights_round_to(tmp_path, kind, dtype):
    """Against the same run beside a plain teacher whose weights were rounded by hand."""
    cfg, quantised = run(tmp_path, f"{kind} {dtype}", dtype=dtype, teacher_weights=kind)

    def rounded(run):
        for layer in run.teacher.teacher.decoder.layers:
            for linear in (module for module in layer.modules() if type(module) is torch.nn.Linear):
                weight = linear.weight.data
                if kind == "nf4":
                    linear.weight.data = to_nf4(weight, block_size=64, scaler_block_size=256).to(weight.dtype)
                else:
                    of_rows, scale = quantise_rows(weight)
                    linear.weight.data = (of_rows * scale).to(weight.dtype)

    by_hand = make_config(tmp_path, output_dir=str(tmp_path / "by hand"), max_steps_per_epoch=2, dtype=dtype)
    run_in_process(by_hand, {"step": lambda run: run.global_step == 0 and rounded(run)})
    for ours, theirs in zip(read_log(cfg.output_dir), read_log(by_hand.output_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if dtype == "fp32" else 1e-2)
    layers = quantised.teacher.teacher.decoder.layers
    linears = [module for layer in layers for module in layer.modules() if "Linear" in type(module).__name__]
    assert len(linears) == 2 * 7
    if kind == "nf4":
        assert all(isinstance(linear.weight, NF4Tensor) for linear in linears)
    else:
        assert all(isinstance(linear, Int8Linear) for linear in linears)


def test_one_dtype_holds_all_parameters_of_an_8_bit_layer():
    """FSDP2 of PyTorch 2.6 to 2.11 refuses integers, and of 2.6 several dtypes; the bytes are those of w and s."""
    linear = Int8Linear(8, 6, bias=True, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.bfloat16}
    assert linear.weight.nbytes == 6 * 8 and linear.scale.nbytes == 6 * 4
    weight = torch.randn(6, 8)
    model = torch.nn.ModuleDict({"linear": linear})
    model.load_state_dict(dict(Int8Weights({"linear.weight": weight, "linear.bias": torch.zeros(6)}, model)))
    expected = quantise_rows(weight)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(linear.quantised(), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_two_processes_give_the_numbers_of_one(tmp_path, kind):
    one, _ = run(tmp_path, "one", teacher_weights=kind)
    two = make_config(
        tmp_path, output_dir=str(tmp_path / "two"), max_steps_per_epoch=2, batch_size=2, teacher_weights=kind
    )
    ForkedRun(two, 2).finish()
    for ours, theirs in zip(read_log(one.output_dir), read_log(two.output_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_cache_says_that_its_teacher_was_quantised(tmp_path):
    cfg = make_config(tmp_path, output_dir=str(tmp_path / "out"), teacher_weights="int8")
    manifest = write(cfg, tmp_path / "cache")
    assert manifest.teacher["teacher_weights"] == "int8"
    run_in_process(cached(cfg, tmp_path / "cache", teacher_weights=None))


def test_random_weights_of_an_unquantised_teacher_are_quantised(tmp_path):
    cfg = make_config(tmp_path, output_dir=str(tmp_path / "out"), max_steps_per_epoch=1, teacher_weights="int8")
    cfg.merge_with({"checkpointer": None, "teacher_checkpointer": None, "random_weights": True})
    teacher = run_in_process(cfg).teacher.teacher.decoder
    layer = next(module for module in teacher.modules() if isinstance(module, Int8Linear))
    weight, scale = layer.quantised()
    values = (weight * scale).std()
    assert values == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"teacher_weights": "int4"}, "Expected `teacher_weights` to be nf4 or int8 or null, got 'int4'"),
        (
            {"teacher_weights": "int8", "teacher_cache": "x"},
            "is for a teacher that runs, but there is",
        ),
        ({"teacher_weights": "nf4", "teacher_model__intermediate_dim": 500}, "does not fit the teacher, int8 does: "),
        ({"teacher_weights": "nf4", "teacher_model__intermediate_dim": 510}, "does not fit the teacher: "),
        (
            {"teacher_weights": "int8", "teacher_model__intermediate_dim": 510},
            r"rows of a multiple of 4 weights, but its layers\.0\.mlp\.w2\.weight is \[256, 510\]",
        ),
    ],
)
def test_mistakes(tmp_path, more, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, "out", **more)

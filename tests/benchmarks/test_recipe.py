"""The sides of ``benchmarks.recipe`` differ in recipe and loss alone; the parts of a step are its own."""

import pytest
from omegaconf import OmegaConf

from helpers.checkout import benchmarks
from helpers.tiny import LORA, STUDENT, TEACHER, VOCAB, make_config
from torchtune_kd.training import read_config


def test_the_sides_differ_in_their_losses_alone(tmp_path):
    recipe = benchmarks("recipe")
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    stock, ours = (
        OmegaConf.to_container(
            recipe.make_config(side, tmp_path, tmp_path / "teacher", tmp_path / "student", 5), resolve=True
        )
        for side in ("stock", "ours")
    )
    settings = read_config(OmegaConf.create(ours), distributed=False).settings
    assert (settings.batch_size, settings.max_steps_per_epoch) == (recipe.BATCH, 5)
    assert stock.pop("loss")["_component_"] == "torchtune.modules.loss.CEWithChunkedOutputLoss"
    assert stock.pop("kd_loss")["_component_"] == "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"
    assert ours.pop("kd_loss")["_component_"] == "torchtune_kd.losses.ForwardKLLoss"
    assert ours.pop("overwrite_output_dir")
    assert str(stock).replace("out-stock", "out") == str(ours).replace("out-ours", "out")


def test_every_row_is_longer_than_a_row_of_the_benchmark(tmp_path):
    recipe = benchmarks("recipe")
    recipe.write_rows(tmp_path / "rows.jsonl", 20)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 20 and min(map(len, rows)) >= 2000
    with pytest.raises(SystemExit, match="lower --steps"):
        recipe.write_rows(tmp_path / "rows.jsonl", 10_000)


def _layer(sizes: dict[str, int]) -> int:
    """Weights in the matrices of a layer of ``tiny``'s models."""
    width, inner = sizes["embed_dim"], sizes["intermediate_dim"]
    heads = width * sizes["num_kv_heads"] // sizes["num_heads"]
    return 2 * width * (width + heads) + 3 * width * inner


def test_the_least_time_of_a_step_counts_each_matrix_product_once(tmp_path, monkeypatch, capsys):
    parts = benchmarks("_recipe_parts")
    monkeypatch.setattr(parts, "matrix_rate", lambda device: 1e9)
    monkeypatch.setattr(parts, "ROUNDS", 1)
    rows = ["x" * 31] * 8
    measured = parts.print_parts(make_config(tmp_path, "lora", rows=rows, batch_size=8))

    tokens = sum(map(len, rows))
    width, rank = STUDENT["embed_dim"], LORA["lora_rank"]
    kv_width, inner = width * STUDENT["num_kv_heads"] // STUDENT["num_heads"], STUDENT["intermediate_dim"]
    # A and B of q and v, and of the three matrices of the MLP
    adapter = rank * ((width + width) + (width + kv_width) + 3 * (width + inner))
    bodies = TEACHER["num_layers"] * _layer(TEACHER) + 2 * _layer(STUDENT) + 3 * adapter
    # the gradient of the first layer's input is nobody's: not through q, k, v, nor through A of q and of v
    bodies -= width * (width + 2 * kv_width) + 2 * rank * width
    heads = 3 * width * VOCAB
    assert measured["flops"] == 2 * tokens * (bodies + heads)
    printed = capsys.readouterr().out
    least = f"{measured['flops'] / 1e9:.2f}  at the least for the matrix products"
    assert f"{measured['bodies']:.2f}" in printed and least in printed

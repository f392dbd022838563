"""torchtune's own KD recipe with our losses, from the YAML key alone."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss as StockForwardKL

from helpers.tiny import ROWS, make_config, read_log, run_in_process, run_tune
from torchtune_kd import losses

STOCK = "knowledge_distillation_single_device"


def stock_config(folder, **overrides):
    """A config as torchtune's KD recipe wants it: with `loss`, and without what only ours reads."""
    cfg = make_config(folder, "lora", **overrides)
    more = {
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "resume_from_checkpoint": False,
        "max_steps_per_epoch": 4,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "enable_activation_checkpointing": False,
    }
    return OmegaConf.merge(cfg, more)


@pytest.mark.slow
@pytest.mark.nightly  # the test that takes the same steps drives the same recipe
def test_our_chunked_loss_trains_in_the_stock_recipe(tmp_path):
    cfg = stock_config(tmp_path, rows=ROWS[4:8] * 4, optimizer__lr=1e-2)  # the same batch in each of four steps
    cfg.kd_loss = {"_component_": "torchtune_kd.losses.ForwardKLWithChunkedOutputLoss", "temperature": 2.0}
    cfg.kd_ratio = 1.0
    run_tune(cfg, STOCK)
    values = [step["kd_loss"] for step in read_log(cfg.output_dir)]
    assert len(values) == 4
    assert values[0] == values[1] > values[2] > values[3] > 0  # the first step of the warm-up has rate 0


@pytest.mark.slow
def test_a_merged_checkpoint_of_ours_trains_on_in_the_stock_recipe(tmp_path):
    ours = make_config(tmp_path, "lora", output_dir=str(tmp_path / "ours"), max_steps_per_epoch=1)
    run_in_process(ours)
    cfg = stock_config(tmp_path, output_dir=str(tmp_path / "stock"))
    cfg.kd_loss = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
    folder = tmp_path / "ours" / "epoch_0"
    cfg.checkpointer.checkpoint_dir = str(folder)
    cfg.checkpointer.checkpoint_files = [path.name for path in folder.glob("model-*.safetensors")]
    run_tune(cfg, STOCK)
    assert len(read_log(cfg.output_dir)) == 4


@pytest.mark.slow
def test_the_stock_recipe_takes_the_same_steps_with_our_loss_at_temperature_1(tmp_path):
    """Same gradient, so the same learning curve of the cross-entropy; the KD values differ by the teacher's entropy."""
    logs = {}
    for name in ("torchtune.modules.loss", "torchtune_kd.losses"):
        cfg = stock_config(tmp_path, output_dir=str(tmp_path / name.split(".")[0]))
        cfg.kd_loss = {"_component_": f"{name}.ForwardKLWithChunkedOutputLoss"}
        run_tune(cfg, STOCK)
        logs[name] = read_log(cfg.output_dir)
    stock, ours = logs.values()
    assert [step["class_loss"] for step in ours] == pytest.approx([step["class_loss"] for step in stock], rel=1e-4)
    assert all(a["kd_loss"] < b["kd_loss"] for a, b in zip(ours, stock, strict=True))


def test_gradient_equals_the_stock_loss_at_temperature_1():
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (2, 12))
    labels[0, :5] = -100
    teacher = [chunk.contiguous() for chunk in torch.randn(2, 12, 50).chunk(8, dim=1)]
    whole = torch.randn(2, 12, 50)
    gradients = []
    for loss in (StockForwardKL(), losses.ForwardKLWithChunkedOutputLoss()):
        student = whole.clone().requires_grad_()
        loss(list(student.chunk(8, dim=1)), teacher, labels).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[1], gradients[0])

"""``torchtune_kd/inspect`` as a command: the page of a run's student, and what is said of what cannot be."""

import runpy
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.tiny import STUDENT, make_config, model_section, run_tune, write_checkpoint
from torchtune_kd._registry import _RECIPES

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TEXT = "The quick brown fox ✓\njumps over </script> the lazy dog.\n"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return make_config(tmp_path, text=str(tmp_path / "text.txt"))


def run(monkeypatch, capsys, cfg, tmp_path, *arguments):
    """The recipe's file as a program, in this process; returns its exit code, stdout and stderr."""
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["inspect", "--config", str(tmp_path / "config.yaml"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / _RECIPES["inspect"][0]), run_name="__main__")
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_no_recipe_hides_a_module_of_the_standard_library():
    """torchrun starts a recipe by its file, whose folder is then the first that Python imports from."""
    assert {file.stem for file in RECIPES.glob("*.py")} & sys.stdlib_module_names == set()


@pytest.mark.slow
@pytest.mark.heavy
def test_tune_run_writes_the_page(config, tmp_path):
    """Untrained where no epoch was trained, else the newest; the reader is told which."""
    said = run_tune(config, "torchtune_kd/inspect").stdout
    page = tmp_path / "out" / "inspect.html"
    assert f"untrained ({tmp_path / 'student'}) against teacher ({tmp_path / 'teacher'})" in said
    assert str(page) in said and f"{len(TEXT.encode())} tokens" in said
    html = page.read_text(encoding="utf-8")
    assert html.count('role="option"') == len(TEXT.encode()) and "untrained against teacher" in html


def test_newest_epoch_is_inspected_and_page_goes_where_it_is_asked_for(monkeypatch, capsys, config, tmp_path):
    for epoch in (2, 10):
        write_checkpoint(tmp_path / "out" / f"epoch_{epoch}", model_section("full", STUDENT), seed=epoch)
    target = tmp_path / "pages" / "page.html"
    code, out, err = run(monkeypatch, capsys, config, tmp_path, f"output={target}", "reference=untrained")
    assert code == 0, err
    assert f"student ({tmp_path / 'out' / 'epoch_10'}) against untrained" in out
    assert target.is_file()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["txt=a.txt"], "Unknown key `txt` in the config: did you mean `text`?"),
        (["batchsize=2"], "Unknown key `batchsize` in the config: did you mean `batch_size`?"),
        (["text="], "Expected the key `text`"),
        (["text=3"], "Expected `text` to be str or null, got 3"),
        (["text={folder}/nowhere.txt"], "nowhere.txt cannot be read or written"),
        (["text={folder}"], "cannot be read or written"),
        (["text={folder}/empty.txt"], "empty.txt, but it is empty"),
        (["text={folder}/latin1.txt"], "latin1.txt to be a text in UTF-8, but byte 3 is not"),
        (["student=student"], "Unknown model `student` under `student`: `output_dir` holds no `epoch_<n>` yet"),
        (["reference=techer"], "Unknown model `techer` under `reference`: choose one of untrained, teacher."),
        (["student=teacher"], "`student` and `reference` are both `teacher`"),
        (["output={folder}"], "Expected `output` to be a file"),
        (["teacher_checkpointer.checkpoint_dir={folder}/other"], "needs one tokenizer for both"),
        (["kd_loss=null"], "no `kd_loss`"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, config, tmp_path, arguments, sentence):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(tmp_path / "teacher" / "model.safetensors")
    tokenizer = (tmp_path / "teacher" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"A"', '"?"').replace('"B"', '"A"').replace('"?"', '"B"'))
    code, _, err = run(
        monkeypatch, capsys, config, tmp_path, *(argument.format(folder=tmp_path) for argument in arguments)
    )
    assert code == 2 and sentence in err, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "out" / "inspect.html").exists()

"""What is wrong with a command line or a config file is one sentence; what a recipe raises stays what it is."""

import sys

import pytest

from torchtune_kd.config.command import command
from torchtune_kd.training import UserError


@command
def recipe_main(cfg):
    """Prints a key."""
    if cfg.get("mistake") is not None:
        raise {"user": UserError, "bug": ZeroDivisionError}[cfg.mistake]("said by the recipe.")
    print(cfg.lr)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    recipe_main()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 0.1\nname: ${lr}\n")
    return path


def test_overrides_reach_the_recipe(monkeypatch, config, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--config", str(config), "lr=0.2")
    assert not ended.value.code and capsys.readouterr().out == "0.2\n"


def test_a_name_that_overrides_leave_without_a_reader_is_dropped(monkeypatch, tmp_path):
    """Unless the command line sets it too: then it is a mistake, which read_settings names."""
    path = tmp_path / "config.yaml"
    path.write_text("base: /data\nfolder: ${base}/models\ncheckpointer: {dir: '${folder}'}\nseed: 1\nother: ${seed}\n")
    seen = []

    @command
    def main(cfg):
        seen.append(set(cfg))

    for overrides in (), ("checkpointer.dir=/x", "other=2"), ("checkpointer.dir=/x", "base=/y"):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(path), *overrides])
        with pytest.raises(SystemExit):
            main()
    everything = {"base", "folder", "checkpointer", "seed", "other"}
    assert seen == [everything, everything - {"base", "folder"}, everything]


def test_a_section_can_be_made_null_on_the_command_line(monkeypatch, tmp_path):
    """torchtune's parser takes the value for that of `_component_`."""
    path = tmp_path / "config.yaml"
    path.write_text("checkpointer: {_component_: a.b, folder: /x}\nprofiler: {_component_: c.d}\n")
    seen = []

    @command
    def main(cfg):
        seen.append(cfg)

    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(path), "checkpointer=null"])
    with pytest.raises(SystemExit):
        main()
    assert seen == [{"checkpointer": None, "profiler": {"_component_": "c.d"}}]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config", "nowhere/nope.yaml"], "nope.yaml"),
        (["--config", "CONFIG", "foo"], "foo"),
        (["--config", "CONFIG", "--lr=0.3"], "--lr=0.3"),
        (["--config", "BROKEN"], "expected ',' or '}'"),
        (["--config", "CONFIG", "name=${nope}"], "'nope' not found"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(monkeypatch, config, tmp_path, capsys, arguments, said):
    (tmp_path / "broken.yaml").write_text("a: {b: 1\n")
    paths = {"CONFIG": str(config), "BROKEN": str(tmp_path / "broken.yaml")}
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *(paths.get(argument, argument) for argument in arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: The config of `--config ") and error.count("\n") == 1, error
    assert said in error and "correct the command line or the file" in error


def test_what_the_recipe_raises_stays_what_it_is(monkeypatch, config, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--config", str(config), "mistake=user")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: said by the recipe.\n"
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "--config", str(config), "mistake=bug")

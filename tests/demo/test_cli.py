"""The command's door: what it refuses, in one sentence and before anything expensive."""

import json

import pytest

from torchtune_kd.demo import __main__ as cli
from torchtune_kd.demo import checks, teacher
from torchtune_kd.demo.output import DemoError, OutputFolder


@pytest.fixture
def ran(monkeypatch):
    """Folders that the demo was let into; the stages themselves are tested elsewhere."""
    folders = []
    monkeypatch.setattr(cli, "_run", lambda args, output, deadline: folders.append(output.path))
    return folders


def refused(capsys, argv, code=2):
    assert cli.main(argv) == code
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def test_a_finished_demo_is_refused_unless_told_otherwise(tmp_path, capsys, ran):
    folder = tmp_path / "out"
    assert cli.main(["--output-dir", str(folder)]) == 0
    output = OutputFolder(folder)
    output.results.write_text("{}")
    output.run.mkdir()
    (output.run / "old").touch()
    (folder / "notes.txt").write_text("mine")
    output.finish()
    assert "--overwrite" in refused(capsys, ["--output-dir", str(folder)])
    assert (output.run / "old").exists()
    assert cli.main(["--output-dir", str(folder), "--overwrite"]) == 0
    assert not output.run.exists() and not output.results.exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert ran == [folder, folder]


def test_an_interrupted_demo_is_replaced_without_asking(tmp_path, ran):
    folder = tmp_path / "out"
    assert cli.main(["--output-dir", str(folder)]) == 0  # left unfinished
    OutputFolder(folder).train_text.write_text("half")
    assert cli.main(["--output-dir", str(folder)]) == 0
    assert not OutputFolder(folder).train_text.exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys, ran, overwrite):
    (tmp_path / "train.jsonl").write_text("mine")
    refused(capsys, ["--output-dir", str(tmp_path), *overwrite])
    refused(capsys, ["--output-dir", str(tmp_path / "train.jsonl"), *overwrite])
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    assert ran == []


@pytest.mark.parametrize(
    ("argv", "missing"),
    [([], "gguf"), ([], "rich"), (["--teacher-dir", "."], "matplotlib"), (["--teacher-hub", "a/b"], "huggingface_hub")],
)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(tmp_path, capsys, monkeypatch, ran, argv, missing):
    find = checks.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == missing else find(name))
    sentence = refused(capsys, ["--output-dir", str(tmp_path / "out"), *argv])
    assert missing in sentence and 'pip install "torchtune-kd[demo]"' in sentence
    assert not (tmp_path / "out").exists()


def test_a_folder_of_ones_own_needs_no_gguf_reader(tmp_path, monkeypatch, ran, smollm2):
    find = checks.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert cli.main(["--output-dir", str(tmp_path / "out"), "--teacher-dir", str(smollm2)]) == 0


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "inf"], "--temperature from 0.001 to 1000, but got inf"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1e9"], "--temperature"),
        (["--temperature", "0.0009"], "--temperature"),
        (["--text", "/nope"], "/nope"),
        (["--text", "short.txt"], "--text"),
        (["--teacher-dir", "/nope"], "/nope has no config.json"),
        (["lr:1"], "key=value"),
        (["=1"], "key=value"),
        (["output_dir=/tmp"], "--output-dir"),
        (["optimiser.lr=1"], "did you mean `optimizer`?"),
        (["optimizer.lrr=1"], "did you mean `lr`?"),
        (["optimizer.lr=fast"], "optimizer.lr=fast"),
        (["optimizer=1"], "section"),
        (["batch_size=two"], "`batch_size`"),
        (["batch_size=2", "kd_loss.temperature=1e9"], "0.001 to 1000"),
        (["tokenizer.max_seq_len=long"], "tokenizer.max_seq_len"),
        (["lr_scheduler.num_warmup_steps=ten"], "lr_scheduler"),
        (["epochs=2"], "epochs"),
        (["teacher_cache=/tmp/x"], "--cached"),
        (["--cached", "cache.dtype=int8"], "cache.dtype"),
        (["max_minutes=3"], "--steps"),
        (["lr_scheduler={_component_: torch.optim.lr_scheduler.LinearLR}"], "lr_scheduler"),
        (["seed=${nope}"], "nope"),
        (["seed=[1"], "seed=[1"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_lost(tmp_path, capsys, ran, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    output = OutputFolder(tmp_path / "out")
    output.claim(overwrite=False)
    output.results.write_text("{}")
    output.finish()
    assert named in refused(capsys, ["--output-dir", "out", "--overwrite", *argv])
    assert output.results.read_text() == "{}"
    assert ran == []


@pytest.mark.parametrize(
    "argv",
    [
        ["--temperature", "0.001"],
        ["--temperature", "1000"],
        ["--cached", "--temperature", "1"],
        ["batch_size=1", "optimizer.lr=1.2e-3"],
        ["optimizer._component_=torch.optim.AdamW", "--strategy", "influence"],
        ["kd_loss._component_=torchtune_kd.losses.JSDLoss", "kd_loss.beta=0.3", "lr_scheduler=null"],
    ],
)
def test_values_that_can_be_pass(tmp_path, ran, argv):
    assert cli.main(["--output-dir", str(tmp_path / "out"), *argv]) == 0
    assert ran == [tmp_path / "out"]


@pytest.mark.parametrize("step", ["mkdir", "touch", "iterdir"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch, ran, step):
    (tmp_path / "out").mkdir()

    def failing(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cli.Path, step, failing)
        sentence = refused(capsys, ["--output-dir", str(tmp_path / "out")])
    assert str(tmp_path / "out") in sentence and "Permission denied" in sentence and "--output-dir" in sentence
    assert ran == []


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(args, output, deadline):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["--output-dir", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip().startswith("Interrupted: ")


def test_a_teacher_folder_of_another_model_is_refused(tmp_path, smollm2):
    assert teacher.checked(smollm2) == smollm2
    with pytest.raises(DemoError, match=r"has no config\.json"):
        teacher.checked(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    config = json.loads((smollm2 / "config.json").read_text()) | {"num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DemoError, match=r"num_hidden_layers is 30, but .* has 32"):
        teacher.checked(tmp_path)
    for broken in ("{ no JSON", "7"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(DemoError, match=r"config\.json, but it cannot be read"):
            teacher.checked(tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DemoError, match="Could not download nobody/nothing") as error:
        teacher.from_hub("nobody/nothing")
    assert "\n" not in str(error.value)

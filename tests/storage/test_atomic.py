"""Output folders: nothing is lost, whatever is asked for and whenever it stops."""

import os
from pathlib import Path

import pytest

from torchtune_kd.storage.atomic import complete_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "source"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("source")
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def _write(output: Path, source: Path, *, overwrite: bool = True) -> None:
    with complete_folder(output, source, overwrite=overwrite) as folder:
        (folder / "config.json").write_text("new")


def _content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("output", ["in/source", "in", ".", "in/other/..", "link", "linked_source"])
def test_what_holds_the_source_is_not_replaced(source: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "in" / "config.json").write_text("another checkpoint")
    (tmp_path / "config.json").write_text("and another")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "linked_source").mkdir()
    (tmp_path / "linked_source" / "config.json").write_text("with a link inside")
    link = tmp_path / "linked_source" / "source"
    link.symlink_to(source)
    before = _content(tmp_path)
    with pytest.raises(ValueError, match="does not hold the source"):
        _write(tmp_path / output, link if output == "linked_source" else source)
    assert _content(tmp_path) == before


def test_only_checkpoints_are_replaced(source: Path, old: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").touch()
    with pytest.raises(ValueError, match=r"notes holds other files and no config\.json"):
        _write(tmp_path / "notes", source)
    with pytest.raises(ValueError, match="already holds files; choose another one or pass overwrite=True"):
        _write(old, source, overwrite=False)
    with pytest.raises(ValueError, match=r"diary\.txt is a file"):
        _write(tmp_path / "notes" / "diary.txt", source)
    _write(old, source)
    assert _content(tmp_path / "notes") == ["diary.txt"]
    assert (old / "config.json").read_text() == "new"


@pytest.mark.parametrize("name", ["replaced", "new", "old"])
def test_any_name_will_do(source: Path, tmp_path: Path, name: str) -> None:
    for overwrite in (False, True):
        _write(tmp_path / name, source, overwrite=overwrite)
    assert _content(tmp_path / name) == ["config.json"]


def test_empty_folder_and_link_to_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    _write(tmp_path / "link", source, overwrite=False)
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "empty") == ["config.json"]


@pytest.mark.parametrize("output", [".", "..", "../working"])
def test_current_folder_stays_in_place(source: Path, tmp_path: Path, monkeypatch, output: str) -> None:
    (tmp_path / "out" / "working").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "working")
    with pytest.raises(ValueError, match="apart from the current one, but got /"):
        _write(Path(output), source)


def test_relative_output(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path("a/b"), source)
    assert _content(tmp_path / "a") == ["b", "b/config.json"]


@pytest.mark.parametrize("step", ["before the old one moves", "before the new one moves", "after both have moved"])
def test_interruption_keeps_the_old_folder_or_has_the_new_one(
    source: Path, old: Path, tmp_path: Path, monkeypatch, step: str
) -> None:
    def interrupted(path: Path, target: Path) -> None:
        is_old = path == old
        is_new = target == old and path.name == "new"
        if (step == "before the old one moves" and is_old) or (step == "before the new one moves" and is_new):
            raise KeyboardInterrupt
        os.rename(path, target)
        if step == "after both have moved" and is_new:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _write(old, source)
    assert (old / "config.json").read_text() == ("new" if step == "after both have moved" else "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "old"]


def test_old_folder_survives_where_it_cannot_be_moved_back(
    source: Path, old: Path, tmp_path: Path, monkeypatch
) -> None:
    def failing(path: Path, target: Path) -> None:
        if path != old:
            raise PermissionError("not allowed")
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        _write(old, source)
    assert [path.read_text() for path in tmp_path.glob(".old.*/old/config.json")] == ["old"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_follow_the_umask(source: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with complete_folder(tmp_path / "out", source) as folder:
            (folder / "original").mkdir()
            for file in (folder / "model.safetensors", folder / "original" / "tokenizer.model"):
                file.touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask

"""A folder that bears its name is whole, whenever the process died."""

import contextlib
import shutil
from pathlib import Path

import pytest

from torchtune_kd.checkpoints import folders
from torchtune_kd.storage import atomic


class Killed(BaseException):
    """The process is gone."""


def die_at(monkeypatch, number):
    """At the call of this number (from 0) of whatever changes names or deletes."""
    calls = iter(range(1000))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))


def write(folder, content):
    folder.mkdir()
    (folder / "one").write_text(content)
    (folder / "two").write_text(content)
    return folder


def content_of(folder):
    texts = {path.read_text() for path in folder.iterdir()}
    assert len(texts) == 1 and len(list(folder.iterdir())) == 2  # whole: nothing of another in it
    return texts.pop()


@pytest.mark.parametrize("number", range(6))
def test_replacing_leaves_the_old_or_the_new(tmp_path, monkeypatch, number):
    folder = write(tmp_path / "step_2", "old")
    written = write(atomic.partial(folder), "new")
    with monkeypatch.context() as patch:
        die_at(patch, number)
        try:
            atomic.publish(written, folder, [])
        except Killed:
            pass
        else:
            assert number >= 3  # two renames and a deletion
    folders.clean_up(tmp_path)
    assert content_of(folder) == ("old" if number < 2 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


@pytest.mark.parametrize("number", range(5))
def test_an_earlier_run_is_never_taken_for_this_one(tmp_path, monkeypatch, number):
    previous_run = [write(tmp_path / name, "earlier") for name in ("step_40", "epoch_0")]
    folder = tmp_path / "step_2"
    written = write(atomic.partial(folder), "new")
    with monkeypatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(Killed):
            atomic.publish(written, folder, previous_run)
    folders.clean_up(tmp_path)
    newest = folders.step_folders(tmp_path)
    if number == 0:  # nothing has happened yet
        assert [path.name for path in newest] == ["step_40"]
    else:
        assert [path.name for path in newest] == (["step_2"] if number > 2 else [])


@pytest.mark.parametrize("number", range(3))
def test_deleting_leaves_no_half_of_it_under_its_name(tmp_path, monkeypatch, number):
    folder = write(tmp_path / "step_2", "old")
    with monkeypatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(Killed):
            atomic.delete(folder)
    assert not folder.exists() or content_of(folder) == "old"
    folders.clean_up(tmp_path)
    assert not (tmp_path / "step_2.deleted").exists()


def test_what_is_no_run_folder_is_left_alone(tmp_path):
    names = ["step_2.txt", "notes.old", "my.partial", "step_2.damaged", "epoch_1"]
    for name in names:
        (tmp_path / name).mkdir()
    folders.clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert folders.step_folders(tmp_path) == []


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 100, 20):
        (tmp_path / f"step_{step}").mkdir()
    assert [path.name for path in folders.step_folders(tmp_path)] == ["step_100", "step_20", "step_9"]


@pytest.mark.parametrize("number", range(8))
def test_an_earlier_run_that_is_replaced_is_never_in_the_way(tmp_path, monkeypatch, number):
    """Whenever the first run that overwrites it dies, the second one does, too, and leaves nothing of it."""
    previous_run = [write(tmp_path / f"step_{step}", "old") for step in (2, 4)]
    written = write(atomic.partial(tmp_path / "step_1"), "new")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        die_at(patch, number)
        atomic.publish(written, tmp_path / "step_1", list(previous_run))
    folders.clean_up(tmp_path)
    left = [path for path in previous_run if path.exists()]
    if not (tmp_path / "step_1").exists():
        atomic.publish(write(atomic.partial(tmp_path / "step_1"), "new"), tmp_path / "step_1", left)
    folders.clean_up(tmp_path)
    assert content_of(tmp_path / "step_1") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_what_was_set_aside_goes_when_something_has_replaced_it(tmp_path):
    aside = write(tmp_path / "replaced_epoch_0", "old")
    folders.clean_up(tmp_path)
    assert content_of(aside) == "old"
    write(tmp_path / "step_2", "new")
    folders.clean_up(tmp_path)
    assert not aside.exists()


def test_a_folder_that_cannot_be_deleted_does_not_undo_the_new_one(tmp_path, monkeypatch):
    previous_run = [write(tmp_path / "step_2", "old")]
    written = write(atomic.partial(tmp_path / "step_4"), "new")

    def refuse(path, **_):
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"replaced_step_2 could not be deleted"):
        patch.setattr(shutil, "rmtree", refuse)
        atomic.publish(written, tmp_path / "step_4", previous_run)
    assert content_of(tmp_path / "step_4") == "new" and not previous_run

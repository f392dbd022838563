"""What counts as the same run: contents, not paths; and every difference by name."""

import pytest

from torchtune_kd.checkpoints.identity import dataset_fingerprint, differences
from torchtune_kd.config.sections import Section
from torchtune_kd.storage import fingerprints
from torchtune_kd.storage.fingerprints import files_fingerprint


@pytest.fixture
def small_limits(monkeypatch):
    """Files above 1000 bytes count as large: a block of 10 bytes every 100, and the last 10."""
    for name, value in (("WHOLE", 1000), ("STRIDE", 100), ("BLOCK", 10)):
        monkeypatch.setattr(fingerprints, name, value)


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_small_file_counts_by_every_byte_and_not_by_its_name(tmp_path):
    content = bytes(range(200))
    print_of = files_fingerprint([write(tmp_path / "a", content)])
    assert files_fingerprint([write(tmp_path / "b", content)]) == print_of
    for index in (0, 77, 199):
        changed = bytearray(content)
        changed[index] ^= 1
        assert files_fingerprint([write(tmp_path / "c", bytes(changed))]) != print_of


def test_a_large_file_counts_by_its_size_its_end_and_blocks_all_over(tmp_path, small_limits):
    content = bytes(5005)
    print_of = files_fingerprint([write(tmp_path / "a", content)])
    assert files_fingerprint([write(tmp_path / "b", content + b"\0")]) != print_of
    for index in (0, 9, 100, 4904, 5004):
        changed = bytearray(content)
        changed[index] = 1
        assert files_fingerprint([write(tmp_path / "c", bytes(changed))]) != print_of, index


def test_order_of_files_counts(tmp_path):
    one, two = write(tmp_path / "1", b"one"), write(tmp_path / "2", b"two")
    assert files_fingerprint([one, two]) != files_fingerprint([two, one])


def test_a_dataset_counts_by_its_rows_and_by_its_local_files(tmp_path):
    rows = [{"tokens": [i, i + 1], "labels": [i, i + 1]} for i in range(1000)]
    section = [Section("dataset", "some.dataset", {"data_files": str(write(tmp_path / "rows", b"rows"))})]
    print_of = dataset_fingerprint(section, rows)
    assert dataset_fingerprint(section, [*rows[:-1], rows[0]]) != print_of
    write(tmp_path / "rows", b"Rows")
    assert dataset_fingerprint(section, rows) != print_of


def test_differences_name_key_old_and_new():
    then = {"loss": {"kd_ratio": 0.5, "kd_loss.temperature": 2.0}, "teacher": {"weights of the teacher": "ab"}}
    now = {"loss": {"kd_ratio": 0.5, "kd_loss.beta": 0.1}, "teacher": {"weights of the teacher": "cd"}}
    assert differences(then, now) == [
        "weights of the teacher (ab then, cd now)",
        "`kd_loss.beta` (none then, 0.1 now)",
        "`kd_loss.temperature` (2.0 then, none now)",
    ]
    assert differences(then, then) == []
    assert differences(then, now, ("teacher",)) == ["weights of the teacher (ab then, cd now)"]

"""Hashes of files in pieces: one definition, whoever writes, and however many threads read."""

import hashlib
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.checkpoint import CheckpointError, hashing, load, manifest, save, verify
from forgather_fn.checkpoint.hashing import Hash, Written, hashed, hashes, joined, sha256
from tests.checkpoint.subjects import small, trajectory
from tests.toys import assert_equal


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 100)
    monkeypatch.setattr(hashing, "_BUFFER", 7)


def told(data):
    """The definition: of one piece its hash, of several the hash of their hashes."""
    pieces = [hashlib.sha256(data[start : start + 100]).digest() for start in range(0, len(data), 100)]
    if len(pieces) <= 1:
        return Written(len(data), hashlib.sha256(data).hexdigest())
    return Written(len(data), hashlib.sha256(b"".join(pieces)).hexdigest(), 100)


SIZES = (0, 1, 6, 7, 99, 100, 101, 199, 200, 201, 350)


@pytest.mark.parametrize("size", SIZES)
def test_who_writes_a_file_and_who_finds_it_agree(tmp_path, size):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    assert hashed(tmp_path / "file") == told(data)
    assert sha256(tmp_path / "file", told(data)) == told(data).sha256
    with ThreadPoolExecutor(3) as pool:
        assert joined(hashes(tmp_path / "file", told(data), pool.map)) == told(data).sha256


@given(cuts=st.lists(st.integers(0, 250), max_size=6), size=st.sampled_from(SIZES))
def test_in_which_parts_it_is_written_makes_no_difference(cuts, size):
    data = bytes(i % 251 for i in range(size))
    written, places = Hash(), sorted({0, size, *(cut for cut in cuts if cut < size)})
    for start, stop in itertools.pairwise(places):
        written.update(memoryview(data)[start:stop])
    assert attrs.evolve(written.written(), piece=None) == attrs.evolve(told(data), piece=None)
    assert (written.written().piece is None) == (size <= 100)


@pytest.mark.parametrize("size", [100, 101, 350])
@pytest.mark.parametrize("change", ["the first", "the last", "one more", "one less"])
def test_every_byte_counts(tmp_path, size, change):
    data = bytearray(i % 251 for i in range(size))
    expected = told(bytes(data))
    if change == "one more":
        data += b"0"
    elif change == "one less":
        del data[-1]
    else:
        data[0 if change == "the first" else -1] ^= 1
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file", expected) != expected.sha256


def test_two_pieces_that_change_places_are_noticed(tmp_path):
    (tmp_path / "file").write_bytes(b"a" * 100 + b"b" * 100)
    assert hashed(tmp_path / "file") != told(b"b" * 100 + b"a" * 100)


@pytest.fixture
def home(tmp_path):
    program = small()
    program.init(0)
    return save(program, trajectory()[3], tmp_path)


def test_a_checkpoint_of_pieces_is_whole(home):
    files = manifest.read(home).files
    assert all((written.piece == 100) == (written.size > 100) for written in files.values())
    assert files["model.safetensors"].piece == 100
    assert verify(home) == []
    program = small()
    assert_equal(program.restore(home), trajectory()[3])


@pytest.mark.parametrize("at", [0, 99, 100, -1])
def test_damage_in_any_piece_is_found(home, at):
    path = home / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert verify(home) == ["model.safetensors: its content was changed (sha256 differs)"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(home)


@pytest.mark.parametrize("read", [verify, load])
def test_pieces_are_hashed_side_by_side(home, read, monkeypatch):
    met, hash_one = threading.Barrier(2), hashing._hashed

    def meeting(path, start, length):
        if path.name == "model.safetensors" and start in (0, 100):
            met.wait(30)  # for the other piece, which another thread has begun
        return hash_one(path, start, length)

    monkeypatch.setattr(hashing, "_hashed", meeting)
    monkeypatch.setattr(hashing, "_cores", lambda: 2)
    assert manifest.read(home).files["model.safetensors"].size > 100
    read(home)


def rewritten(home, version, change):
    """Write a manifest as another library of its time would have."""
    record = json.loads((home / "manifest.json").read_bytes())
    record.pop("checksum")
    record["version"] = version
    for name, file in record["files"].items():
        change((home / name).read_bytes(), file)
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    (home / "manifest.json").write_text(json.dumps({**record, "checksum": hashlib.sha256(text).hexdigest()}))


def test_one_of_version_1_hashed_each_file_at_once_and_is_read(home):
    def whole(data, file):
        file.pop("piece", None)
        file["sha256"] = hashlib.sha256(data).hexdigest()

    rewritten(home, 1, whole)
    assert verify(home) == []
    assert_equal(small().restore(home), trajectory()[3])


@pytest.mark.parametrize("piece", [1, 0, -100, 101, 100.5, "all", [100], True])
def test_pieces_of_another_size_are_refused(home, piece):
    rewritten(home, 2, lambda data, file: file.update(piece=piece))
    with pytest.raises(
        CheckpointError, match=r"is not a manifest: ValueError: a file in pieces of .* bytes; expected 100"
    ):
        load(home)

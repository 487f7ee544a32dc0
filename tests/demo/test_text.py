"""The text: what of it is read, that its two parts never meet, and how it is cut into windows."""

import os
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import forgather_fn as ff
from forgather_fn.demo.text import is_held_out, labelled, read, split, windows

# Found by trying: one file name on each side.
TRAINED, HELD_OUT = "heapq.py", "gzip.py"


def folder(root: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def content(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def test_the_split_is_the_same_everywhere_and_forever():
    names = ["abc.py", "asyncio/events.py", "gzip.py", "hashlib.py", "heapq.py", "html/parser.py", "é.py", "a b/c.txt"]
    assert [name for name in names if is_held_out(name)] == ["asyncio/events.py", "gzip.py", "hashlib.py"]


def test_about_one_file_in_twenty_is_held_out():
    held = sum(is_held_out(f"package/module_{number}.py") for number in range(20_000))
    assert held == pytest.approx(1000, abs=100)  # three standard deviations


@given(
    st.dictionaries(st.text("abcdefg/.", min_size=1), st.binary(max_size=40), min_size=1, max_size=60),
    st.integers(2, 12),
)
def test_no_file_is_in_both_parts_and_nothing_is_lost(files, context):
    assume(sum(map(len, files.values())) >= 2 * context)
    training, held_out, how = split(files, context)
    assert min(len(training), len(held_out)) >= context
    if "hash" in how:
        assert training == b"".join(text for name, text in files.items() if not is_held_out(name))
        assert held_out == b"".join(text for name, text in files.items() if is_held_out(name))
    else:
        assert training + held_out == b"".join(files.values())
        assert len(training) % context == 0


def test_files_do_not_change_sides_when_others_come():
    one = {TRAINED: b"t" * 50, HELD_OUT: b"h" * 50}
    training, held_out, _ = split(one, 10)
    assert (training, held_out) == (b"t" * 50, b"h" * 50)
    more = one | {f"new_{number}.py": b"n" for number in range(100)}
    training, held_out, _ = split(more, 10)
    assert (training.count(b"t"), held_out.count(b"h")) == (50, 50)
    assert (training.count(b"h"), held_out.count(b"t")) == (0, 0)


@pytest.mark.parametrize(("size", "kept"), [(20, 10), (29, 10), (400, 380), (2000, 1900)])
def test_the_end_is_held_out_where_the_hash_leaves_a_part_empty(size, kept):
    text = bytes(byte % 251 for byte in range(size))
    training, held_out, how = split({TRAINED: text[:7], "z.py": text[7:]}, context=10)
    assert (training, held_out) == (text[:kept], text[kept:])
    assert how == f"the last {size - kept:,} bytes"


def test_a_folder_is_read_by_sorted_path_without_what_is_hidden_or_no_text(tmp_path):
    root = folder(
        tmp_path,
        b__y="second ",
        a="first ",
        c="third",
        b__site="not the library: ",
        **{"site-packages__kept": "kept ", ".hidden": "no", ".git__objects": "no", "b__image": b"\0no"},
    )
    text = read(root, context=4)
    assert content(text.training) + content(text.held_out) == b"first not the library: second thirdkept "
    assert f"{root}: 40 bytes of text (files: 5, left out as no text: 1); held out" in text.description


def test_the_folder_is_split_by_paths_relative_to_it(tmp_path):
    texts = [
        read(folder(tmp_path / name, **{TRAINED: "t" * 300, HELD_OUT: "h" * 40}), context=8) for name in ("one", "two")
    ]
    for text in texts:
        assert (content(text.training), content(text.held_out)) == (b"t" * 300, b"h" * 40)
    assert texts[0].digest == texts[1].digest
    assert texts[0].digest != read(folder(tmp_path / "two", **{HELD_OUT: "g" * 40}), context=8).digest


def test_a_file_is_split_by_its_place(tmp_path):
    path = folder(tmp_path, **{"book.txt": "x" * 95 + "y" * 5}) / "book.txt"
    text = read(path, context=5)
    assert (content(text.training), content(text.held_out)) == (b"x" * 95, b"y" * 5)


def test_the_library_is_read_without_what_was_installed(tmp_path, monkeypatch):
    folder(
        tmp_path,
        **{
            TRAINED: "t" * 60,
            "package__" + TRAINED: "u" * 60,
            HELD_OUT: "h" * 30,
            "notes.txt": "no",
            "lib.so": b"\0no",
        },
        **{"site-packages__x.py": "no", "package__dist-packages__x.py": "no"},
    )
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    text = read(None, context=8)
    assert (content(text.training), content(text.held_out)) == (b"t" * 60 + b"u" * 60, b"h" * 30)
    assert text.description.startswith("the standard library of Python 3.")


def test_this_library_is_long_enough():
    text = read(None, context=128)
    assert len(text.training) > 5e6
    assert 0.01 < len(text.held_out) / len(text.training) < 0.15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "cannot use '{path}': No such file or directory; expected a file of text, or a folder of such files"),
        ("empty_file", "{path}: 0 bytes of text (files: 1, left out as no text: 0); expected at least 32, a window of"),
        ("empty_folder", "{path}: 0 bytes of text (files: 0, left out as no text: 0); expected at least 32"),
        ("short", "{path}: 31 bytes of text (files: 1, left out as no text: 0); expected at least 32"),
        ("binary", "{path}: 0 bytes of text (files: 0, left out as no text: 1); expected at least 32"),
        ("pipe", "cannot use '{path}': Not a directory; expected a file of text, or a folder"),
    ],
)
def test_a_path_without_enough_text_is_refused_in_one_line(tmp_path, name, message):
    folder(tmp_path, empty_file="", short="x" * 31, binary=b"\0" * 1000)
    (tmp_path / "empty_folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(path=tmp_path / name))}") as error:
        read(tmp_path / name, context=16)
    assert "\n" not in str(error.value)


def test_special_files_and_broken_links_in_a_folder_are_not_waited_for(tmp_path):
    folder(tmp_path, text="x" * 40)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "40 bytes of text (files: 1," in read(tmp_path, context=16).description


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder(tmp_path, text="x" * 40, secret="x" * 40)

    def read_bytes(path: Path) -> bytes:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return b"x" * 40

    monkeypatch.setattr(Path, "read_bytes", read_bytes)  # root may read everything
    with pytest.raises(ValueError, match=r"cannot use '.*secret': Permission denied; expected a file that can be read"):
        read(tmp_path, context=16)


@given(text=st.binary(min_size=3, max_size=100), context=st.integers(2, 9))
def test_windows_are_the_text_one_after_the_other(text, context):
    cut = windows(tensor(text), context)
    assert len(cut) == len(text) // context
    assert b"".join(bytes(cut[i].tolist()) for i in range(len(cut))) == text[: len(cut) * context]


def test_several_windows_are_read_like_one(tmp_path):
    cut = windows(tensor(bytes(range(200))), 10)
    fetched = cut.__getitems__([3, 0, 19, 3])
    assert [sample.tolist() for sample in fetched] == [cut[i].tolist() for i in (3, 0, 19, 3)]
    assert {sample.dtype for sample in [*fetched, cut[0]]} == {torch.int64}


@pytest.mark.parametrize(
    ("count", "most", "chosen"), [(10, 4, [0, 3, 6, 9]), (10, 10, list(range(10))), (3, 512, [0, 1, 2])]
)
def test_the_windows_to_evaluate_with_are_spread_over_the_text(count, most, chosen):
    cut = windows(tensor(bytes(byte // 5 for byte in range(5 * count))), 5).spread(most)
    assert [int(cut[i][0]) for i in range(len(cut))] == chosen


def test_a_batch_is_its_own_label_for_a_loss_that_shifts():
    data = ff.batches(windows(tensor(bytes(range(60))), 6), batch_size=4, collate=labelled, order="sequential")
    batch = next(data.start(seed=0, samples=0)).data
    assert sorted(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].tolist() == [list(range(start, start + 6)) for start in (0, 6, 12, 18)]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert ff.losses.causal_lm.weight(batch) == 4 * 5

"""Files and tables, each in one line."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forgather_fn as ff
from forgather_fn.testing import check_data


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "train.bin"
    np.arange(1000, 1103, dtype=np.uint16).tofile(path)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_windows_of_a_file_of_tokens(tokens: Path, workers: int) -> None:
    windows = ff.data.memmap_tokens(tokens, length=10)
    assert len(windows) == 10
    stream = ff.batches(windows, batch_size=4, order="sequential", workers=workers)
    (batch,) = itertools.islice(stream.start(0, 0), 1)
    assert batch.data["input_ids"].tolist() == torch.arange(1000, 1040).reshape(4, 10).tolist()
    assert batch.data["labels"].dtype == torch.int64


def test_windows_obey_the_laws(tokens: Path) -> None:
    check_data(ff.batches(ff.data.memmap_tokens(tokens, length=8), batch_size=3))


def test_with_a_stride_every_token_is_predicted_once(tokens: Path) -> None:
    windows = ff.data.memmap_tokens(tokens, length=18, stride=17)
    predicted = [token for i in range(len(windows)) for token in windows[i]["labels"][1:].tolist()]
    assert predicted == list(range(1001, 1103))


def test_a_map_is_not_copied_and_goes_to_workers_as_its_path(tokens: Path) -> None:
    windows = ff.data.memmap_tokens(tokens, length=10)
    assert isinstance(windows._file.array, np.memmap)
    text = pickle.dumps(windows)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert torch.equal(again[3]["input_ids"], windows[3]["input_ids"])
    window = windows[0]["input_ids"]
    window[:] = 0  # a batch is the user's own
    assert windows[0]["input_ids"][0] == 1000


def test_lines_and_bytes_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, lines in {
        "one\ntwo\n\nvier \N{SNOWMAN}\n": ["one", "two", "", "vier \N{SNOWMAN}"],
        "no end": ["no end"],
        "a\r\nb": ["a", "b"],
        "\n": [""],
    }.items():
        path.write_bytes(content.encode())
        found = ff.data.text_lines(path)
        assert [found[i] for i in range(len(found))] == lines
    path.write_bytes(b"hello world!")
    windows = ff.data.text_bytes(path, length=5)
    assert [bytes(windows[i]["input_ids"].tolist()) for i in range(len(windows))] == [b"hello", b" worl"]


def test_lines_are_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(500)))
    lines = ff.data.text_lines(path)
    check_data(ff.batches(lines, batch_size=7, collate=list))
    (batch,) = itertools.islice(ff.batches(lines, batch_size=3, collate=list).start(1, 0), 1)
    assert batch.data == [f"line {i}" for i in batch.indices]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: ff.data.memmap_tokens(path, length=1000), "has 103 tokens: fewer than one window of 1000"),
        (lambda path: ff.data.memmap_tokens(path, length=0), "at least 1"),
        (lambda path: ff.data.memmap_tokens(path, length=2, stride=0), "at least 1"),
        (lambda path: ff.data.memmap_tokens(path, length=2, dtype="uint32"), "206 bytes: expected elements of uint32"),
        (lambda path: ff.data.memmap_tokens(path, length=2, dtype="float16"), "tokens are integers"),
        (lambda path: ff.data.text_lines(path, encoding="utf-16"), "does not end a line with the byte 10"),
    ],
)
def test_what_is_no_such_file_is_refused(tokens: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokens)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(ValueError, match="has 0 bytes"):
        ff.data.text_lines(path)
    with pytest.raises(FileNotFoundError):
        ff.data.text_lines(tmp_path / "none")


def test_a_frame_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"x": np.arange(6.0), "y": [1, 0, 1, 0, 1, 0], "z": [True, False] * 3, "text": list("abcdef")},
        index=[9, 8, 7, 6, 5, 4],
    )
    (batch,) = itertools.islice(ff.batches(frame, batch_size=4).start(0, 0), 1)
    for name, column in batch.data.items():
        values = column if isinstance(column, list) else column.tolist()
        assert values == frame[name].iloc[batch.indices].tolist()
    assert batch.data["x"].dtype == torch.float64
    check_data(ff.batches(frame, batch_size=4))
    rows = next(ff.batches(frame, batch_size=2, collate=list, order="sequential").start(0, 0)).data
    assert [row["text"] for row in rows] == ["a", "b"]
    mixed = ff.data.mixture({"frame": frame}, label="source")
    assert next(ff.batches(mixed, batch_size=2, order="sequential").start(0, 0)).data["source"].tolist() == [0, 0]


def test_a_frame_that_is_not_of_numbers_and_texts_is_refused() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="column 'when' of the dataset has dtype datetime64"):
        ff.batches(pandas.DataFrame({"when": pandas.to_datetime(["2020-01-01"])}), batch_size=1)
    with pytest.raises(ValueError, match="two columns of the DataFrame have one name"):
        ff.batches(pandas.DataFrame([[1, 2]], columns=["a", "a"]), batch_size=1)


def test_a_dataset_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"input_ids": [[i, i + 1] for i in range(7)], "label": list(range(7)), "text": [str(i) for i in range(7)]}
    )
    (batch,) = itertools.islice(ff.batches(table, batch_size=4).start(0, 0), 1)
    assert torch.equal(batch.data["input_ids"][:, 1], batch.data["label"] + 1)
    assert batch.data["label"].tolist() == batch.indices.tolist() == [int(text) for text in batch.data["text"]]
    check_data(ff.batches(table, batch_size=3))
    rows = next(ff.batches(table, batch_size=2, collate=list, order="sequential").start(0, 0)).data
    assert rows[1] == {"input_ids": [1, 2], "label": 1, "text": "1"}
    formatted = next(ff.batches(table.with_format("numpy"), batch_size=2).start(0, 0)).data
    assert formatted["input_ids"].shape == (2, 2)
    packed = ff.data.packed(table, length=4)
    assert packed[0]["input_ids"].tolist() == [0, 1, 1, 2]


def test_ragged_columns_are_refused_with_the_fix() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]]})
    with pytest.raises(ValueError, match=r"'input_ids' has values of shapes \[\(1,\), \(2,\)\].*ff\.data\.packed"):
        next(ff.batches(table, batch_size=2).start(0, 0))

"""What processes of a run say to each other, where one of them says anything."""

import pytest
import torch
from hypothesis import strategies as st

import forgather_fn as ff
from forgather.ml import TrainingArguments
from forgather.ml.distributed import from_launcher
from forgather_fn.distributed.launched import check_world_size
from forgather_fn.distributed.words import LINE_LIMIT, Begun, Failed, Left, cause_of, decoded, encoded
from forgather_fn.strategy.processes import launched_on
from tests.robustness.inputs import as_bytes, budget, changed, holds, mutated, values

LINES = [encoded(Left(3)), encoded(Begun(3, "a save")), encoded(Failed("rank 1 failed: ValueError: no\n  File 'x'"))]


@budget(100)
def test_a_line_is_a_word_or_refused(examples):
    def check(line):
        try:
            word = decoded(line)
        except ValueError as error:
            text = str(error)
        else:
            assert decoded(encoded(word)) == word
            return
        assert "expected a word of a process" in text
        assert len(text) < 1000

    records = changed({"Left": {"begun": 3}}) | changed({"Failed": {"cause": "x"}}) | values
    holds(check, records.map(as_bytes) | st.sampled_from(LINES).flatmap(mutated), examples)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"",
        b"\xff",
        b"9" * 5000,
        b'{"Left": {"begun": true}}',
        b'{"Left": {"begun": -1}}',
        b'{"Left": {"begun": 1.5}}',
        b'{"Begun": {"number": true, "what": "a save"}}',
        b'{"Begun": {"number": 1, "what": 2}}',
    ],
    ids=range(9),
)
def test_a_line_that_is_none(line):
    with pytest.raises(ValueError, match="expected a word of a process, of what it begins or how it ends, got"):
        decoded(line)


@pytest.mark.parametrize("text", ["x" * 10**6, "\U0001f600" * 10**5, "\ud800" * 10**5], ids=range(3))
def test_an_error_of_any_length_is_a_word(text):
    line = encoded(Failed(cause_of(ValueError(text), 3)))
    assert len(line) < LINE_LIMIT
    assert decoded(line).cause.startswith("rank 3 failed: ValueError: ")


@pytest.mark.parametrize("size", ["x", "-1", "0", "1.5", "9" * 5000, "٢"], ids=range(6))
def test_a_size_of_a_world_that_is_none(size):
    with pytest.raises(ValueError, match=r"WORLD_SIZE=.* expected a number of processes"):
        check_world_size({"WORLD_SIZE": size}, 1)


@pytest.mark.parametrize("rank", ["x", "-1", "", "1.5", "9" * 5000], ids=range(5))
def test_a_rank_that_is_none(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match=r"RANK=.* expected the number of this process"), ff.serve():
        pass


NO_NUMBERS = ["x", "-1", "", "1.5", "9" * 5000, "\u0662", " 1", "1_0"]


@pytest.mark.parametrize("given", NO_NUMBERS, ids=range(8))
@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_what_a_launcher_says_that_is_no_number(monkeypatch, variable, given):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(variable, given)
    with pytest.raises(ValueError, match=rf"{variable}=.* in the environment: expected") as caught:
        launched_on(torch.device("cpu"))
    assert len(str(caught.value)) < 300
    looks = {"RANK": "process_index", "LOCAL_RANK": "local_process_index", "WORLD_SIZE": "world_size"}
    monkeypatch.setenv(variable, "1")
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    monkeypatch.setenv(variable, given)
    with pytest.raises(ValueError, match=rf"{variable}=.* in the environment: expected"):
        getattr(arguments, looks[variable])
    with pytest.raises(ValueError, match=rf"{variable}=.* is no number"):
        from_launcher("cpu")

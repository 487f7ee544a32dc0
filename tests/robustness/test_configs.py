"""Configurations, their records, and what is set by the command line, of any content: an answer, or a ConfigError."""

import contextlib
import errno
import io
import json
import os
import time

import attrs
import pytest
from hypothesis import strategies as st

from forgather_fn.cli import main
from forgather_fn.config import ConfigError
from forgather_fn.config import record as records
from forgather_fn.config.arguments import arguments, differences
from forgather_fn.config.dump import dump
from forgather_fn.config.dynamic import declared
from forgather_fn.config.load import again, load
from tests.robustness.inputs import as_bytes, budget, changed, holds, mutated, texts, values

TEXT = """\
-- set peak = 1e-3
dynamic_args:
  steps: {type: int, default: 3, help: "how long", argument: main.steps}
  lr: {names: ["--lr"], type: float}
.shared: &shared !call:dict {a: [1, 2.5, ~, true, "x"], b: !tuple [1, {c: d}]}
main: !call:dict
  lr: {{ peak }}
  steps: !var {name: steps, default: 7}
  both: [*shared, *shared]
  made: !partial:forgather_fn:adamw {weight_decay: 0.1}
  more: {<<: {x: 1}, y: 2}
"""


@budget(10)
def test_a_configuration_is_loaded_or_refused(tmp_path, examples):
    path = tmp_path / "mine.yaml"

    def check(one):
        data, settings = one
        path.write_bytes(data)
        start = time.process_time()
        with contextlib.suppress(ConfigError):
            found = load(str(path), settings)
            declared(found.graph)
            dump(found.graph)
            for target in found.graph.targets:
                arguments(found.graph, target)
                with contextlib.suppress(ConfigError):
                    found.build(target, [])
        assert time.process_time() - start < 5

    settings = st.dictionaries(
        st.sampled_from(["steps", "main.lr", "main.both[0].a[1]", "main", "x.y", "[0]", "main..a"]) | texts,
        texts,
        max_size=2,
    )
    holds(check, st.tuples(mutated(TEXT.encode()) | st.just(TEXT.encode()), settings), examples)


@budget(10)
def test_a_command_line_is_heeded_or_refused(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(TEXT)
    words = st.sampled_from(
        [
            "pp",
            "graph",
            "targets",
            "code",
            "construct",
            "trefs",
            "ls",
            "-t",
            "mine.yaml",
            "--set",
            "main.lr=2",
            "steps=1",
            "--lr",
            "--steps",
            "x",
            "1",
            "--target",
            "main",
            "--format",
            "yaml",
            "--allow",
            "os:system",
            "-p",
            ".",
            "nowhere",
            "--help",
            "\ud800",
            "\0",
            "a=\0",
        ]
    )

    def check(arguments):
        with (
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            try:
                code = main(arguments)
            except SystemExit as error:
                code = error.code
        assert code in (0, 1, 2)

    first = st.sampled_from(["pp", "graph", "targets", "code", "construct", "trefs", "ls"])
    holds(
        check,
        st.builds(lambda one, rest: [one, "-t", "mine.yaml", *rest], first, st.lists(words, max_size=4))
        | st.lists(words, max_size=5),
        examples,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    (place / "mine.yaml").write_text(TEXT)
    return records.write(place / "run", load(str(place / "mine.yaml")).record("main", ["forgather", "train"])).parent


@budget(8)
def test_a_record_is_read_or_refused(run, tmp_path, examples):
    original = (run / records.NAME).read_bytes()
    record = json.loads(original)

    def check(data):
        path = tmp_path / records.NAME
        path.write_bytes(data)
        with contextlib.suppress(ConfigError):
            found = records.read(tmp_path)
            with contextlib.suppress(ConfigError):
                again(found, {}, "out")
            differences(found.arguments, found.arguments)
        with (
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            parts = ("summary", "arguments", "rendered", "graph", "templates", "command")
            shows = [["config", "show", str(tmp_path), "--part", part] for part in parts]
            for arguments in (
                *shows,
                ["config", "diff", str(tmp_path), str(run)],
                ["config", "diff", str(tmp_path)],
                ["runs", str(tmp_path)],
            ):
                assert main(arguments) in (0, 1, 2)

    holds(check, changed(record).map(as_bytes) | values.map(as_bytes) | mutated(original), examples)


class TestWhatWasFound:
    """Each of these once ended in an error of Python's own, or in a file that was lost."""

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("config", None),
            ("target", 3),
            ("rendered", []),
            ("graph", None),
            ("overrides", {"main.lr": 3}),
            ("templates", ["x"]),
            ("variables", []),
            ("arguments", {"main": [1]}),
            ("git", {}),
            ("git", "clean"),
            ("command", [None]),
            ("versions", {"torch": 2}),
            ("redacted", "no"),
        ],
        ids=range(13),
    )
    def test_a_field_of_a_record(self, run, tmp_path, capsys, field, value):
        record = json.loads((run / records.NAME).read_bytes())
        (tmp_path / records.NAME).write_bytes(as_bytes({**record, field: value}))
        with pytest.raises(ConfigError, match=f"not a record of a run: {field} cannot be"):
            records.read(tmp_path)
        assert main(["config", "diff", str(tmp_path)]) == 2

    @pytest.mark.timeout(20)
    def test_a_pipe_in_place_of_a_record(self, tmp_path):
        os.mkfifo(tmp_path / records.NAME)
        with pytest.raises(ConfigError, match=r"cannot read .*: it is no file"):
            records.read(tmp_path)

    def test_a_record_that_is_no_text_is_kept_beside_the_new_one(self, run, tmp_path):
        (tmp_path / records.NAME).write_bytes(b"\xff\xfe")
        records.write(tmp_path, records.read(run))
        assert (tmp_path / "record-1.json").read_bytes() == b"\xff\xfe"
        assert records.read(tmp_path) == records.read(run)

    def test_no_earlier_record_is_written_over(self, run, tmp_path):
        (tmp_path / "record-2.json").write_text("mine")
        for number in range(3):
            (tmp_path / records.NAME).write_text(str(number))
            records.write(tmp_path, records.read(run))
        kept = {path.name: path.read_text() for path in tmp_path.glob("record-*.json")}
        assert kept == {"record-1.json": "0", "record-2.json": "mine", "record-3.json": "1", "record-4.json": "2"}

    def test_a_link_in_place_of_the_new_record_is_not_written_through(self, run, tmp_path):
        (tmp_path / "thesis").write_text("years of work")
        (tmp_path / ".record.json.tmp").symlink_to(tmp_path / "thesis")
        records.write(tmp_path, records.read(run))
        assert (tmp_path / "thesis").read_text() == "years of work"
        assert not (tmp_path / records.NAME).is_symlink()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
    def test_a_disk_that_refuses_leaves_the_record_as_it_was(self, run, tmp_path, monkeypatch, number):
        record = records.read(run)
        records.write(tmp_path, record)
        before, real = (tmp_path / records.NAME).read_bytes(), os.open

        def refusing(path, flags, *rest):
            if flags & os.O_CREAT:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", refusing)
        with pytest.raises(ConfigError, match=rf"cannot write .*record\.json: {os.strerror(number)}"):
            records.write(tmp_path, attrs.evolve(record, command=["another"]))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {records.NAME: before}

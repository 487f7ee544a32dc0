"""What is in a checkpoint, field by field, and that nothing else is believed."""

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import forgather_fn.checkpoint
from forgather_fn import tree
from forgather_fn.checkpoint import CheckpointError, load, save, verify
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint import snapshot as snapshots
from forgather_fn.checkpoint.hashing import Written
from forgather_fn.checkpoint.header import fault
from forgather_fn.checkpoint.manifest import Manifest, dump, parse
from forgather_fn.checkpoint.record import decode, encode
from forgather_fn.checkpoint.safe import DTYPES, write_file, write_tensors
from tests.checkpoint.subjects import small, trajectory
from tests.specimens import mlp
from tests.toys import assert_equal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program():
    made = small()
    made.init(0)
    return made


@pytest.fixture
def home(program, tmp_path):
    return save(program, trajectory()[3], tmp_path)


class TestFiles:
    def test_weights_and_persistent_buffers_lie_under_their_own_names(self, home):
        state, module = trajectory()[3], small().plan.model()
        held = load_file(home / "model.safetensors")
        assert set(held) == set(module.state_dict())
        expected = {**state.params, **state.buffers}
        assert tree.difference(held, {name: expected[name] for name in held}) is None

    def test_the_rest_lies_beside_them(self, home):
        state = trajectory()[3]
        names = ["buffers", "ema", "manifest.json", "model", "optimizer", "state.json"]
        assert sorted(path.name.removesuffix(".safetensors") for path in home.iterdir()) == names
        assert tree.difference(load_file(home / "buffers.safetensors"), {"seen": state.buffers["seen"]}) is None
        assert tree.difference(load_file(home / "ema.safetensors"), dict(state.ema)) is None
        momentum = {f"opt/momentum/{name}": tensor for name, tensor in state.opt["momentum"].items()}
        assert tree.difference(load_file(home / "optimizer.safetensors"), momentum) is None

    def test_what_a_state_does_not_have_has_no_file(self, tmp_path):
        program = small(model=mlp, optimizer=small().plan.optimizer, average=None)
        home = save(program, program.init(0), tmp_path)
        assert {path.stem for path in home.iterdir()} == {"model", "optimizer", "manifest", "state"}

    def test_the_state_file(self, home):
        record = json.loads((home / "state.json").read_bytes())
        state = trajectory()[3]
        assert set(record) == {
            *("version", "step", "samples", "seed", "data", "batch_size", "cursor", "counters", "structure"),
            *("buffers", "ema", "plan", "stream", "versions", "world", "metrics"),
        }
        assert (record["version"], record["step"], record["samples"], record["seed"]) == (1, 3, 12, 0)
        assert record["counters"] == {"updates": 3, "skipped": 0, "tokens": int(state.tokens), "nonfinite": -1}
        assert record["plan"] == small().plan.describe()
        assert record["versions"]["torch"] == torch.__version__
        assert set(record["structure"]) == {"opt", "transforms", "controls", "loss_scale"}

    def test_the_manifest(self, home):
        record = json.loads((home / "manifest.json").read_bytes())
        assert set(record) == {
            *("format", "version", "step", "samples", "order", "run", "attempt", "time", "files", "metrics", "pinned"),
            "checksum",
        }
        assert (record["format"], record["version"], record["step"]) == ("forgather-fn checkpoint", 2, 3)
        data = (home / "model.safetensors").read_bytes()
        assert record["files"]["model.safetensors"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def test_nothing_is_pickled(self, home):
        for path in home.iterdir():
            data = path.read_bytes()
            assert path.suffix in (".json", ".safetensors")
            assert not data.startswith((b"\x80", b"PK"))

    def test_nothing_is_unpickled(self):
        package = Path(forgather_fn.checkpoint.__file__).parent
        for path in package.glob("*.py"):
            source = ast.parse(path.read_text())
            imported = [
                name.name
                for node in ast.walk(source)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names
            ]
            called = {ast.unparse(node.func) for node in ast.walk(source) if isinstance(node, ast.Call)}
            assert not {"pickle", "marshal", "shelve", "dill"} & set(imported), path
            assert not {"torch.load", "torch.save", "eval", "exec"} & called, path


class TestShards:
    def test_are_cut_below_the_limit_with_an_index(self, tmp_path, monkeypatch):
        program = small(model=mlp)
        monkeypatch.setattr(snapshots, "SHARD_BYTES", 150)
        state = program.init(0)
        home = save(program, state, tmp_path)
        index = json.loads((home / "model.safetensors.index.json").read_bytes())
        files = sorted(path.name for path in home.glob("model-*.safetensors"))
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 1
        assert not (home / "model.safetensors").exists()
        held = {name: load_file(home / file)[name] for name, file in index["weight_map"].items()}
        assert tree.difference(held, dict(state.params)) is None
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.params.values())
        for name in files:
            tensors = load_file(home / name)
            assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 150
        assert_equal(program.restore(tmp_path), state)
        assert verify(home) == []

    def test_an_index_is_checked_as_any_file(self, tmp_path, monkeypatch):
        program = small(model=mlp)
        monkeypatch.setattr(snapshots, "SHARD_BYTES", 150)
        home = save(program, program.init(0), tmp_path)
        index = home / "model.safetensors.index.json"
        index.write_bytes(index.read_bytes().replace(b"00001", b"00002"))
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json.*changed"):
            load(home)


def numbers(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    """Draw tensors of a data type, of any bits, shape and stride."""

    def filled(shape, seed, order):
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
        return raw.view(dtype).reshape(shape).permute(sorted(range(len(shape)), key=lambda i: order[i]))

    shapes = st.lists(st.integers(0, 4), max_size=4)
    return st.builds(filled, shapes, st.integers(0, 99), st.permutations(range(4)))


class TestTensors:
    @given(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
                lambda name: name != "__metadata__"
            ),
            st.one_of([numbers(dtype) for dtype in DTYPES]),
            max_size=5,
        )
    )
    def test_come_back_to_the_bit_through_the_library(self, tmp_path_factory, tensors):
        path = tmp_path_factory.mktemp("safe") / "t.safetensors"
        written = write_tensors(path, tensors)
        assert tree.difference(load_file(path), {name: tensors[name] for name in load_file(path)}) is None
        assert set(load_file(path)) == set(tensors)
        data = path.read_bytes()
        assert written == Written(len(data), hashlib.sha256(data).hexdigest())
        assert fault(path) is None

    def test_are_aligned_to_their_items(self, tmp_path):
        tensors = {f"{i}": torch.zeros(3, dtype=dtype) for i, dtype in enumerate(DTYPES)}
        write_tensors(tmp_path / "t", tensors)
        data = (tmp_path / "t").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert (8 + length) % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}  # what transformers asks for
        for name, entry in header.items():
            assert (8 + length + entry["data_offsets"][0]) % tensors[name].element_size() == 0

    def test_of_other_types_are_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"wave: safetensors has no data type torch\.complex128"):
            write_tensors(tmp_path / "t", {"wave": torch.zeros(2, dtype=torch.complex128)})

    def test_large_ones_are_written_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr("forgather_fn.checkpoint.system.CHUNK", 7)
        tensor = torch.arange(100)
        write_tensors(tmp_path / "t", {"a": tensor})
        assert torch.equal(load_file(tmp_path / "t")["a"], tensor)

    def test_a_file_that_exists_is_not_written_to(self, tmp_path):
        (tmp_path / "t").write_text("mine")
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "t", iter([memoryview(b"x")]))
        assert (tmp_path / "t").read_text() == "mine"


METRICS = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=True), max_size=3)
SIZES = st.dictionaries(
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8), st.integers(0, 2**50), max_size=3
)


def manifest(**changes) -> Manifest:
    plain = {"step": 3, "samples": 12, "order": 1, "run": "a", "attempt": "b", "time": 1.5}
    return Manifest(**(plain | {"files": {"state.json": Written(2, "00")}} | changes))


def changed(**fields) -> bytes:
    """Write a manifest with other fields and a checksum that fits: by one who knows the format."""
    record = {**json.loads(dump(manifest())), **fields}
    record = {name: value for name, value in record.items() if value is not KeyError}
    record.pop("checksum", None)
    return json.dumps({**record, "checksum": manifests._checksum(record)}).encode()


class TestTheManifest:
    @given(st.integers(0, 2**60), METRICS, SIZES, st.booleans(), st.floats(0, 1e12))
    def test_comes_back_as_it_was(self, step, metrics, sizes, pinned, time):
        files = {name: Written(size, "0f") for name, size in sizes.items()}
        written = manifest(step=step, metrics=metrics, files=files, pinned=pinned, time=time)
        found = parse(dump(written), "here")
        assert tree.difference(dict(found.metrics), metrics) is None
        assert (found.step, found.files, found.pinned, found.time) == (step, files, pinned, time)

    def test_no_bit_of_it_can_change_unseen(self):
        text = dump(manifest(metrics={"loss": 0.25, "worst": math.inf}, pinned=True))
        expected = parse(text, "here")
        for byte in range(len(text)):
            for bit in range(8):
                flipped = bytearray(text)
                flipped[byte] ^= 1 << bit
                try:
                    found = parse(bytes(flipped), "here")
                except CheckpointError:
                    continue
                assert found == expected, (byte, bit)

    @pytest.mark.parametrize("version", [3, 7, 10**30])
    def test_of_a_newer_version_is_refused(self, version):
        with pytest.raises(
            CheckpointError,
            match=rf"here: written in version {version} of the format; this library reads up to 2\. Use a newer",
        ):
            parse(json.dumps({"format": manifests.FORMAT, "version": version, "other": 1}).encode(), "here")

    @pytest.mark.parametrize(
        "name",
        ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "\ud800", "sub/../x"],
    )
    def test_whose_files_are_elsewhere_is_refused(self, name):
        with pytest.raises(CheckpointError, match="not the name of a file in its directory"):
            parse(changed(files={name: {"size": 1, "sha256": "00"}}), "here")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\0" * 100,
            b"{",
            b"[]",
            b"null",
            b"3",
            b'"forgather-fn checkpoint"',
            b"\xff\xfe\x00",
            b"[" * 100_000,
            b'{"format": ' * 10_000,
            b'{"format": "forgather-fn checkpoint", "version": "1"}',
            b'{"format": "forgather-fn checkpoint", "version": null}',
            b'{"format": "forgather-fn checkpoint", "version": 1}',
            b'{"format": "other", "version": 1}',
            b'{"a": ' + b"9" * 5000 + b"}",
        ],
    )
    def test_that_is_none_is_refused(self, text):
        with pytest.raises(CheckpointError, match=r"^here"):
            parse(text, "here")

    @pytest.mark.parametrize(
        "fields",
        [
            {"step": "three"},
            {"step": None},
            {"step": KeyError},
            {"step": math.inf},
            {"order": math.nan},
            {"samples": []},
            {"files": []},
            {"files": None},
            {"files": {"a": 3}},
            {"files": {"a": {"size": 1}}},
            {"files": {"a": {"size": "big", "sha256": "0"}}},
            {"files": {"a": {"size": math.inf, "sha256": "0"}}},
            {"metrics": [1]},
            {"metrics": {"loss": "low"}},
            {"metrics": {"loss": None}},
            {"time": "now"},
            {"run": KeyError},
        ],
        ids=str,
    )
    def test_of_wrong_types_is_refused(self, fields):
        with pytest.raises(CheckpointError, match="here is not a manifest"):
            parse(changed(**fields), "here")

    def test_that_is_too_large_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(manifests, "LIMIT", 1000)
        (tmp_path / "manifest.json").write_bytes(b" " * 1001)
        with pytest.raises(CheckpointError, match="larger than a manifest can be"):
            manifests.read(tmp_path)

    @pytest.mark.parametrize("kind", ["directory", "pipe"])
    def test_that_names_what_is_no_file(self, tmp_path, kind):
        if kind == "directory":
            (tmp_path / "state.json").mkdir()
        else:
            import os

            os.mkfifo(tmp_path / "state.json")
        (tmp_path / "manifest.json").write_bytes(dump(manifest()))
        assert verify(tmp_path) == ["state.json is not a file"]
        with pytest.raises(CheckpointError, match="is not a file"):
            load(tmp_path)


def test_a_newer_version_of_the_state_file_is_refused(home):
    path = home / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    record = json.loads((home / "manifest.json").read_bytes())
    data = path.read_bytes()
    record["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (home / "manifest.json").write_bytes(changed(**record))
    with pytest.raises(CheckpointError, match=r"state\.json is of version 2; this library reads up to 1"):
        load(home)


def kept(value):
    """Describe a tree, and give the description after a way through JSON, with its tensors."""
    tensors = {}
    structure = encode(value, "x", lambda path, tensor: tensors.update({path: tensor}))
    return json.loads(json.dumps(structure)), tensors


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(max_size=5),
    numbers(torch.float32),
    numbers(torch.int64),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=8,
)


def kinds(value):
    """Give the kinds of the containers of a tree."""
    if isinstance(value, Mapping):
        return {name: kinds(child) for name, child in value.items()}
    return [type(value), *map(kinds, value)] if isinstance(value, tuple | list) else None


class TestTrees:
    @given(TREES)
    def test_come_back_as_they_were(self, value):
        structure, tensors = kept(value)
        found = decode(structure, tensors, None, CPU, "x")
        assert tree.difference(value, found) is None
        assert kinds(value) == kinds(found)

    @given(TREES)
    def test_come_back_into_what_is_expected(self, value):
        structure, tensors = kept(value)
        found = decode(structure, tensors, value, CPU, "x")
        assert tree.difference(value, found) is None
        assert kinds(value) == kinds(found)

    def test_tensors_have_memory_of_their_own(self):
        value = {"a": torch.ones(2)}
        structure, tensors = kept(value)
        decode(structure, tensors, None, CPU, "x")["a"].zero_()
        assert torch.equal(tensors["x/a"], torch.ones(2))

    def test_a_number_of_numpy_is_a_number(self):
        structure, tensors = kept({"lr": np.float64(0.1)})
        assert decode(structure, tensors, None, CPU, "x") == {"lr": 0.1}

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"f": abs}, "x/f: a checkpoint holds tensors, .* got builtin_function_or_method"),
            ([{1, 2}], "x/0: a checkpoint holds tensors, .* got set"),
            ({"d": {3: 1.0}}, "x/d: a checkpoint holds mappings whose keys are strings; got 3"),
            ({"a": np.zeros(2)}, "x/a: .* got ndarray"),
        ],
    )
    def test_what_would_not_come_back_is_refused(self, value, message):
        with pytest.raises(ValueError, match=message):
            kept(value)

    @pytest.mark.parametrize(
        ("like", "message"),
        [
            ({"a": torch.zeros(3)}, r"x/a: expected \(3,\) torch.float32, the checkpoint has \(2,\) torch.float32"),
            (
                {"a": torch.zeros(2, dtype=torch.int64)},
                r"x/a: expected \(2,\) torch.int64, the checkpoint has \(2,\) torch.float32",
            ),
            ({"a": torch.zeros(2), "b": 1}, r"x: the checkpoint lacks \['b'\]"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_both_sides(self, like, message):
        structure, tensors = kept({"a": torch.ones(2)})
        with pytest.raises(CheckpointError, match=message):
            decode(structure, tensors, like, CPU, "x")

    @pytest.mark.parametrize("structure", [{}, {"tensor": "gone"}, {"mapping": 3}, [], 3, None, {"sequence": {"a": 1}}])
    def test_what_cannot_be_read_is_refused(self, structure):
        with pytest.raises(CheckpointError, match="x: its description cannot be read"):
            decode(structure, {}, None, CPU, "x")

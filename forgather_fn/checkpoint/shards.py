"""Checkpoints of a state that no process has whole: each writes its portion, the first one commits.

    each process describes its portion, and the first one puts the descriptions together
    the first makes a temporary directory, each writes its files into it, the first seals it      <- the commit

What is written is what one process with all of the state would write, in other files: weights with Hugging Face's
index, and everything else under the names that it has there. So any number of processes can go on from it.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from forgather_fn.checkpoint import system
from forgather_fn.checkpoint.commit import Session, check_space, seal, staged
from forgather_fn.checkpoint.loading import Loaded
from forgather_fn.checkpoint.safe import write_file, write_tensors
from forgather_fn.checkpoint.snapshot import STATE, Memory, Snapshot, snapshot
from forgather_fn.portion import Portion
from forgather_fn.program import Program
from forgather_fn.state import TrainState

INDEX: Final = "model.safetensors.index.json"


@attrs.frozen(eq=False)
class Told:
    """What a process tells the first one of its portion.

    Attributes:
        structure: Of the trees of its state.
        rows: Of tensors that have a row for each parameter, the rows, by path and parameter.
        places: In which file each weight is.
        size: Of the weights, in bytes.
    """

    structure: Any
    rows: Mapping[str, Mapping[str, Tensor]]
    places: Mapping[str, str]
    size: int


def commit_portions(
    session: Session | None,
    state: TrainState,
    program: Program,
    portion: Portion,
    *,
    data: Any = None,
    metrics: Mapping[str, float] | None = None,
    pinned: bool = False,
) -> Path:
    """Write a checkpoint of which every process has a portion; collective.

    Args:
        session: Of the first process, which holds the run's lock; None on the others.
        state: This process's.
        program: Whose state it is.
        portion: Which portion it is.
        data: What the run is trained on.
        metrics: Results known at this step.
        pinned: Whether rotation must leave it.

    Returns:
        The directory.

    Raises:
        OSError: It could not be written; what was there before is as it was.
        PeerError: That, or anything else, happened on another process.
    """
    world = program.world
    taken: list[Snapshot] = []

    def describe() -> Told:
        whole, copy = snapshot(state, program, data, metrics or {}, Memory())
        copy()
        shard, told = _sharded(whole, portion)
        taken.append(shard)
        return told

    told = [one for one in world.each(describe) if one.places or one.rows]
    temporary: list[Path] = []

    def stage() -> str:
        assert session is not None
        temporary.append(staged(session, state.step))
        return str(temporary[0])

    directory = Path(world.first(stage))

    def write() -> None:
        shard = _whole_record(taken[0], told, portion) if world.main else taken[0]
        check_space(directory, shard)
        for name, tensors in shard.tensors.items():
            write_tensors(directory / name, tensors)
        for name, text in shard.texts.items():
            write_file(directory / name, iter([memoryview(text)]))

    def commit() -> str:
        assert session is not None
        return str(seal(session, directory, step=state.step, samples=state.samples, metrics=metrics, pinned=pinned))

    try:
        world.each(write)
        return Path(world.first(commit))
    except BaseException:
        for path in temporary:
            with contextlib.suppress(OSError):
                system.remove_tree(path)
        raise


def _sharded(whole: Snapshot, portion: Portion) -> tuple[Snapshot, Told]:
    """Take out of what a process has what it writes, and tell of it."""
    record = json.loads(whole.texts[STATE])
    optimizer = next((held for name, held in whole.tensors.items() if name.startswith("optimizer")), {})
    paths = _row_paths(record["structure"]["opt"], optimizer, portion)
    rows = {
        path: {name: row for name, row in zip(names, optimizer[path], strict=True) if name in portion.named}
        for path, names in paths.items()
    }
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, held in whole.tensors.items():
        group = file.split(".")[0].split("-")[0]
        kept = {name: tensor for name, tensor in held.items() if name not in paths and _written(group, name, portion)}
        if kept and portion.writes:
            tensors.setdefault(_shard_name(group, portion), {}).update(kept)
    weights = tensors.get(_shard_name("model", portion), {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    places = dict.fromkeys(weights, _shard_name("model", portion))
    told = Told(record["structure"], rows if portion.writes else {}, places, size)
    texts = whole.texts if portion.number == 0 and portion.writes else {}
    return attrs.evolve(whole, tensors=tensors, texts=texts), told


def _shard_name(group: str, portion: Portion) -> str:
    return f"{group}-{portion.number + 1:05}-of-{portion.count:05}.safetensors"


def _written(group: str, name: str, portion: Portion) -> bool:
    if group == "buffers" or (group == "model" and name not in portion.own):
        return name in portion.buffers
    last = name.rpartition("/")[2]
    return last in portion.named if last in portion.own else portion.number == 0


def _row_paths(structure: Any, tensors: Mapping[str, Tensor], portion: Portion) -> dict[str, list[str]]:
    """Find the tensors that have a row for each parameter, such as the counts of updates, and whose rows they are.

    They are those of the parameters that the slots beside it have: one of several optimizers has not all.
    """
    beside: dict[str, set[str]] = {}
    for path in tensors:
        slot, _, name = path.rpartition("/")
        beside.setdefault(slot.rpartition("/")[0], set()).add(name)
    found = {}
    for path in _tensor_paths(structure):
        directory, _, last = path.rpartition("/")
        own = [name for name in portion.order if name in portion.own]
        names = [name for name in own if name in beside.get(directory, ())] or own
        if path in tensors and tensors[path].shape[:1] == (len(names),) and last not in portion.own:
            found[path] = names
    return found


def _tensor_paths(structure: Any) -> list[str]:
    if "tensor" in structure:
        return [structure["tensor"]]
    children = [*structure.get("mapping", {}).values(), *structure.get("sequence", ())]
    return [path for child in children for path in _tensor_paths(child)]


def _whole_record(shard: Snapshot, told: list[Told], portion: Portion) -> Snapshot:
    """Put together, on the first process, what describes the whole."""
    record = json.loads(shard.texts[STATE])
    record["structure"] = told[0].structure
    for other in told[1:]:
        record["structure"] = {n: _merged(tree, other.structure[n]) for n, tree in record["structure"].items()}
    rows = {
        path: torch.stack(_in_order(path, told, portion))
        for path in dict.fromkeys(path for one in told for path in one.rows)
    }
    places = {name: file for one in told for name, file in one.places.items()}
    index = {"metadata": {"total_size": sum(one.size for one in told)}, "weight_map": places}
    tensors = {name: dict(held) for name, held in shard.tensors.items()}
    if rows:
        tensors.setdefault(_shard_name("optimizer", portion), {}).update(rows)
    texts = {**shard.texts, STATE: json.dumps(record, indent=1).encode("utf-8")}
    texts[INDEX] = json.dumps(index, indent=1).encode("utf-8")
    return attrs.evolve(shard, tensors=tensors, texts=texts)


def _in_order(path: str, told: list[Told], portion: Portion) -> list[Tensor]:
    found = {name: row for one in told for name, row in one.rows.get(path, {}).items()}
    return [found[name] for name in portion.order if name in found]


def _merged(one: Any, other: Any) -> Any:
    """Put two descriptions together that differ in which parameters they know of."""
    if "mapping" in one and "mapping" in other:
        names = [*one["mapping"], *(name for name in other["mapping"] if name not in one["mapping"])]
        both = one["mapping"].keys() & other["mapping"].keys()
        return {
            "mapping": {
                name: _merged(one["mapping"][name], other["mapping"][name])
                if name in both
                else (one["mapping"] | other["mapping"])[name]
                for name in names
            }
        }
    if "sequence" in one and "sequence" in other and len(one["sequence"]) == len(other["sequence"]):
        parts = [_merged(a, b) for a, b in zip(one["sequence"], other["sequence"], strict=True)]
        return {**one, "sequence": parts}
    return one


def portion_of(loaded: Loaded, portion: Portion) -> Loaded:
    """Take out of a whole checkpoint what a process has."""
    record = dict(loaded.record)
    buffers = set(record["buffers"])
    optimizer = loaded.tensors.get("optimizer", {})
    whole = attrs.evolve(portion, own=frozenset(portion.order))
    rows = {
        path: optimizer[path][[i for i, name in enumerate(names) if name in portion.own]]
        for path, names in _row_paths(record["structure"]["opt"], optimizer, whole).items()
    }
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for group, held in loaded.tensors.items():
        if group == "model":
            tensors[group] = {name: t for name, t in held.items() if name in portion.own or name in buffers}
        else:
            tensors[group] = {name: t for name, t in held.items() if group == "buffers" or not portion.foreign(name)}
    if rows:
        tensors["optimizer"] = {**tensors["optimizer"], **rows}
    record["structure"] = {name: _cut(child, portion) for name, child in record["structure"].items()}
    return attrs.evolve(loaded, record=record, tensors=tensors)


def _cut(structure: Any, portion: Portion) -> Any:
    if "mapping" in structure:
        children = structure["mapping"].items()
        return {"mapping": {name: _cut(child, portion) for name, child in children if not portion.foreign(name)}}
    if "sequence" in structure:
        return {**structure, "sequence": [_cut(child, portion) for child in structure["sequence"]]}
    return structure

"""A checkpoint of a pipeline is that of one device, in other files: any number of processes goes on from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import forgather_fn as ff
from forgather_fn.checkpoint import load, verify
from forgather_fn.testing.processes import Processes, processes
from tests.pipeline import models, runs

MODELS = {**models.MODELS, "composed": models.MODELS["plain"]}

PIPELINES: dict[str, tuple[str, int]] = {
    "1F1B on 2": ("1F1B", 2),
    "ZBV on 2": ("ZBVZeroBubble", 4),
    "GPipe on 4": ("GPipe", 4),
    "Interleaved on 4": ("Interleaved1F1B", 8),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Processes]]:
    with processes(2) as two, processes(4) as four:
        yield {2: two, 4: four}


def program_of(name: str, how: str | None) -> ff.Program:
    plan = runs.plan_of(MODELS[name], **CHANGES.get(name, {}))
    if how is None:
        return ff.single(plan)
    schedule, stages = PIPELINES[how]
    return ff.pipelined(plan, MODELS[name].spec(stages), schedule=schedule)


def begun(name: str, how: str | None, run: str) -> None:
    """Train three steps and save."""
    program = program_of(name, how)
    state = program.init(seed=3)
    for batch in runs.batches(3):
        state, _ = program.step(state, batch)
    ff.checkpoint.save(program, state, run)


def continued(name: str, how: str | None, run: str) -> runs.Found:
    """Go on for three steps more."""
    program = program_of(name, how)
    return runs.run(program, steps=3, state=program.restore(run))


def through(pools: dict[int, Processes], how: str | None, function: Any, *args: Any) -> list[Any]:
    if how is None:
        return [function(args[0], None, *args[1:])]
    return pools[int(how[-1])].run(function, args[0], how, *args[1:])


def compared(found: list[runs.Found], whole: runs.Found, tolerance: float) -> None:
    assert set().union(*(run.params for run in found)) == set(whole.params)
    for run in found:
        for name, tensor in run.params.items():
            torch.testing.assert_close(tensor, whole.params[name], rtol=0, atol=tolerance)


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {"transforms": (), "average": ff.ema(0.9)},
    "gpt2": {"optimizer": ff.from_torch(lambda groups: torch.optim.RMSprop(groups, eps=1e-4)), "schedule": 1e-3},
    "llama": {"transforms": ()},
    "composed": {
        "transforms": (),
        "optimizer": ff.optim.partitioned(
            {
                "matrices": (lambda name, tensor: tensor.dim() == 2, ff.adamw(weight_decay=0.1)),
                "vectors": ("*", ff.optim.lookahead(ff.adam(), steps=2)),
            }
        ),
    },
}


@pytest.mark.parametrize(
    ("name", "saved_by", "resumed_by"),
    [
        ("plain", "1F1B on 2", "GPipe on 4"),
        ("plain", "GPipe on 4", None),
        ("plain", None, "ZBV on 2"),
        ("llama", "ZBV on 2", "1F1B on 2"),
        ("composed", "1F1B on 2", "GPipe on 4"),
        ("composed", "GPipe on 4", None),
        ("composed", None, "ZBV on 2"),
        ("gpt2", "1F1B on 2", "Interleaved on 4"),
        ("gpt2", "1F1B on 2", None),
    ],
)
def test_a_run_goes_on_elsewhere(
    pools: Any, tmp_path: Path, name: str, saved_by: str | None, resumed_by: str | None
) -> None:
    whole = runs.run(program_of(name, None))
    through(pools, saved_by, begun, name, str(tmp_path))
    found = through(pools, resumed_by, continued, name, str(tmp_path))
    compared(found, whole, 5e-6 if MODELS[name].tied else 0.0)
    assert found[0].metrics[-1]["loss"] == pytest.approx(whole.metrics[-1]["loss"], rel=1e-6)


def test_the_files_are_hugging_faces(pools: Any, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    pools[2].run(begun, "llama_tied", "1F1B on 2", str(tmp_path))
    (directory,) = (tmp_path / "checkpoints").iterdir()
    assert not verify(directory)
    names = {path.name for path in directory.iterdir()}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= names
    assert {"optimizer-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"} <= names
    opened = LlamaForCausalLM.from_pretrained(directory)
    here = load(tmp_path).tensors["model"]
    assert set(here) == set(dict(opened.named_parameters()))
    for name, parameter in opened.named_parameters():
        torch.testing.assert_close(parameter.detach(), here[name], rtol=0, atol=0)


def test_what_is_saved_is_what_one_device_saves(pools: Any, tmp_path: Path) -> None:
    begun("plain", None, str(tmp_path / "one"))
    pools[2].run(begun, "plain", "ZBV on 2", str(tmp_path / "two"))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.tensors.keys() == two.tensors.keys()
    for group, held in one.tensors.items():
        assert held.keys() == two.tensors[group].keys()
        for name, tensor in held.items():
            torch.testing.assert_close(two.tensors[group][name], tensor, rtol=0, atol=0)
    unlike = {name for name in one.record if one.record[name] != two.record[name]}
    assert unlike <= {"world", "versions", "plan"}
    assert {n for n in one.record["plan"] if one.record["plan"][n] != two.record["plan"][n]} <= {"viewed_elements"}


def observed(run: str, fails: bool) -> tuple[list[float], list[str]]:
    program = program_of("plain", "1F1B on 2")
    if fails and distributed.get_rank() == 1:
        import forgather_fn.checkpoint.shards as shards

        real, left = shards.write_tensors, [1]

        def write_tensors(*args: Any) -> Any:
            if left:
                left.pop()
                raise OSError("the disk of rank 1 is full")
            return real(*args)

        shards.write_tensors = write_tensors  # type: ignore[assignment]
    steps = program.steps(program.init(seed=3), runs.batches(4))
    failures = [tick.results.get("save_failures", 0.0) for tick in ff.every(1, ff.saved(run, keep=2))(steps)]
    return failures, sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def test_checkpoints_are_saved_while_training(pools: Any, tmp_path: Path) -> None:
    told = pools[2].run(observed, str(tmp_path), False)
    assert told[0] == told[1] == ([0.0] * 4, ["checkpoint-3", "checkpoint-4"])


def test_a_save_that_fails_on_one_process_fails_on_all_and_the_next_succeeds(pools: Any, tmp_path: Path) -> None:
    told = pools[2].run(observed, str(tmp_path), True)
    assert [failures for failures, _ in told] == [[0.0, 1.0, 0.0, 0.0]] * 2  # told at the next look
    assert told[0][1] == ["checkpoint-3", "checkpoint-4"]
    pools[2].close()

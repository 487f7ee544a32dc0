"""What several processes do together, over real ones; that the numbers agree is tests/laws/test_worlds.py."""

import contextlib
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import toolz
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed, nn

import forgather_fn as ff
from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.testing.processes import processes

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def plan(**changes: Any) -> ff.Plan:
    given: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        "loss": ff.losses.cross_entropy,
        "optimizer": ff.sgd(momentum=0.9),
        "schedule": 0.1,
        "microbatches": 4,
    }
    return ff.Plan(**given | changes)


def data(**changes: Any) -> ff.Stream:
    return ff.batches((X, Y), **{"batch_size": 8} | changes)


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def values(state: ff.TrainState) -> list[float]:
    return torch.cat([p.reshape(-1) for p in state.params.values()]).tolist()


def error_of(function: Any, *args: Any) -> tuple[str, str]:
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.fixture(scope="module")
def pair():
    with processes(2) as pool:
        yield pool


def alike(found: list[Any]) -> Any:
    """Give what all processes have found, once."""
    assert all(one == found[0] for one in found)
    return found[0]


# The program.


def built_by_chance() -> list[float]:
    torch.manual_seed(rank() + 5)
    state = ff.accelerated(plan(model=nn.Linear(4, 3), average=ff.ema(0.5))).init()
    return values(state) + torch.cat([p.reshape(-1) for p in state.ema.values()]).tolist()


def test_all_start_from_the_weights_of_the_first(pair):
    found = alike(pair.run(built_by_chance))
    torch.manual_seed(5)
    assert found == values(ff.single(plan(model=nn.Linear(4, 3))).init()) * 2


def unlike_plans() -> None:
    ff.accelerated(plan(optimizer=ff.sgd(momentum=0.9 if rank() else 0.8))).init()


def test_processes_with_other_plans_are_refused(pair):
    for kind, text in pair.run(error_of, unlike_plans):
        assert kind == "ValueError"
        assert "momentum=0.8" in text
        assert "momentum=0.9" in text
        assert "rank 1" in text


def halves() -> tuple[list[float], list[float]]:
    program = ff.accelerated(plan(donate=False))
    state = program.init(0)
    batch = next(data().start(0, 0))
    gradients, buffers, metrics = program.gradients(state, batch)
    stepped, _ = program.step(state, batch)
    updated, _ = program.update(state, gradients, buffers)
    assert set(metrics) == {"loss"}
    assert program.export(state)(X).shape == program.apply(state, X).shape == (24, 3)
    return values(stepped), values(updated)


def test_a_whole_batch_is_given_to_all_and_a_step_is_its_two_halves(pair):
    stepped, updated = alike(pair.run(halves))
    assert stepped == updated
    single = ff.single(plan())
    state, _ = single.step(single.init(0), next(data().start(0, 0)))
    assert stepped == pytest.approx(values(state), abs=1e-6)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def normed() -> tuple[list[float], list[float]]:
    program = ff.accelerated(plan(model=Normed, microbatches=2))
    state = program.init(0)
    for tick in ff.until(steps=3)(program.steps(state, data(order="sequential"))):
        state = tick.state
    return values(state), [float(v) for v in torch.cat([b.reshape(-1) for b in state.buffers.values()])]


def test_buffers_that_forward_changes_are_those_of_the_first_process(pair):
    """Running statistics are sequential by nature; they agree over processes, and are not those of one process."""
    _, buffers = alike(pair.run(normed))
    norm = nn.BatchNorm1d(4)
    for start in (0, 8, 16):
        norm(X[start : start + 4])
    expected = [*norm.running_mean.tolist(), *norm.running_var.tolist(), 3.0]
    assert buffers == pytest.approx(expected, abs=1e-6)


class Poor(torch.utils.data.Dataset):
    """Data with one bad sample, which only one process reads."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[i] * (torch.nan if i == 13 else 1.0), Y[i]


def with_a_bad_sample(on_nonfinite: Any) -> tuple[str, int, int]:
    program = ff.accelerated(plan(on_nonfinite=on_nonfinite))
    stream = ff.batches(Poor(), batch_size=8, order="sequential", epochs=1)
    state = program.init(0)
    try:
        for tick in program.steps(state, stream):
            state = tick.state
    except ff.NonFiniteError:
        return "raised", state.step, int(state.updates)
    return "ended", state.step, int(state.updates)


def test_a_step_that_is_not_finite_on_one_process_is_so_on_all(pair):
    assert alike(pair.run(with_a_bad_sample, "raise")) == ("raised", 1, 1)
    assert alike(pair.run(with_a_bad_sample, "skip")) == ("ended", 3, 2)


def other_names() -> None:
    def loss(outputs: Any, batch: Any) -> Any:
        mean = ff.losses.cross_entropy(outputs, batch)
        return {"loss": mean, "extra": mean} if rank() else {"loss": mean}

    program = ff.accelerated(plan(loss=loss))
    program.step(program.init(0), (X[:8], Y[:8]))


def test_losses_with_other_names_are_refused(pair):
    assert alike(pair.run(error_of, other_names))[0] == "ValueError"


# Data.


class Untouchable:
    def __iter__(self) -> Any:
        raise AssertionError("this process reads nothing")


def dispatched(kind: str) -> list[float]:
    program = ff.accelerated(plan(), dispatch="rank0" if kind != "each" else "each")
    batches: Any = data()
    if kind == "iterable":
        batches = [(b.data[0], b.data[1]) for b, _ in zip(data().start(0, 0), range(3), strict=False)]
        batches = iter(batches) if rank() == 0 else Untouchable()
    return values(toolz.pipe(program.steps(program.init(0), batches), ff.until(steps=3), ff.last))


@pytest.mark.parametrize("kind", ["stream", "iterable"])
def test_one_process_may_read_for_all(pair, kind):
    assert alike(pair.run(dispatched, kind)) == alike(pair.run(dispatched, "each"))


def failing_source() -> None:
    def broken() -> Any:
        yield X[:8], Y[:8]
        raise OSError("the disk is gone")

    program = ff.accelerated(plan(), dispatch="rank0")
    ff.last(program.steps(program.init(0), broken() if rank() == 0 else ()))


def test_a_source_that_fails_fails_on_all(pair):
    first, second = pair.run(error_of, failing_source)
    assert first == ("OSError", "the disk is gone")
    assert second == ("PeerError", "rank 0 could not read a batch: OSError: the disk is gone")


class Drawn(torch.utils.data.Dataset[Any]):
    """Samples that every process has drawn for itself, as a script does that forgets to seed."""

    def __init__(self, seed: int) -> None:
        self.x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return self.x[index], Y[index]


UNLIKE: dict[str, Any] = {
    "columns": lambda rank: ff.batches((Drawn(rank).x, Y), batch_size=8),
    "samples": lambda rank: ff.batches(Drawn(rank), batch_size=8),
    "split": lambda rank: ff.batches(
        torch.utils.data.random_split(Drawn(0), [16, 8], torch.Generator().manual_seed(rank))[0], batch_size=8
    ),
    "threads": lambda rank: ff.batches(Drawn(rank), batch_size=8, threads=1),
    "in sequence": lambda rank: ff.batches(ff.data.counted(list(Drawn(rank))), batch_size=8, order="sequential"),
    "batches": lambda rank: [(Drawn(rank).x[:8], Y[:8])],
    "fewer": lambda rank: ff.batches((X[: 24 - rank], Y[: 24 - rank]), batch_size=8),
    "order": lambda rank: data(order="sequential" if rank else "shuffled"),
    "none": lambda rank: [] if rank else [(X, Y)],
}


def given_unlike(kind: str) -> list[Any]:
    program = ff.accelerated(plan())
    state = program.init(0)
    before = values(state)
    found = error_of(lambda: ff.last(ff.until(steps=1)(program.steps(state, UNLIKE[kind](rank())))))
    return [found, values(state) == before]


@pytest.mark.parametrize("kind", UNLIKE)
def test_processes_that_have_other_data_are_refused_before_the_first_step(pair, kind):
    (error, text), untouched = alike(pair.run(given_unlike, kind))
    assert error == "ValueError"
    assert text.startswith("the processes of a run must be given the same data, of which each takes its part. Seed")
    assert re.search(r"\n  rank 0: step 0, sample 0, seed 0, .*\n  rank 1: step 0, sample 0, seed 0, ", text)
    assert untouched


def started_elsewhere(at: str) -> None:
    program = ff.accelerated(plan())
    state = attrs.evolve(program.init(seed=rank() if at == "init" else 0), seed=rank())
    ff.last(ff.until(steps=1)(program.steps(state, data(order="sequential"))))


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("init", r"the same seed, .*\n  rank 0: seed 0\n  rank 1: seed 1$"),
        ("the stream", r"rank 0: step 0, sample 0, seed 0(.|\n)*rank 1: step 0, sample 0, seed 1"),
    ],
)
def test_processes_that_have_other_seeds_are_refused(pair, at, said):
    error, text = alike(pair.run(error_of, started_elsewhere, at))
    assert error == "ValueError"
    assert re.search(said, text)


class Named(Drawn):
    """Samples that lie elsewhere on each machine."""

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "labels": Y[index], "path": f"/machine-{rank()}/{index}"}


def read_from_elsewhere() -> list[float]:
    program = ff.accelerated(plan(model=lambda: Columned(), loss=lambda out, batch: labelled(out, batch["labels"])))
    stream = ff.batches(Named(0), batch_size=8)
    return values(ff.last(ff.until(steps=2)(program.steps(program.init(0), stream))))


class Columned(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def labelled(outputs: torch.Tensor, labels: torch.Tensor) -> ff.Mean:
    return ff.losses.cross_entropy(outputs, (None, labels))


def test_texts_beside_the_samples_may_differ(pair):
    alike(pair.run(read_from_elsewhere))


def evaluated_twice() -> dict[str, float]:
    program = ff.accelerated(plan())
    state = program.init(0)
    stream = program.evaluate(state, data(batch_size=7))
    assert (
        program.evaluate(state, [(X[:7], Y[:7]), (X[7:14], Y[7:14]), (X[14:21], Y[14:21]), (X[21:], Y[21:])]) == stream
    )
    return stream


def test_evaluation_has_the_bits_of_one_process(pair):
    single = ff.single(plan())
    assert alike(pair.run(evaluated_twice)) == single.evaluate(single.init(0), data(batch_size=7))


# The loop.


def signalled(number: int, at: int, ending: str) -> tuple[str, int]:
    program = ff.accelerated(plan())
    state = program.init(0)
    try:
        for tick in ff.until(steps=9)(program.steps(state, data())):
            state = tick.state
            if rank() == at and state.step == 3:
                os.kill(os.getpid(), number)
    except SystemExit:
        return "SystemExit", state.step
    return "ended", state.step


@pytest.mark.parametrize("at", [0, 1])
def test_a_signal_to_one_process_ends_all_after_the_same_step(pair, at):
    found = pair.run(signalled, signal.SIGTERM, at, "")
    assert alike(found) == ("SystemExit", 4)


def timed(what: str) -> list[int]:
    """Let time pass on the second process only."""
    now = [0.0]

    def clock() -> float:
        return now[0]

    seen: list[int] = []
    stages = {
        "until": [ff.until(seconds=2.5, clock=clock)],
        "every_seconds": [ff.every_seconds(2.5, lambda t: seen.append(t.state.step), clock=clock), ff.until(steps=9)],
    }[what]
    program = ff.accelerated(plan())
    state = program.init(0)
    for tick in toolz.pipe(program.steps(state, data()), *stages):
        state = tick.state
        now[0] += rank()
    return seen or [state.step]


def test_stages_that_look_at_clocks_agree(pair):
    assert alike(pair.run(timed, "until")) == [4]
    assert alike(pair.run(timed, "every_seconds")) == [5, 9]


def reported(path: str) -> int:
    rows = []
    program = ff.accelerated(plan())
    sinks = ff.every(1, ff.report(rows.append, wants=["gradient_norms"]))
    ff.last(ff.until(steps=3)(sinks(program.steps(program.init(0), data()))))
    return len(rows)


def test_the_first_process_reports(pair, tmp_path):
    assert pair.run(reported, str(tmp_path)) == [3, 0]


# Checkpoints.


def saving(run: str, background: bool) -> list[str]:
    program = ff.accelerated(plan())
    saver = ff.saved(run, async_=background)
    ff.last(ff.until(steps=4)(ff.every(2, saver)(program.steps(program.init(0), data()))))
    return [entry.path.name for entry in list_checkpoints(run)]


@pytest.mark.parametrize("background", [True, False])
def test_the_first_process_saves_for_all(pair, tmp_path, background):
    assert alike(pair.run(saving, str(tmp_path), background)) == ["checkpoint-2", "checkpoint-4"]


def failing_saves(run: str) -> None:
    program = ff.accelerated(plan())
    state = program.init(0)
    if rank() == 0:
        Path(run).mkdir(exist_ok=True)
        (Path(run) / "checkpoints").write_text("in the way")
    saver = ff.saved(run, failures=1, async_=False)
    ff.last(ff.until(steps=3)(ff.every(1, saver)(program.steps(state, data()))))


def test_a_save_that_fails_on_the_first_fails_on_all(pair, tmp_path):
    for kind, text in pair.run(error_of, failing_saves, str(tmp_path / "run")):
        assert kind in ("SaveError", "PeerError", "FileExistsError", "NotADirectoryError")
        assert "checkpoints" in text


def drifting(run: str) -> None:
    program = ff.accelerated(plan())
    state = program.init(0)
    with torch.no_grad():
        next(iter(state.params.values())).add_(1e-7 * rank())
    ff.checkpoint.save(program, state, run)


def test_processes_that_have_drifted_apart_are_not_saved(pair, tmp_path):
    kind, text = alike(pair.run(error_of, drifting, str(tmp_path)))
    assert kind == "RuntimeError"
    assert "ranks [1] are not those of rank 0" in text
    assert list_checkpoints(tmp_path) == []


def resumed(run: str) -> list[str]:
    logging.getLogger("forgather_fn").setLevel(logging.INFO)
    notes: list[str] = []
    reader = logging.Handler()
    reader.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("forgather_fn.checkpoint.restoring").addHandler(reader)
    ff.accelerated(plan()).restore(run)
    return notes


def test_a_changed_world_is_told_once(pair, tmp_path):
    program = ff.single(plan())
    ff.checkpoint.save(program, program.init(0), tmp_path)
    (told,), nothing = pair.run(resumed, str(tmp_path))
    assert "was saved by 1 processes, and goes on with 2" in told
    assert nothing == []


def missing(run: str) -> None:
    ff.accelerated(plan()).restore(run)


def test_a_checkpoint_that_is_not_there_is_missed_by_all(pair, tmp_path):
    first, second = pair.run(error_of, missing, str(tmp_path))
    assert first[0] == "CheckpointError"
    assert second[0] == "PeerError"
    assert first[1] in second[1]


# What is refused, and how Accelerate is told.


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"compile": True, "unroll": True}, {}, "leave it out"),
        ({"update": "in_backward", "microbatches": 1}, {}, "in_backward"),
        ({}, {"accelerator_args": {"deepspeed_plugin": object()}}, "DeepSpeed has an optimizer"),
        ({}, {"accelerator_args": {"fsdp_plugin": object()}}, "sharded=True"),
        ({}, {"accelerator_args": {"log_with": "all"}}, "ff.report"),
        ({}, {"accelerator_args": {"gradient_accumulation_steps": 3}}, "microbatches=4 over 1 processes"),
        ({}, {"reduction": "mean"}, "reduction='mean' is not one of 'sum', 'tree'"),
        ({}, {"dispatch": "first"}, "dispatch='first' is not one of 'rank0', 'each'"),
        ({}, {"sync_batch_norm": True}, "no SyncBatchNorm for CPUs"),
        ({}, {"sync_batch_norm": "no"}, "sync_batch_norm must be True or False; got 'no'"),
        ({}, {"overlap_bytes": "64MB"}, "overlap_bytes must be an integer or None; got '64MB'"),
        ({}, {"overlap_bytes": -1}, "overlap_bytes must be at least 0, or None; got -1"),
        ({}, {"sharded": "blocks.*"}, r"sharded must be True or False or a sequence, each a text; got 'blocks\.\*'"),
        ({}, {"sharded": [3]}, r"sharded must be .* a sequence, each a text; got \[3\]"),
        ({}, {"accelerator_args": ["cpu"]}, "accelerator_args must be a mapping of a text to anything or None"),
    ],
)
def test_what_is_not_done_is_refused(changes, given, message):
    with pytest.raises(ValueError, match=message):
        ff.accelerated(plan(**changes), **given)


def test_microbatches_that_cannot_be_shared_out_are_refused(pair):
    for kind, text in pair.run(error_of, too_few):
        assert kind == "ValueError"
        assert "Plan(microbatches=2)" in text


def too_few() -> None:
    ff.accelerated(plan(microbatches=1))


def uneven_tree() -> None:
    ff.accelerated(plan(microbatches=6), reduction="tree")


def test_a_tree_of_uneven_blocks_is_refused(pair):
    assert all("3 microbatches, which is no power of two" in text for _, text in pair.run(error_of, uneven_tree))


def test_shards_by_accelerate_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="sharded=True"):
        ff.accelerated(plan())


def test_a_model_that_is_spread_over_devices_is_refused():
    model = nn.Linear(4, 3)
    model.hf_device_map = {"a": "cpu", "b": "cuda:0"}
    with pytest.raises(ValueError, match="spread over the devices cpu, cuda:0"):
        ff.accelerated(plan(model=model))
    model.hf_device_map = {"": "cpu"}
    assert ff.accelerated(plan(model=model)).world.size == 1


def test_a_launcher_that_started_more_is_noticed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"has started 2 processes .* knows of 1"):
        ff.accelerated(plan())


def in_precision(asked: str, given: bool) -> tuple[str, list[float]]:
    arguments: dict[str, Any] = {"mixed_precision": asked, "cpu": True}
    with no_accelerator():
        own = {"accelerator": Accelerator(**arguments)} if given else {"accelerator_args": arguments}
        program = ff.accelerated(plan(), **own)
        state, _ = program.step(program.init(0), (X[:8], Y[:8]))
    return program.plan.precision, values(state)


@contextlib.contextmanager
def no_accelerator() -> Iterator[None]:
    """Let an accelerator be made with other arguments than those before: it keeps them for its process."""
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()


@pytest.mark.parametrize("given", [True, False])
def test_mixed_precision_is_as_accelerate_is_told(pair, given):
    precision, found = alike(pair.run(in_precision, "bf16", given))
    assert precision == "bfloat16"
    single = ff.single(plan(precision="bfloat16"))
    state, _ = single.step(single.init(0), (X[:8], Y[:8]))
    assert found == pytest.approx(values(state), abs=1e-3)


def test_precisions_that_do_not_fit_are_refused():
    with no_accelerator(), pytest.raises(ValueError, match="leave one of them out"):
        ff.accelerated(plan(precision="float64"), accelerator_args={"mixed_precision": "bf16"})


def test_an_accelerator_and_arguments_for_one_are_too_much():
    with pytest.raises(ValueError, match=r"Accelerator\(cpu=\.\.\.\)"):
        ff.accelerated(plan(), accelerator=Accelerator(cpu=True), accelerator_args={"cpu": True})

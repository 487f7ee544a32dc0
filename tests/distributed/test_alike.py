"""Processes that do not take the same steps, on the same batches, of the same program, are told before they mix."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import alike
from forgather_fn.checkpoint import save, saved
from forgather_fn.distributed import watch
from forgather_fn.flat import Flat, layout_of
from forgather_fn.step import inverse_on_device
from forgather_fn.testing.processes import Processes, ProcessesFailed, processes
from tests.distributed.test_alone import SOON, STRATEGIES, plan, rows

Batches = list[Any]
STEPS = {**STRATEGIES, "overlapped": lambda plan: ff.accelerated(plan, overlap_bytes=0)}


@pytest.fixture(scope="module")
def pair() -> Any:
    with processes(2) as pool:
        yield pool


def batches(form: str, program: ff.Program) -> Batches:
    """Give the same samples as plain batches, and as those of a stream, of which a process reads its part."""
    if form == "plain":
        return rows()
    data = {name: torch.cat([batch[name] for batch in rows()]) for name in rows()[0]}
    stream = ff.batches(data, batch_size=4, epochs=1, order="sequential")
    return list(stream.start(0, 0, program.share))


def left_out(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for number, batch in enumerate(given):
        if number == 1 and not program.world.main:
            continue
        state, _ = program.step(state, batch)
    return state


def taken_twice(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for number, batch in enumerate([given[0], *given]):
        if number or program.world.main:
            state, _ = program.step(state, batch)
    return state


def swapped(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for batch in given if program.world.main else given[::-1]:
        state, _ = program.step(state, batch)
    return state


def unlike(strategy: str, form: str, walk: Callable[..., ff.TrainState]) -> tuple[str, bool]:
    program = STEPS[strategy](plan())
    state, kept = program.init(0), []

    def step(state: ff.TrainState, batch: Any) -> tuple[ff.TrainState, Any]:
        kept[:] = [state, total(state)]
        return program.step(state, batch)

    text = ""
    try:
        walk(attrs.evolve(program, step=step), state, batches(form, program))
    except ValueError as error:
        text = str(error)
    state, before = kept
    return text, total(state) == before


def total(state: ff.TrainState) -> float:
    return float(sum(tensor.sum() for tensor in state.params.values()))


@pytest.mark.parametrize("walk", [left_out, taken_twice, swapped])
@pytest.mark.parametrize("form", ["plain", "stream"])
@pytest.mark.parametrize("strategy", STEPS)
def test_a_step_of_other_batches_is_refused_on_all(
    pair: Processes, strategy: str, form: str, walk: Callable[..., ff.TrainState]
) -> None:
    if (strategy, form) == ("pipeline", "stream"):
        form = "plain"  # each of its processes is given the whole batch
    (one, untouched), other = pair.run(unlike, strategy, form, walk)
    assert other == (one, True)
    assert untouched
    why, first, second = one.splitlines()
    assert why.startswith(("the processes of a run must take the same steps", "the processes of a pipeline must be"))
    assert first.startswith("  rank 0: step ")
    assert second.startswith("  rank 1: step ")
    assert first.removeprefix("  rank 0") != second.removeprefix("  rank 1")


def went_on(strategy: str) -> tuple[bool, float]:
    program = STEPS[strategy](plan())
    first, second, third = rows()
    state, _ = program.step(program.init(0), first)
    with pytest.raises(ValueError, match="rank 1"):
        program.step(state, second if program.world.main else third)
    for batch in (second, third):
        state, _ = program.step(state, batch)
    return program.world.main, program.evaluate(state, rows())["loss"]


@pytest.mark.parametrize("strategy", STEPS)
def test_after_it_all_may_go_on_as_if_nothing_had_been(pair: Processes, strategy: str) -> None:
    single = ff.single(plan())
    state = single.init(0)
    for batch in rows():
        state, _ = single.step(state, batch)
    expected = single.evaluate(state, rows())["loss"]
    assert pair.run(went_on, strategy) == [(True, pytest.approx(expected)), (False, pytest.approx(expected))]


def rounded(strategy: str) -> bool:
    program = STEPS[strategy](plan())
    state = program.init(0)
    for batch in rows():
        made = {name: tensor * (1 + 1e-6 * program.world.rank) for name, tensor in batch.items()}
        state, _ = program.step(state, made)
    return state.step == 3


@pytest.mark.parametrize("strategy", ["replicas", "shards"])
def test_what_each_computes_by_itself_may_differ_by_rounding(pair: Processes, strategy: str) -> None:
    assert pair.run(rounded, strategy) == [True, True]


def in_another_order(strategy: str, what: str) -> None:
    one, other = (STEPS[strategy](plan()) for _ in range(2))
    first, second = one.init(0), other.init(1)
    for batch in rows()[:2]:
        first, _ = one.step(first, batch)
        second, _ = other.step(second, batch)
    order = [(one, first), (other, second)]
    for program, state in order if one.world.main else order[::-1]:
        if what == "a step":
            program.step(state, rows()[2])
        else:
            program.evaluate(state, rows())


@pytest.mark.parametrize("what", ["a step", "an evaluation"])
@pytest.mark.parametrize("strategy", STEPS)
def test_two_programs_in_another_order_are_refused(
    strategy: str, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.5)
    with processes(2, timeout=SOON) as pool, pytest.raises(ProcessesFailed) as failed:
        pool.run(in_another_order, strategy, what)
    said = capfd.readouterr().err + str(failed.value)
    assert f"begins {what} of program 2" in said
    assert f"begins {what} of program 1" in said
    assert "(program 1 is the one that was initialised first)" in said


def in_turn(strategy: str) -> list[float]:
    programs = [STEPS[strategy](plan()) for _ in range(2)]
    states = [program.init(seed) for seed, program in enumerate(programs)]
    for batch in rows():
        for number, program in enumerate(programs):
            states[number], _ = program.step(states[number], batch)
    return [program.evaluate(state, rows())["loss"] for program, state in zip(programs, states, strict=True)]


@pytest.mark.parametrize("strategy", STEPS)
def test_two_programs_in_turn_are_what_each_is_alone(pair: Processes, strategy: str) -> None:
    expected = []
    for seed in range(2):
        program = ff.single(plan())
        state = program.init(seed)
        for batch in rows():
            state, _ = program.step(state, batch)
        expected.append(pytest.approx(program.evaluate(state, rows())["loss"]))
    assert pair.run(in_turn, strategy) == [expected, expected]


def other_data(program: ff.Program, state: ff.TrainState) -> Any:
    generator = torch.Generator().manual_seed(program.world.rank)
    return program.evaluate(state, [{name: torch.randn(4, 8, generator=generator) for name in ("input", "target")}] * 2)


def other_streams(program: ff.Program, state: ff.TrainState) -> Any:
    generator = torch.Generator().manual_seed(program.world.rank)
    data = {name: torch.randn(12, 8, generator=generator) for name in ("input", "target")}
    return program.evaluate(state, ff.batches(data, batch_size=4))


def more_batches(program: ff.Program, state: ff.TrainState) -> Any:
    return program.evaluate(state, rows()[: 3 - program.world.rank])


def longer_streams(program: ff.Program, state: ff.TrainState) -> Any:
    data = {name: torch.ones(12 - program.world.rank, 8) for name in ("input", "target")}
    return program.evaluate(state, ff.batches(data, batch_size=4))


def longer_sources(program: ff.Program, state: ff.TrainState) -> Any:
    samples = [{name: torch.ones(8) for name in ("input", "target")}] * (12 - 4 * program.world.rank)
    return program.evaluate(state, ff.batches(iter_of(samples), batch_size=4, order="sequential"))


def iter_of(samples: list[Any]) -> Any:
    class Source(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(samples)

    return Source()


def another_step(program: ff.Program, state: ff.TrainState) -> Any:
    following, _ = program.step(state.copy(), rows()[0])
    return program.evaluate(state if program.world.main else following, rows())


def other_parameters(program: ff.Program, state: ff.TrainState) -> Any:
    state = state.copy()
    if program.world.rank:
        next(iter(state.params.values())).mul_(2.0)
    return program.evaluate(state, rows())


def other_metrics(program: ff.Program, state: ff.TrainState) -> Any:
    return program.evaluate(state, rows(), metrics=[[absolute, largest], [largest, absolute]][program.world.rank])


def absolute(outputs: Any, batch: Any) -> Any:
    return {"absolute": ff.mean.of((outputs - batch["target"]).abs())}


def largest(outputs: Any, batch: Any) -> Any:
    return {"largest": ff.mean.of((outputs - batch["target"]).amax(1))}


def other_values(program: ff.Program, state: ff.TrainState) -> Any:
    return program.evaluate(state, rows(), params=("params", "ema")[program.world.rank])


def larger_batches(program: ff.Program, state: ff.TrainState) -> Any:
    data = {name: torch.ones(12, 8) for name in ("input", "target")}
    return program.evaluate(state, ff.batches(data, batch_size=4 + 2 * program.world.rank))


UNLIKE = [
    *(other_data, other_streams, more_batches, longer_streams, longer_sources, larger_batches),
    *(another_step, other_metrics, other_values),
]


def evaluated(strategy: str, evaluate: Callable[..., Any]) -> str:
    program = STRATEGIES[strategy](attrs.evolve(plan(), average=ff.ema(0.5)))
    state, _ = program.step(program.init(0), rows()[0])
    try:
        evaluate(program, state)
    except ValueError as error:
        again = program.evaluate(state, rows())  # nothing is left behind of it
        assert again == program.evaluate(state, rows())
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("strategy", "evaluate"),
    [*((strategy, one) for strategy in STRATEGIES for one in UNLIKE), ("replicas", other_parameters)],
)
def test_an_evaluation_of_other_things_is_refused(pair: Processes, strategy: str, evaluate: Callable[..., Any]) -> None:
    one, other = pair.run(evaluated, strategy, evaluate)
    assert one == other
    assert one.startswith(
        ("evaluate: the processes of a run must", "the processes of a pipeline must be given the same")
    )
    assert [line[:8] for line in one.splitlines()[1:]] == ["  rank 0", "  rank 1"]


def with_few_batches(strategy: str) -> list[float]:
    program = STRATEGIES[strategy](plan())
    state = program.init(0)
    data = {name: rows()[0][name] for name in rows()[0]}
    stream = ff.batches(data, batch_size=4)
    return [program.evaluate(state, one)["loss"] for one in (rows()[:1], stream, iter(rows()[:1]))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_that_has_no_batch_has_seen_the_first(pair: Processes, strategy: str) -> None:
    one, other = pair.run(with_few_batches, strategy)
    assert one == other
    assert len(set(one)) == 1


def saved_elsewhere(run: str, how: str) -> str:
    program = ff.accelerated(plan())
    own = f"{run}-{program.world.rank}"
    try:
        if how == "save":
            save(program, program.init(0), own)
        elif how == "restore":
            program.restore(own)
        else:
            ff.last(ff.every(1, saved(own))(program.steps(program.init(0), rows())))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["save", "saved", "restore"])
def test_a_save_to_another_place_is_refused(pair: Processes, how: str, tmp_path: Path) -> None:
    one, other = pair.run(saved_elsewhere, str(tmp_path / "run"), how)
    assert one == other
    assert one.startswith(f"the processes of a run {'load' if how == 'restore' else 'save'} together")
    assert [line[-5:] for line in one.splitlines()[1:]] == ["run-0", "run-1"]
    assert list(tmp_path.iterdir()) == []


class Lines(torch.utils.data.Dataset[Any]):
    """Opens its file when first asked, as those do who know that a handle must not be shared by worker processes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: int | None = None

    def __len__(self) -> int:
        return os.stat(self.path).st_size

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, index, os.SEEK_SET)
        time.sleep(0.001)
        value = os.read(self.file, 1)[0]
        return {name: torch.full((8,), float(value)) for name in ("input", "target")}


@pytest.mark.parametrize("how", [{"workers": 2}, {}])
def test_what_is_compared_of_a_stream_is_read_as_all_of_it(how: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(10)))
    stream = ff.batches(Lines(str(path)), batch_size=4, **how)  # type: ignore[arg-type]
    passes = [list(stream.one_pass(rank, 2)) for rank in range(2)]
    found = [[batch.data["input"][:, 0].tolist() for batch in batches] for batches in passes]
    assert found == [[[0.0, 1.0, 2.0, 3.0], [8.0, 9.0]], [[4.0, 5.0, 6.0, 7.0]]]
    assert passes[0][0].witness == passes[1][0].witness is not None
    assert {batch.witness for batch in (*passes[0][1:], *stream.one_pass())} == {None}
    assert "workers" not in how or stream.dataset.file is None  # type: ignore[attr-defined]


def read_by_the_first(form: str) -> list[float]:
    program = ff.accelerated(plan(), dispatch="rank0")
    data = {name: torch.cat([batch[name] for batch in rows()]) for name in rows()[0]}
    source = ff.batches(data, batch_size=4, epochs=2) if form == "stream" else iter(rows())
    losses = []
    for tick in program.steps(program.init(0), source if program.world.main else []):
        losses.append(float(tick.metrics["loss"]))
    return [*losses, program.evaluate(tick.state, rows())["loss"]]


@pytest.mark.parametrize("form", ["stream", "iterable"])
def test_what_the_others_pass_is_not_touched_where_the_first_reads(pair: Processes, form: str) -> None:
    one, other = pair.run(read_by_the_first, form)
    assert one == other
    assert len(one) == {"stream": 7, "iterable": 4}[form]


def of_other_sizes(sizes: list[list[int]]) -> str:
    program = STRATEGIES["shards"](attrs.evolve(plan(), microbatches=4))
    state = program.init(0)
    try:
        for size in sizes[program.world.rank]:
            data = {name: torch.ones(size, 8) for name in ("input", "target")}
            state, _ = program.step(state, ff.Batch(data, size, None, ragged=True))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("sizes", [[[4, 2], [2, 4]], [[4, 1], [1]], [[4, 4], [3, 4]]])
def test_shards_of_batches_of_other_sizes_do_not_wait_for_each_other(pair: Processes, sizes: list[list[int]]) -> None:
    one, other = pair.run(of_other_sizes, sizes)
    assert one == other
    assert "must take the same steps" in one


def tried_again(strategy: str, where: str) -> float:
    program = STEPS[strategy](plan())
    state, planted = program.init(0), [None] * program.world.rank

    def fail(*_: Any) -> None:
        if planted:
            planted.pop()
            raise MemoryError("planted")

    def fail_backwards(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    if where == "backward":
        program.module()[-1].register_forward_hook(fail_backwards)
    content = alike.content
    for batch in rows():
        if where == "content":
            alike.content = lambda *given: (fail(), content(*given))[1]  # type: ignore[assignment]
        try:
            state, _ = program.step(state, batch)
        except MemoryError:
            state, _ = program.step(state, batch)
        finally:
            alike.content = content
    return program.evaluate(state, rows())["loss"]


@pytest.mark.parametrize("where", ["backward", "content"])
@pytest.mark.parametrize("strategy", ["replicas", "overlapped"])
def test_what_fails_before_a_step_has_begun_is_tried_again(pair: Processes, strategy: str, where: str) -> None:
    one, other = pair.run(tried_again, strategy, where)
    assert one == other


def as_on_an_accelerator(precision: str) -> tuple[str, float]:
    program = ff.accelerated(attrs.evolve(plan(), precision=precision, optimizer=ff.adamw()))
    state, _ = program.step(program.init(0), rows()[0])
    before = total(state)
    checked = alike.checked
    alike.checked = lambda loss, rows, *_: alike.unless_unlike(loss, rows)
    try:
        state, _ = program.step(state, rows()[1 + program.world.rank])
    except ff.NonFiniteError as error:
        return str(error)[:6], total(state) - before
    finally:
        alike.checked = checked
    return "nothing", 0.0


@pytest.mark.parametrize("precision", ["as_built", "float16"])
def test_where_nobody_waits_an_unlike_step_is_as_one_that_is_not_finite(pair: Processes, precision: str) -> None:
    assert pair.run(as_on_an_accelerator, precision) == [("step 1", 0.0)] * 2


def test_the_inverse_of_nan_stays_nan() -> None:
    found = inverse_on_device(torch.tensor([2.0, 0.0, float("nan")]))
    assert torch.equal(found.isnan(), torch.tensor([False, False, True]))
    assert found[:2].tolist() == [0.5, 0.0]


CHANGES = {
    "step": {"step": 1},
    "samples consumed": {"samples": 1},
    "seed": {"seed": 1},
    "samples": {"samples": 5},
    "position": {"position": 8},
    "order": {"indices": np.arange(1, 5)},
    "witness": {"witness": "0" * 64},
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_number_of_a_step_is_compared(change: str) -> None:
    state = ff.single(plan()).init(0)
    batch = ff.Batch(rows()[0], 4, np.arange(4), position=4, witness="f" * 64)
    before = alike.numbers(state, batch)
    if change in ("step", "samples consumed", "seed"):
        after = alike.numbers(attrs.evolve(state, **CHANGES[change]), batch)
    else:
        after = alike.numbers(state, attrs.evolve(batch, **CHANGES[change]))
    assert before.tolist()[1:] == after.tolist()[1:]
    assert not alike.same(torch.stack([before, after]))


KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool),
]
FORMS = {
    "as it is": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
    "expanded": lambda tensor: tensor[None].expand(100, *tensor.shape),
    "every other": lambda tensor: tensor[::2] if tensor.dim() else tensor,
    "numpy": lambda tensor: tensor.numpy(),
}


def told(data: Any) -> list[float]:
    return [float(number) for number in alike.content(data)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (40, 3), (3, 5, 1000)])
def test_all_kinds_of_data_are_looked_at(kind: torch.dtype, shape: tuple[int, ...], form: str) -> None:
    if form == "numpy" and kind in (torch.bfloat16, torch.float8_e4m3fn):
        return
    ones, twos = (FORMS[form](torch.full(shape, number).to(kind)) for number in (1.0, 0.0))
    found = told({"x": ones, "name": "a", "nothing": None, "more": [ones]})
    assert found == told({"x": FORMS[form](torch.full(shape, 1.0).to(kind)), "more": [ones]})
    assert (found != told({"x": twos, "more": [ones]})) is bool(np.prod(ones.shape))


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("form", ["as it is", "transposed"])
def test_the_order_of_samples_counts(kind: torch.dtype, form: str) -> None:
    data = (torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 2).clamp(min=0.0).to(kind)
    one, other = (told(FORMS[form](given)) for given in (data, data.flip(0)))
    assert not alike.same(torch.tensor([[0.0, *one], [0.0, *other]], dtype=torch.float64))


def test_signs_count_and_a_large_tensor_hides_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.full((4, 64), torch.finfo(torch.float32).min)
    signs = [torch.randint(2, (4, 64), generator=generator) * 2.0 - 1 for _ in range(2)]
    one, other = (told({"mask": mask, "x": x}) for x in signs)
    assert not alike.same(torch.tensor([[0.0, *one], [0.0, *other]], dtype=torch.float64))


def test_few_numbers_of_a_large_batch_are_looked_at_in_all_columns() -> None:
    for shape in ((256, 64), (64, 1024), (3, 100_000)):
        seen = {index % shape[1] for index in range(0, shape[0] * shape[1], shape[0] * shape[1] // 256 | 1)}
        assert len(seen) >= min(shape[1], 200)
    marked = torch.zeros(256, 64, dtype=torch.long)
    other = marked.clone()
    other[:, 1:] = torch.randint(2, (256, 63), generator=torch.Generator().manual_seed(0))
    assert told(marked) != told(other)  # where each row begins with the same token


def test_what_is_not_looked_at_costs_nothing() -> None:
    assert told({"ids": [[1] * 1000] * 8, "text": ["a"] * 1000}) == [0.0, 0.0]
    wide = torch.zeros(1, dtype=torch.bool).expand(4, 1000, 100_000)  # 400 MB, if it were copied
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told(wide)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_what_is_not_finite_is_no_difference() -> None:
    one = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert told(one) == told(torch.tensor([1.0, 0.0, 0.0, 0.0]))


CHANGED = [((0.0, 0.0, 5e-4), True), ((0.0, 0.0, 2e-3), False), ((0.0, 1.0, 0.0), False), ((1.0, 0.0, 0.0), False)]


@pytest.mark.parametrize(("change", "expected"), CHANGED)
def test_only_floating_numbers_may_be_rounded(change: tuple[float, ...], expected: bool) -> None:
    row = torch.tensor([2.0**53 - 2, 1000.0, 100.0], dtype=torch.float64)
    rows = torch.stack([row, row, row + torch.tensor(change, dtype=torch.float64)])
    assert bool(alike.same(rows)) is expected


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.complex128, torch.float8_e5m2], ids=str)
def test_bits_of_all_kinds_add_up(kind: torch.dtype) -> None:
    flat = Flat(layout_of({"a": torch.ones(5).to(kind)}), (torch.ones(5).to(kind),))
    (one,) = alike.bits(flat)
    flat.buffers[0][4:] = torch.zeros(1).to(kind)
    assert alike.bits(flat) != [one]

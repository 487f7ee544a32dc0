"""What a pipelined program does besides agreeing with one device."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, distributed, nn

import forgather_fn as ff
from forgather_fn.activation_checkpointing import activation_checkpointed
from forgather_fn.batch import as_batch
from forgather_fn.pipeline import SplitError, Stages
from forgather_fn.testing.processes import Processes, ProcessesFailed, processes
from tests.pipeline import runs
from tests.pipeline.models import MODELS, Block, Plain, llama, words

ONE = MODELS["plain"]
CUT = ONE.spec(2)


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    with processes(4) as pool:
        yield pool


def compared(found: list[runs.Found], one: runs.Found, tolerance: float = 0.0) -> None:
    assert set().union(*(run.params for run in found)) == set(one.params)
    for run in found:
        for name, tensor in run.params.items():
            torch.testing.assert_close(tensor, one.params[name], rtol=0, atol=tolerance)
        for mine, others in zip(run.metrics, one.metrics, strict=True):
            assert mine["loss"] == pytest.approx(others["loss"], rel=tolerance or 1e-12)
        assert run.evaluated == pytest.approx(one.evaluated, rel=tolerance or 1e-12)


CASES: dict[str, dict[str, Any]] = {
    "uneven microbatches": {"microbatches": 3},
    "one microbatch of many": {"microbatches": 8},
    "bfloat16": {"precision": "bfloat16"},
    "float64": {"precision": "float64"},
    "a loss that is no objective": {"loss": "mean"},
    "an average": {"average": True},
    "noise": {"noise": True},
}


def plan_of(case: str) -> ff.Plan:
    changes = dict(CASES[case]) | {"transforms": ()}
    if changes.pop("loss", None):
        changes["loss"] = lambda outputs, batch: ff.Mean(ff.losses.causal_lm.total(outputs, batch), 7)
    if changes.pop("average", None):
        changes["average"] = ff.ema(0.9)
    if changes.pop("noise", None):
        changes["transforms"] = (ff.noise(0.01),)
    return runs.plan_of(ONE, **changes)


def run_case(case: str, pipelines: int) -> runs.Found:
    return runs.run(
        ff.pipelined(plan_of(case), CUT, schedule="1F1B" if pipelines == 1 else "GPipe", pipelines=pipelines)
    )


@pytest.mark.parametrize("case", CASES)
def test_plans_of_any_kind_agree_with_one_device(two: Processes, case: str) -> None:
    pool = two
    compared(pool.run(run_case, case, 1), runs.run(ff.single(plan_of(case))))


def spread(name: str) -> runs.Found:
    plan = runs.plan_of(MODELS[name], microbatches=4)
    return runs.run(ff.pipelined(plan, MODELS[name].spec(2), schedule="GPipe", pipelines=2))


@pytest.mark.parametrize("name", ["plain", "llama_tied"])
def test_two_pipelines_of_two(four: Processes, name: str) -> None:
    found = four.run(spread, name)
    compared(found, runs.single(name, {}), 5e-6)
    for one, other in ((0, 2), (1, 3)):
        assert all(torch.equal(tensor, found[other].params[n]) for n, tensor in found[one].params.items())


def normalised(how: str, folder: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics of batches, which the stages keep."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(4)]
    plan = ff.Plan(
        model=nn.Sequential(*layers, nn.Linear(6, 3)),
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(),
        schedule=1e-2,
        microbatches=4,
    )
    pipelines = 2 if how == "two pipelines" else 1
    program = ff.single(plan) if how == "one device" else ff.pipelined(plan, {"1": "end"}, pipelines=pipelines)
    state = program.init()
    for i in range(3):
        torch.manual_seed(i)
        state, _ = program.step(state, (torch.randn(16, 6), torch.randint(0, 3, (16,))))
    if folder is not None:
        ff.checkpoint.save(program, state, folder)
    return dict(state.params), {name: buffer.clone() for name, buffer in state.buffers.items()}


def test_statistics_of_batches_are_those_of_one_device(two: Processes, tmp_path: Any) -> None:
    params, buffers = normalised("one device")
    for rank, (own, kept) in enumerate(two.run(normalised, "one pipeline", str(tmp_path))):
        torch.testing.assert_close(own, {name: params[name] for name in own}, rtol=0, atol=0)
        mine = [name for name in kept if (int(name[0]) > 1) == bool(rank)]
        torch.testing.assert_close({n: kept[n] for n in mine}, {n: buffers[n] for n in mine}, rtol=0, atol=0)
    saved = ff.checkpoint.load(tmp_path).tensors["model"]
    torch.testing.assert_close({name: saved[name] for name in buffers}, buffers, rtol=0, atol=0)


def test_two_pipelines_keep_the_statistics_of_the_first(four: Processes) -> None:
    found = four.run(normalised, "two pipelines")
    for one, other in ((0, 2), (1, 3)):
        torch.testing.assert_close(found[one], found[other], rtol=0, atol=0)


def recomputing(name: str, pipelined: bool) -> runs.Found:
    plan = runs.plan_of(MODELS[name], transforms=())
    if name == "plain":
        activation_checkpointed(plan.model, Block)  # type: ignore[type-var]
    else:
        plan.model.activation_checkpointing_enable()  # type: ignore[operator, union-attr]
    program = ff.pipelined(plan, MODELS[name].spec(4), schedule="ZBVZeroBubble") if pipelined else ff.single(plan)
    return runs.run(program)


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_activations_are_recomputed_inside_stages(two: Processes, name: str) -> None:
    compared(two.run(recomputing, name, True), recomputing(name, False))


def with_dropout(schedule: str, stages: int, folder: str | None = None) -> runs.Found:
    torch.manual_seed(1)
    plan = attrs.evolve(runs.plan_of(ONE), model=Plain(dropout=0.3))
    program = ff.pipelined(plan, ONE.spec(stages), schedule=schedule)
    if folder is None:
        return runs.run(program)
    state = program.init(seed=3)
    for batch in runs.batches(3):
        state, _ = program.step(state, batch)
    ff.checkpoint.save(program, state, folder)
    return runs.run(program, steps=3, state=program.restore(folder))


@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 2), ("DualPipeV", 4)])
def test_dropout_repeats_and_resumes_to_the_bit(two: Processes, tmp_path: Any, schedule: str, stages: int) -> None:
    first, again = two.run(with_dropout, schedule, stages), two.run(with_dropout, schedule, stages)
    resumed = two.run(with_dropout, schedule, stages, str(tmp_path))
    for one, other, third in zip(first, again, resumed, strict=True):
        assert one.metrics == other.metrics
        assert one.metrics[3:] == third.metrics
        for name, tensor in one.params.items():
            assert torch.equal(tensor, other.params[name])
            assert torch.equal(tensor, third.params[name])
    assert first[0].metrics != runs.single("plain", {}).metrics  # dropout is live


def test_masks_follow_the_stage_and_not_the_process(two: Processes, four: Processes) -> None:
    found = two.run(with_dropout, "Interleaved1F1B", 4) + four.run(with_dropout, "GPipe", 4)
    tensors = {name: tensor for run in found for name, tensor in run.params.items()}
    for run in found:
        assert run.evaluated == found[0].evaluated
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in run.params.items())


def by_name(meta: bool, pipelined: bool) -> tuple[runs.Found, int]:
    with torch.device("meta" if meta else "cpu"):
        model = llama(tied=True)
    plan = runs.plan_of(MODELS["llama_tied"], model=model, init="by_name", transforms=())
    program = ff.pipelined(plan, MODELS["llama_tied"].spec(2)) if pipelined else ff.single(plan)
    state = program.init(seed=3)
    return runs.run(program, state=state), sum(p.numel() for p in program.module().parameters())


@pytest.mark.parametrize("meta", [False, True])
def test_values_by_name_are_those_of_one_device_and_no_process_has_all(two: Processes, meta: bool) -> None:
    (one, whole), found = by_name(False, False), two.run(by_name, meta, True)
    compared([run for run, _ in found], one, 5e-6)
    assert all(0.4 * whole < own < 0.8 * whole for _, own in found)


def looked_at() -> tuple[Any, ...]:
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    state = program.init(seed=3)
    batch = words(samples=5, time=8)
    named = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = program.apply(state, **named)
    exported = program.export(state)
    gradients, _, metrics = program.gradients(state, words())
    after, _ = program.update(state, gradients)
    wants = frozenset({"gradient_norms", "parameter_norms", "update_norms"})
    stepped, wanted = program.step(program.init(seed=3), words(), wants=wants)
    same = all(torch.equal(after.params[name], stepped.params[name]) for name in stepped.params)
    return (
        outputs,
        exported.state_dict(),
        sorted(n for n in wanted if "_norm/" in n),
        same,
        float(metrics["loss"]),
    )


def test_outputs_the_model_and_norms_are_on_every_process(two: Processes) -> None:
    model = ONE.module()
    batch = words(samples=5, time=8)
    expected = model.eval()(batch["input_ids"], batch["attention_mask"])
    for outputs, exported, norms, same, _ in two.run(looked_at):
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
        torch.testing.assert_close(dict(exported), dict(model.state_dict()), rtol=0, atol=0)
        kinds = "grad_norm", "param_norm", "update_norm"
        assert norms == sorted(f"{kind}/{name}" for kind in kinds for name, _ in model.named_parameters())
        assert same


def moved_by_hand(pipelined: bool) -> tuple[dict[str, Tensor], float]:
    """By gradients that somebody else has taken, of which each process has those of its stages."""
    plan = runs.plan_of(MODELS["plain_tied"])
    program = ff.pipelined(plan, CUT) if pipelined else ff.single(plan)
    state = program.init(seed=3)
    gradients = {name: torch.ones_like(p) for name, p in state.params.items()}
    state, metrics = program.update(state, gradients, batch=words())
    return {name: p.clone() for name, p in state.params.items()}, float(metrics["grad_norm"])


def test_gradients_of_ones_own_are_clipped_by_the_norm_over_all_stages(two: Processes) -> None:
    params, norm = moved_by_hand(False)
    for own, found in two.run(moved_by_hand, True):
        assert found == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(own, {name: params[name] for name in own}, rtol=0, atol=1e-6)


def streamed(pipelined: bool, pipelines: int = 1) -> list[float]:
    """Over the seam of epochs, where a batch has fewer samples than there are microbatches."""
    plan = runs.plan_of(ONE, transforms=())
    program = ff.pipelined(plan, CUT, schedule="GPipe", pipelines=pipelines) if pipelined else ff.single(plan)
    data = ff.batches(words(samples=11), batch_size=8, last="ragged")
    return [float(tick.metrics["loss"]) for tick in ff.until(steps=4)(program.steps(program.init(seed=3), data))]


def test_ends_of_epochs_have_fewer_microbatches(two: Processes) -> None:
    assert two.run(streamed, True) == [streamed(False)] * 2


def auto(example: bool, schedule: str) -> set[str]:
    plan = runs.plan_of(ONE)
    program = ff.pipelined(plan, "auto", schedule=schedule, example=words() if example else None)
    state = program.init(seed=3)
    state, _ = program.step(state, words())
    return set(state.params)


@pytest.mark.parametrize(("example", "schedule"), [(False, "1F1B"), (True, "ZBVZeroBubble")])
def test_cuts_can_be_found(two: Processes, example: bool, schedule: str) -> None:
    one, other = two.run(auto, example, schedule)
    assert not one & other
    assert one | other == set(dict(ONE.module().named_parameters()))


class Backwards(nn.Module):
    """Its modules are registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(40))  # of the root, and used last
        self.embed = nn.Embedding(40, 16)
        self.layer = nn.ModuleList(Block(16, 0.0) for _ in range(4))
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layer:
            hidden = layer(hidden)
        return self.head(hidden) * self.scale


def registered_backwards(example: bool, meta: bool) -> list[str]:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = Backwards()
    if meta:
        model.reset_parameters = lambda: nn.init.ones_(model.scale)  # type: ignore[method-assign, assignment]
    plan = runs.plan_of(ONE, model=model, init="by_name" if meta else "as_built")
    program = ff.pipelined(plan, {"layer.1": "end"}, example=words() if example else None)
    state, _ = program.step(program.init(), words())
    return list(state.params)


def test_an_example_tells_which_stage_uses_what(two: Processes) -> None:
    with pytest.raises(ProcessesFailed, match="scale is used in stage 1, and lies in the modules of stage 0"):
        two.run(registered_backwards, False, False)
    for meta in (False, True):
        first, second = two.run(registered_backwards, True, meta)
        assert "scale" not in first
        assert "scale" in second


class Reusing(nn.Module):
    """A stage uses one layer twice, and a parameter of its own in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.first = Block(16, 0.0)
        self.shared, self.scale, self.between = nn.Linear(16, 16), Scale(), Block(16, 0.0)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.first(self.embed(input_ids))
        scale = self.scale()
        return self.head(self.shared(self.between(torch.tanh(self.shared(hidden * scale))) * scale))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(16))

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw)


def reusing(pipelined: bool, frozen: bool = False) -> runs.Found:
    torch.manual_seed(0)
    model = Reusing()
    if frozen:
        model.embed.requires_grad_(False)
        model.head.requires_grad_(False)
    plan = runs.plan_of(ONE, model=model, transforms=(), precision="float64")
    cuts = {"embed": "end", "first": "end", "head": "beginning"}
    return runs.run(ff.pipelined(plan, cuts, schedule="ZBVZeroBubble") if pipelined else ff.single(plan))


def test_a_stage_may_use_a_parameter_twice_where_gradients_are_put_off(two: Processes) -> None:
    compared(two.run(reusing, True), reusing(False), 1e-12)


def test_a_process_without_a_parameter_to_train_is_named(two: Processes) -> None:
    with pytest.raises(ProcessesFailed, match="rank 0 has no parameter to train") as caught:
        two.run(reusing, True, True)
    assert all("SplitError" in text for text in caught.value.errors.values())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 40)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(hidden * attention_mask.unsqueeze(-1))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


def by_hand(pipelined: bool) -> runs.Found:
    torch.manual_seed(0)
    model = Stages([First(), nn.Sequential(Block(16, 0.0)), Block(16, 0.0), Head()])
    plan = runs.plan_of(ONE, model=model, transforms=())
    return runs.run(ff.pipelined(plan, model.split_spec, schedule="Interleaved1F1B") if pipelined else ff.single(plan))


def test_stages_written_by_hand(two: Processes) -> None:
    compared(two.run(by_hand, True), by_hand(False))


def test_one_process_is_one_device_with_proved_cuts() -> None:
    one = runs.single("plain", {})  # whose norm is measured as that of a pipeline
    here = runs.run(ff.pipelined(runs.plan_of(ONE), ONE.spec(4), schedule="DualPipeV"))
    compared([here], one)
    with pytest.raises(SplitError, match="after the cut, reads"):
        runs.run(ff.pipelined(runs.plan_of(ONE), {"layer.3.lower": "end"}))


@pytest.mark.parametrize(
    ("plan", "options", "said"),
    [
        ({"compile": "model"}, {}, "Plan.compile=.... cannot be"),
        ({"update": "in_backward", "transforms": (), "microbatches": 1}, {}, "cannot be: gradients of several"),
        ({}, {"stages_per_rank": 3}, "use 2 cuts"),
        ({}, {"pipelines": 2}, "1 processes cannot be spread evenly over pipelines=2"),
        ({}, {"schedule": "zigzag"}, "is not one of GPipe"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(plan: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ff.pipelined(runs.plan_of(ONE, **plan), CUT, **options)


def trained_on_other_words(how: str) -> str:
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    batch = words()
    if distributed.get_rank() == 1:
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    state = program.init(seed=3)
    try:
        if how == "loop":
            ff.last(program.steps(state, [batch]))
        else:
            program.step(state, batch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(("how", "what"), [("loop", "run must be given the same data"), ("step", "pipeline must be")])
def test_the_inputs_of_one_process_do_not_meet_the_labels_of_another(two: Processes, how: str, what: str) -> None:
    first, second = two.run(trained_on_other_words, how)
    assert first == second
    assert f"ValueError: the processes of a {what}" in first


def unlike(how: str) -> str:
    rank = distributed.get_rank()
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    state = program.init(seed=3)
    state, _ = program.step(state, words())
    batch: Any = words(samples=8, time=6)
    if rank == 1:
        batch = {"shape": words(time=7), "count": words(samples=6), "few": words(samples=3)}[how]
    try:
        program.step(state, batch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("how", ["shape", "count", "few"])
def test_other_batches_are_refused_before_anything_is_sent(two: Processes, how: str) -> None:
    for rank, told in enumerate(two.run(unlike, how)):
        if how == "few" and rank == 1:
            assert "each microbatch needs at least one" in told
        else:
            assert "ValueError: the processes of a pipeline must be given the same batch" in told
            assert "rank 1: " in told


def failing(where: int) -> None:
    program = ff.pipelined(runs.plan_of(ONE), ONE.spec(2))
    state = program.init(seed=3)
    state, _ = program.step(state, words())
    if distributed.get_rank() == where:

        def fail(module: nn.Module, args: Any) -> None:
            raise KeyError("the stage of this rank")

        program.module().layer[where * 4 + 1].register_forward_pre_hook(fail)  # type: ignore[index, union-attr]
    program.step(state, words())


@pytest.mark.parametrize("where", [0, 1])
def test_what_fails_in_a_stage_is_told_as_it_was_raised(two: Processes, where: int) -> None:
    with pytest.raises(ProcessesFailed) as caught:
        two.run(failing, where)
    assert str(caught.value).startswith(f"rank {where}:")
    assert "KeyError: 'the stage of this rank'" in caught.value.errors[where]
    assert as_batch(words()).samples == 8


def killed() -> None:
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    state, _ = program.step(program.init(seed=3), words())
    if distributed.get_rank() == 1:
        hook = lambda module, args: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        program.module().layer[5].register_forward_pre_hook(hook)  # type: ignore[index, union-attr]
    program.step(state, words())


def test_a_process_that_is_killed_ends_the_others_at_once(two: Processes) -> None:
    two.run(distributed.get_rank)  # they have been started
    began = time.monotonic()
    with pytest.raises(ProcessesFailed) as caught:
        two.run(killed)
    assert time.monotonic() - began < 5
    assert "exit code -9" in caught.value.errors[1]
    assert "RuntimeError" in caught.value.errors[0]


def same_batch_twice() -> list[int]:
    """A batch of a form that was seen before needs no pass of its own."""
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    state, calls = program.init(seed=3), []
    counts = []
    program.module().register_forward_pre_hook(lambda *args: calls.append(1))
    for length in (6, 6, 9, 6):
        calls.clear()
        state, _ = program.step(state, words(time=length))
        counts.append(len(calls))
    return counts


def test_a_form_of_batch_is_learnt_once(two: Processes) -> None:
    # The first step proves the cuts (1) and finds the shapes (1); each runs four microbatches.
    assert two.run(same_batch_twice) == [[6, 4, 5, 4]] * 2

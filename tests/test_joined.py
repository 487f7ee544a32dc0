"""Several models in one state: a GAN and an actor with its critic are trained, left, and taken up again."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import toolz
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.mean import Mean
from forgather_fn.random import key, seeded
from tests.toys import assert_equal, classifier, labelled, labelled_batches


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


class Critic(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))


def judged(outputs: Tensor, batch: Mapping[str, Any]) -> Mean:
    """Tell what is real from what is not."""
    return Mean(F.binary_cross_entropy_with_logits(outputs, batch["real"], reduction="sum"), len(outputs))


def believed(outputs: Tensor, batch: Mapping[str, Any]) -> Mean:
    """Be taken for real by the critic."""
    verdict = batch["critic"](outputs)
    return Mean(F.softplus(-verdict).sum(), len(outputs))


GAN = {
    "critic": ff.Plan(model=Critic, loss=judged, optimizer=ff.adam(betas=(0.5, 0.99)), schedule=2e-3),
    "generator": ff.Plan(
        model=Generator, loss=believed, optimizer=ff.adam(betas=(0.5, 0.99)), schedule=1e-3, average=ff.ema(0.9)
    ),
}


def gan_step(programs: Any, states: dict[str, ff.TrainState], batch: Any) -> Any:
    """Two steps of the critic and one of the generator, on noise of the joint state's key."""
    (real,) = batch
    metrics: dict[str, Any] = {}
    for _ in range(2):
        with torch.no_grad():
            fake = ff.frozen(programs["generator"], states["generator"])(torch.randn(len(real), 2))
        samples = {
            "input": torch.cat([real, fake]),
            "real": torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)]),
        }
        states["critic"], found = programs["critic"].step(states["critic"], samples)
        metrics |= {f"critic/{name}": value for name, value in found.items()}
    critic = ff.frozen(programs["critic"], states["critic"])
    noise = {"input": torch.randn(len(real), 2), "critic": critic}
    states["generator"], found = programs["generator"].step(states["generator"], noise)
    return states, metrics | {f"generator/{name}": value for name, value in found.items()} | {"loss": found["loss"]}


def distance(programs: Any, states: Any, data: Any) -> dict[str, float]:
    """How far the averages of what is generated are from the data's."""
    (real,) = next(iter(data))
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    fake = programs["generator"].apply(states["generator"], noise, params="ema")
    return {"mean": float((fake.mean(0) - real.mean(0)).norm()), "spread": float((fake.std(0) - real.std(0)).norm())}


def gan(**changes: Any) -> ff.Program:
    members = {name: attrs.evolve(plan, **changes) for name, plan in GAN.items()}
    return ff.joined(members, gan_step, evaluate=distance)


def gaussian(count: int = 256) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(count, 2, generator=generator) * torch.tensor([0.5, 1.5]) + torch.tensor([2.0, -1.0]),)


def gan_data(batch_size: int = 64) -> ff.Stream:
    return ff.batches(gaussian(), batch_size=batch_size)


def test_a_gan_learns_a_gaussian():
    program = gan()
    state = program.init(0)
    before = program.evaluate(state, [gaussian()])
    final = toolz.pipe(program.steps(state, gan_data()), ff.until(steps=400), ff.last)
    after = program.evaluate(final, [gaussian()])
    assert before["mean"] > 1.5
    assert after["mean"] < 0.35
    assert after["spread"] < 0.5
    states = ff.members(final)
    assert (final.step, states["critic"].step, states["generator"].step) == (400, 800, 400)
    assert int(final.updates) == 1200


def test_it_is_two_programs_stepped_by_hand():
    """The joint state is the two states, and nothing is lost or added on the way."""
    program = gan()
    state = program.init(5)
    states = {name: member.copy() for name, member in ff.members(state).items()}
    alone = {name: ff.single(plan) for name, plan in GAN.items()}
    for member in alone:
        alone[member].init(0)
    for step in range(3):
        batch = (gaussian()[0][step * 8 : step * 8 + 8],)
        with seeded(key(5, step, "joined"), torch.device("cpu")):
            states, _ = gan_step(alone, states, batch)
        state, _ = program.step(state, batch)
    for name, member in ff.members(state).items():
        assert_equal(member, states[name])


def test_the_gradient_of_the_generator_goes_through_the_critic_and_not_to_it():
    program = gan()
    state = program.init(0)
    states, programs = ff.members(state), program.members
    critic = programs["critic"].module()
    noise = torch.randn(8, 2)
    for parameter in critic.parameters():
        parameter.grad = None
    judge = ff.frozen(programs["critic"], states["critic"])
    with seeded(key(states["generator"].seed, 0, 0, "forward"), torch.device("cpu")):
        module = programs["generator"].module()
        loss = believed(module(noise), {"critic": critic}).value()  # through the module itself
        expected = torch.autograd.grad(loss, list(module.parameters()))
    taken, _, _ = programs["generator"].gradients(states["generator"], {"input": noise, "critic": judge})
    assert all(parameter.grad is None for parameter in critic.parameters())
    for name, found in zip(taken.views, expected, strict=True):
        torch.testing.assert_close(taken.resolved().views[name], found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("donate", [True, False])
def test_the_same_call_gives_the_same_bits(donate):
    program = gan(donate=donate)
    state = program.init(0)
    one, other = program.step(state.copy(), gaussian(8))[0], program.step(state.copy(), gaussian(8))[0]
    assert_equal(one, other)
    kept = state.copy()
    torch.manual_seed(99)
    third, _ = program.step(state, gaussian(8))
    assert_equal(third, one)
    assert state.consumed is donate
    if not donate:
        assert_equal(state, kept)
    other = gan(donate=not donate)
    assert_equal(one, other.step(other.init(0), gaussian(8))[0])


def test_a_consumed_state_refuses_and_so_do_its_members():
    program = gan()
    state = program.init(0)
    states = ff.members(state)
    program.step(state, gaussian(8))
    with pytest.raises(ff.ConsumedStateError, match="consumed by step 0"):
        _ = state.params
    with pytest.raises(ff.ConsumedStateError):
        ff.members(state)
    for member in states.values():
        with pytest.raises(ff.ConsumedStateError):
            _ = member.params


def failing(at: str) -> Any:
    def step(programs: Any, states: Any, batch: Any) -> Any:
        if at == "first":
            raise RuntimeError("first")
        states["critic"], _ = programs["critic"].step(
            states["critic"], {"input": batch[0], "real": torch.ones(len(batch[0]), 1)}
        )
        raise RuntimeError("second")

    return step


def test_a_step_that_fails_before_any_update_consumes_nothing():
    program = ff.joined(GAN, failing("first"))
    state = program.init(0)
    kept = state.copy()
    with pytest.raises(RuntimeError, match="first"):
        program.step(state, gaussian(8))
    assert_equal(state, kept)


def test_a_step_that_fails_after_an_update_says_so():
    program = ff.joined(GAN, failing("second"))
    state = program.init(0)
    with pytest.raises(RuntimeError, match="second"):
        program.step(state, gaussian(8))
    with pytest.raises(ff.ConsumedStateError, match="step 0, which failed when it had updated 'critic'"):
        _ = state.params
    keeping = ff.joined({name: attrs.evolve(plan, donate=False) for name, plan in GAN.items()}, failing("second"))
    state = keeping.init(0)
    kept = state.copy()
    with pytest.raises(RuntimeError, match="second"):
        keeping.step(state, gaussian(8))
    assert_equal(state, kept)


@pytest.mark.parametrize("async_", [True, False])
def test_left_at_any_step_and_taken_up_again(tmp_path, async_):
    program = gan()
    reports: list[Mapping[str, float]] = []
    whole = toolz.pipe(
        program.steps(program.init(4), gan_data(50)),
        ff.every(1, ff.saved(tmp_path, async_=async_), ff.report(lambda row: reports.append(row.values))),
        ff.until(steps=5),
        ff.last,
    )
    assert {"critic/loss", "generator/loss", "generator/grad_norm"} <= set(reports[0])
    for step in range(1, 5):
        again = gan()
        state = again.restore(tmp_path / "checkpoints" / f"checkpoint-{step}")
        assert (state.step, ff.members(state)["critic"].step) == (step, 2 * step)
        assert_equal(toolz.pipe(again.steps(state, gan_data(50)), ff.until(steps=5), ff.last), whole)


def test_a_checkpoint_is_one_commit_under_names_of_the_members(tmp_path: Path):
    program = gan()
    state, _ = program.step(program.init(0), gaussian(8))
    loaded = ff.checkpoint.load(ff.checkpoint.save(program, state, tmp_path))
    assert {name.partition(".")[0] for name in loaded.tensors["model"]} == {"critic", "generator"}
    assert "generator.1.running_mean" in loaded.tensors["model"]
    assert set(loaded.tensors["ema"]) == {f"generator.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    other = ff.joined({**GAN, "critic": attrs.evolve(GAN["critic"], optimizer=ff.sgd())}, gan_step)
    with pytest.raises(ff.checkpoint.CheckpointError, match=r"optimizer:\n.*critic: optimizer=adam\("):
        other.restore(tmp_path)
    fresh = gan().restore(tmp_path, without={"optimizer", "progress"})
    assert (fresh.step, ff.members(fresh)["critic"].step) == (0, 0)
    assert not any(tensor.any() for tensor in fresh.opt["critic"]["exp_avg"].values())
    with pytest.raises(ValueError, match="takes only 'optimizer' and 'progress'"):
        gan().restore(tmp_path, without={"ema"})


def test_steps_may_be_over_some_of_the_members():
    def step(programs: Any, states: Any, batch: Any) -> Any:
        states["one"], metrics = programs["one"].step(states["one"], batch)
        if states["one"].step % 2 == 0:
            states["other"], _ = programs["other"].step(states["other"], batch)
        return states, metrics

    plan = ff.Plan(model=classifier, loss=ff.losses.cross_entropy, optimizer=ff.adamw(), schedule=0.01)
    program = ff.joined({"one": plan, "other": plan}, step)
    state = ff.fold(program.step, program.init(0), labelled_batches(5))
    states = ff.members(state)
    assert (states["one"].step, states["other"].step, state.samples) == (5, 2, 30)
    alone = ff.single(plan)
    assert_equal(states["one"], ff.fold(alone.step, alone.init(states["one"].seed), labelled_batches(5)))
    assert len({member.seed for member in states.values()}) == 2


class Policy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4))


class Value(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def advantage(outputs: Tensor, batch: Mapping[str, Tensor]) -> Mean:
    """The policy gradient, of what actions brought beyond what was expected."""
    chosen = outputs.log_softmax(-1).gather(1, batch["action"][:, None])[:, 0]
    return Mean(-(chosen * batch["advantage"]).sum(), len(outputs))


def squared(outputs: Tensor, batch: Mapping[str, Tensor]) -> Mean:
    return Mean((outputs[:, 0] - batch["reward"]).square().sum(), len(outputs))


def bandit_step(programs: Any, states: dict[str, ff.TrainState], batch: Any) -> Any:
    """Act, see the reward (1 if the action is the number of the context), and let both learn from it."""
    (contexts,) = batch
    seen = F.one_hot(contexts, 3).float()
    scores = programs["actor"].apply(states["actor"], seen)
    actions = torch.distributions.Categorical(logits=scores).sample()
    rewards = (actions == contexts).float()
    expected = programs["critic"].apply(states["critic"], seen)[:, 0]
    samples = {"input": seen, "action": actions, "advantage": rewards - expected}
    states["actor"], metrics = programs["actor"].step(states["actor"], samples)
    states["critic"], _ = programs["critic"].step(states["critic"], {"input": seen, "reward": rewards})
    return states, {**metrics, "reward": Mean(rewards.sum(), len(rewards))}


def test_an_actor_and_its_critic_learn_a_bandit():
    actor = ff.Plan(model=Policy, loss=advantage, optimizer=ff.adam(), schedule=2e-2)
    critic = ff.Plan(model=Value, loss=squared, optimizer=ff.sgd(momentum=0.9), schedule=1e-2)
    program = ff.joined({"actor": actor, "critic": critic}, bandit_step)
    contexts = torch.randint(0, 3, (256,), generator=torch.Generator().manual_seed(0))
    rewards = []
    for tick in program.steps(program.init(0), ff.batches((contexts,), batch_size=32)):
        rewards.append(float(tick.metrics["reward"].value()))
        if tick.state.step == 120:
            break
    assert sum(rewards[:5]) / 5 < 0.5
    assert sum(rewards[-5:]) / 5 > 0.9
    value = program.members["critic"].apply(ff.members(tick.state)["critic"], torch.eye(3))
    assert value.mean() > 0.6


def test_conversion_is_of_the_members():
    program = gan()
    state, _ = program.step(program.init(0), gaussian(8))
    frozen = ff.adam(betas=(0.5, 0.99), groups=[ff.group("0.*", frozen=True)])
    other = ff.joined({**GAN, "generator": attrs.evolve(GAN["generator"], optimizer=frozen)}, gan_step)
    moved = program.convert(state, other)
    assert "generator.0.weight" in moved.frozen
    assert_equal(ff.members(moved)["critic"], ff.members(state)["critic"])
    later, _ = other.step(moved, gaussian(8))
    assert later.step == 2
    with pytest.raises(ValueError, match="are carried to those of another with the same names"):
        program.convert(state, ff.single(GAN["critic"]))
    with pytest.raises(ValueError, match=r"dropping='0\.weight' begins with no member's name"):
        program.convert(state, other, dropping=["0.weight"])


def test_a_copy_has_parts_of_its_own():
    program = gan()
    state = program.init(0)
    copied = state.copy()
    state, _ = program.step(state, gaussian(8))
    fresh = gan().init(0)
    assert_equal(copied, fresh)
    for name, member in ff.members(copied).items():
        assert_equal(member, ff.members(fresh)[name])


def test_export_gives_a_module_of_each():
    program = gan()
    state = program.init(0)
    exported = program.export(state)
    assert [type(module) for module in exported.values()] == [Critic, Generator]
    assert not math.isnan(float(exported["critic"](torch.zeros(1, 2)).detach()))


def test_norms_are_given_for_every_member():
    program = gan()
    _, metrics = program.step(program.init(0), gaussian(8), wants=frozenset({"gradient_norms"}))
    assert {"critic/grad_norm/0.weight", "generator/grad_norm/3.bias"} <= set(metrics)


def test_a_frozen_function_refuses_a_consumed_state_and_keeps_buffers():
    plan = attrs.evolve(GAN["generator"], loss=ff.losses.mse)
    program = ff.single(plan)
    state = program.init(0)
    before = state.copy()
    call = ff.frozen(program, state)
    call(torch.randn(4, 2))
    assert_equal(state, before)
    program.step(state, {"input": torch.randn(4, 2), "target": torch.zeros(4, 2)})
    with pytest.raises(ff.ConsumedStateError):
        call(torch.randn(4, 2))


PLAN = GAN["critic"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "there are no members"),
        ({"a.b": PLAN}, r"must be an identifier; got 'a\.b'"),
        ({"a": PLAN, "b": attrs.evolve(PLAN, device="meta")}, "on several devices, cpu, meta"),
        (
            {"a": attrs.evolve(PLAN, schedule=ff.schedules.on_plateau(0.1))},
            r"the schedule of a, on_plateau\(.* reacts to results",
        ),
        ({"a": ff.joined({"b": PLAN}, gan_step)}, "a is run by several processes, or joint itself"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(members, message):
    with pytest.raises(ValueError, match=message):
        ff.joined(members, gan_step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda programs, states, batch: ({"a": states["a"]}, {}), "must give the states of 'a', 'b', and gave 'a'"),
        (lambda programs, states, batch: (None, {}), "and gave NoneType"),
        (
            lambda programs, states, batch: (states, programs["a"].step(states["a"], batch)[1]),
            "the step gave the state of 'a' from before it was updated",
        ),
    ],
)
def test_steps_that_lose_a_state_are_told(step, message):
    plan = ff.Plan(model=classifier, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.01)
    program = ff.joined({"a": plan, "b": plan}, step)
    with pytest.raises(ValueError, match=message):
        program.step(program.init(0), labelled(6))


def test_what_is_of_the_parts_alone_is_refused():
    program = ff.joined(GAN, gan_step)
    with pytest.raises(ValueError, match="call program"):
        program.module()
    state = program.init(0)
    for call in (program.gradients, program.apply):
        with pytest.raises(ValueError, match=r"through program.members, 'critic', 'generator', on ff\.members"):
            call(state, gaussian(8))
    with pytest.raises(ValueError, match="evaluated by the function that it was made with"):
        program.evaluate(state, [gaussian(8)])
    with pytest.raises(ValueError, match="members: this state is of one model"):
        ff.members(ff.single(PLAN).init(0))


class TestRollback:
    """A joint step reports what its function chooses, and its members leave steps out."""

    def made(self) -> Any:
        member = ff.Plan(
            model=classifier, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.1, on_nonfinite="skip"
        )
        return ff.joined({"one": member}, self.step)

    @staticmethod
    def step(programs: Any, states: dict[str, ff.TrainState], batch: Any) -> Any:
        states["one"], metrics = programs["one"].step(states["one"], batch)
        return states, {"loss": metrics["loss"], "found": metrics["grad_norm"]}

    def batches(self) -> list[Any]:
        (features, labels), last = labelled_batches(2)
        return [(features, labels), (features * math.nan, labels), last]

    def test_on_a_result(self):
        made = self.made()
        watched = ff.folded("spike", ff.reducers.spikes(), metric="found")
        ticks = made.steps(made.init(0), self.batches())
        final = toolz.pipe(ticks, watched, ff.rollback(after=1, every=1, on="spike"), ff.last)
        assert final.controls["rollback"] == {"bad": 0, "times": 1}

    def test_the_counts_of_the_members_go_back_too(self):
        """Averages that are warmed up read them."""
        made, batch = self.made(), labelled_batches(1)[0]
        bad = {5: 1.0}
        ticks = made.steps(made.init(0), [batch] * 6)
        watched = ff.every(1, lambda tick: {"spike": bad.get(tick.state.step, 0.0)})
        final = toolz.pipe(ticks, watched, ff.rollback(after=1, every=3, on="spike"), ff.last)
        assert final.step == 6
        assert int(ff.members(final)["one"].updates) == 3 + 1
        assert int(ff.members(final)["one"].tokens) == 6 * 6
        assert ff.members(final)["one"].step == 6

    def test_the_metrics_that_it_looks_at_without_one_are_named(self):
        made = self.made()
        with pytest.raises(ValueError, match="the step has no metric 'grad_norm'; it has 'loss', 'found'"):
            toolz.pipe(made.steps(made.init(0), self.batches()), ff.rollback(after=1, every=1), ff.last)

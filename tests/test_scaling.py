"""float16: the loss is scaled by a number that is data in the state."""

import functools
import itertools
import math

import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import scaling, testing
from forgather_fn import step as step_module
from forgather_fn.state import Ownership
from forgather_fn.tree import difference
from tests import zoo
from tests.toys import (
    VIEWED,
    assert_equal,
    assert_no_gradients,
    classifier,
    decaying,
    labelled,
    labelled_batches,
    mean_cross_entropy,
    program,
    unchanged,
)

STORAGES = pytest.mark.parametrize("viewed_elements", [0, VIEWED])
NAN, CPU = math.nan, torch.device("cpu")
half = functools.partial(program, precision="float16")


def steep(count: int = 12, *, every: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw batches of which some have features so large that their gradients overflow when scaled, until it is less."""
    batches = labelled_batches(count)
    return [(x * (30000.0 if i % every < 2 else 1.0), y) for i, (x, y) in enumerate(batches)]


def steps(made: ff.Program, batches, state=None):
    """Give each state, as a copy, and the metrics of the step that led to it."""
    state = made.init(0) if state is None else state
    for batch in batches:
        state, metrics = made.step(state, batch)
        yield state.copy(), {name: float(value) for name, value in metrics.items()}


def scaled(state: ff.TrainState, scale: float) -> ff.TrainState:
    """Give a copy with another scale."""
    arrays = state.copy().read()
    held = {**arrays.loss_scale, "scale": torch.tensor(scale)}
    return attrs.evolve(state, arrays=attrs.evolve(arrays, loss_scale=held), ownership=Ownership())


def by_hand(model: nn.Module, batches, *, interval: int, max_norm: float | None = None):
    """Train with torch's own scaler, and give weights, scale, and count of updates in a row after each step."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=interval)
    optimizer = torch.optim.AdamW(decaying(model, 0.1), lr=1e-2, fused=True)
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mean_cross_entropy(model, batch)
        scaler.scale(loss).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        held = scaler.state_dict()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        yield weights, held["scale"], held["_growth_tracker"]


class TestByHand:
    @STORAGES
    @pytest.mark.parametrize("donate", [True, False])
    def test_each_step_is_that_of_torchs_scaler(self, monkeypatch, viewed_elements, donate):
        monkeypatch.setattr(scaling, "INTERVAL", 3)
        batches, scales = steep(), []
        ours = steps(half(classifier(), viewed_elements=viewed_elements, donate=donate), batches)
        for (state, _), (weights, scale, tracker) in zip(ours, by_hand(classifier(), batches, interval=3), strict=True):
            for name, weight in weights.items():
                far = 2e-7 if viewed_elements else 0.0  # a kernel treats the end of a tensor and of a buffer unlike
                torch.testing.assert_close(state.params[name], weight, atol=far, rtol=0)
            assert state.loss_scale["scale"].item() == scale
            assert state.loss_scale["growth_tracker"].item() == tracker
            scales.append(scale)
        assert int(state.skipped) >= 3
        assert int(state.skipped) + int(state.updates) == len(batches)
        assert any(later > earlier for earlier, later in itertools.pairwise(scales))  # it grew as well

    def test_clipping_sees_the_gradient_unscaled(self):
        batches = labelled_batches(8)
        ours = steps(half(classifier(), transforms=(ff.clipped(0.05),)), batches)
        theirs = by_hand(classifier(), batches, interval=2000, max_norm=0.05)
        for (state, _), (weights, _, _) in zip(ours, theirs, strict=True):
            for name, weight in weights.items():
                torch.testing.assert_close(state.params[name], weight, rtol=1e-5, atol=1e-7)

    def test_the_norm_and_the_gradients_that_are_given_are_unscaled(self):
        made, plain = half(classifier()), program(classifier())
        ours, _, _ = made.gradients(made.init(0), labelled(6))
        theirs, _, _ = plain.gradients(plain.init(0), labelled(6))
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-2, atol=1e-3)
        _, metrics = made.step(made.init(0), labelled(6))
        assert float(metrics["grad_norm"]) == pytest.approx(float(theirs.norm()), rel=1e-2)
        assert float(metrics["loss_scale"]) == scaling.INITIAL

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_compiled_steps_scale_alike(self, monkeypatch, microbatches):
        monkeypatch.setattr(scaling, "INTERVAL", 3)
        made = functools.partial(half, microbatches=microbatches, transforms=(ff.clipped(1.0),))
        eager = steps(made(classifier()), steep())
        compiled = steps(made(classifier(), compile=True, backend="aot_eager"), steep())
        for (one, seen), (other, also) in zip(eager, compiled, strict=True):
            for name, weight in one.params.items():
                torch.testing.assert_close(other.params[name], weight, rtol=1e-4, atol=1e-5)
            for name in ("scale", "growth_tracker"):
                assert torch.equal(one.loss_scale[name], other.loss_scale[name])
            for name in ("skipped", "updates", "tokens", "nonfinite"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert seen["loss_scale"] == also["loss_scale"]
        assert int(one.skipped) >= 3
        torch._dynamo.reset()


class TestOverflow:
    @pytest.mark.parametrize("policy", ["raise", "skip"])
    @pytest.mark.parametrize("flag", ["host", "device"])
    def test_only_the_scale_and_counters_change(self, monkeypatch, policy, flag):
        if flag == "device":
            monkeypatch.setattr(step_module, "flag_on_host", step_module.flag_on_device)
        made = half(classifier(), on_nonfinite=policy, average=ff.ema(0.5))
        before, _ = made.step(made.init(0), labelled(6))
        kept = before.copy()
        after, metrics = made.step(before, steep(1)[0])
        assert math.isfinite(float(metrics["loss"]))
        assert not math.isfinite(float(metrics["grad_norm"]))
        for part in ("params", "opt", "ema", "updates", "nonfinite"):
            assert difference(getattr(kept, part), getattr(after, part), part) is None
        assert after.loss_scale["scale"].item() == scaling.INITIAL / 2
        assert after.loss_scale["growth_tracker"].item() == 0
        assert (int(after.skipped), int(after.tokens), after.step) == (1, 12, 2)

    @pytest.mark.parametrize("flag", ["host", "device"])
    def test_a_scale_that_cannot_shrink_is_no_excuse(self, monkeypatch, flag):
        if flag == "device":
            monkeypatch.setattr(step_module, "flag_on_host", step_module.flag_on_device)

        class Exploding(nn.Linear):
            def forward(self, features):
                return super().forward(features) + (self.weight.sum() * 0).sqrt()  # the derivative at 0 is infinite

        made = half(Exploding(5, 3))
        state = scaled(made.init(0), scaling.MINIMUM * 2)
        state, _ = made.step(state, labelled(6))
        assert state.loss_scale["scale"].item() == scaling.MINIMUM
        if flag == "host":
            with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 1"):
                made.step(state, labelled(6))
            return
        state, _ = made.step(state, labelled(6))
        assert (int(state.nonfinite), int(state.skipped)) == (1, 1)
        state, _ = made.step(state, labelled(6))
        assert (int(state.nonfinite), int(state.skipped), int(state.tokens)) == (1, 1, 6)
        assert state.loss_scale["scale"].item() == scaling.MINIMUM

    def test_a_loss_that_is_not_finite_is_an_error_at_once(self):
        made = half(classifier())
        state = made.init(0)
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
            made.step(state, (labelled(6)[0] / 0, labelled(6)[1]))
        assert_no_gradients(made.module())

    def test_where_such_steps_are_skipped_the_scale_backs_off_as_torchs_does(self):
        made = half(classifier(), on_nonfinite="skip")
        state, _ = made.step(made.init(0), (labelled(6)[0] / 0, labelled(6)[1]))
        assert state.loss_scale["scale"].item() == scaling.INITIAL / 2
        state, _ = made.step(scaled(state, scaling.MINIMUM), (labelled(6)[0] / 0, labelled(6)[1]))
        assert state.loss_scale["scale"].item() == scaling.MINIMUM

    def test_buffers_of_a_step_that_is_left_out_are_those_before_it(self):
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        made = half(model, on_nonfinite="skip")
        before = made.init(0)
        after, _ = made.step(before.copy(), (labelled(6)[0] / 0, labelled(6)[1]))
        assert difference(before.buffers, after.buffers) is None


class TestScale:
    def test_it_adapts_as_torchs_kernel_does(self, monkeypatch):
        monkeypatch.setattr(scaling, "INTERVAL", 2)
        held, theirs = scaling.initial(CPU), tuple(scaling.initial(CPU).values())
        for found in [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]:
            flag = torch.tensor(float(found))
            held = scaling.adapted(held, flag, flag)
            torch._amp_update_scale_(*theirs, flag, scaling.GROWTH, scaling.BACKOFF, 2)
            assert [held["scale"].item(), held["growth_tracker"].item()] == [t.item() for t in theirs]

    def test_it_never_becomes_infinite(self, monkeypatch):
        monkeypatch.setattr(scaling, "INTERVAL", 1)
        zero = torch.tensor(0.0)
        largest = {"scale": torch.tensor(2.0**127), "growth_tracker": torch.tensor(0, dtype=torch.int32)}
        assert scaling.adapted(largest, zero, zero)["scale"].item() == 2.0**127

    def test_its_numbers_are_those_of_torch(self):
        scaler = torch.amp.GradScaler("cpu")
        assert scaler.get_scale() == scaling.INITIAL
        assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (scaling.GROWTH, scaling.BACKOFF)
        assert scaler.get_growth_interval() == scaling.INTERVAL

    def test_an_objective_in_float16_holds_the_scale(self):
        def loss(outputs, batch):
            return ff.Mean(outputs.half().logsumexp(-1).sum().half() * 1e-3, len(batch[1]))

        made = half(classifier(), loss=loss)
        state, metrics = made.step(made.init(0), labelled(6))
        assert math.isfinite(float(metrics["grad_norm"]))
        assert int(state.skipped) == 0

    def test_a_weight_that_is_known_afterwards_is_divided_out_too(self):
        def loss(outputs, batch):
            return {"loss": ff.losses.cross_entropy(outputs, batch)}

        found = []
        for one in (loss, ff.losses.cross_entropy):
            made = half(classifier(), microbatches=2, loss=one)
            gradients, _, _ = made.gradients(scaled(made.init(0), 256.0), labelled(7))  # of a sum, before it is divided
            found.append(gradients)
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-2, atol=1e-4)


class TestLaws:
    @STORAGES
    @pytest.mark.parametrize("name", ["mlp", "dropout", "batchnorm", "two_dtypes"])
    def test_of_a_step(self, name, viewed_elements):
        plan = zoo.plan_of(name, precision="float16", microbatches=2, viewed_elements=viewed_elements)
        testing.check_step(plan, zoo.SPECIMENS[name].batch(7))

    def test_of_resumption(self):
        testing.check_resume(
            zoo.plan_of("mlp", precision="float16"), ff.batches(zoo.SPECIMENS["mlp"].batch(7), batch_size=3)
        )

    def test_evaluation_runs_in_float16(self):
        made = half(classifier())
        assert made.apply(made.init(0), labelled(6)[0]).dtype == torch.float16


class TestCheckpoints:
    def test_the_scale_goes_on(self, tmp_path):
        made = half(classifier())
        data = ff.batches(labelled(24), batch_size=6)
        state = scaled(made.init(0), 2.0**70)  # which overflows at every step
        state = ff.last(ff.until(steps=3)(ff.every(3, ff.saved(tmp_path))(made.steps(state, data))))
        restored = half(classifier()).restore(tmp_path)
        assert_equal(state, restored)
        assert restored.loss_scale["scale"].item() == 2.0**67
        fresh = half(classifier()).restore(tmp_path, without={"loss_scale"})
        assert fresh.loss_scale["scale"].item() == scaling.INITIAL

    @pytest.mark.parametrize(("saved", "goes_on"), [("float16", "float32"), ("float32", "float16")])
    def test_another_precision_starts_without_it(self, tmp_path, saved, goes_on):
        made = program(classifier(), precision=saved)
        stream = made.steps(made.init(0), labelled_batches(1))
        ff.last(ff.at_end(ff.saved(tmp_path))(stream))
        state = program(classifier(), precision=goes_on).restore(tmp_path, allow={"precision"})
        assert state.loss_scale == ({} if goes_on == "float32" else scaling.initial(CPU))


class TestRefusals:
    def test_parameters_in_float16(self):
        with pytest.raises(ValueError, match=r"'0.weight', '0.bias', .* are in float16: .* model.float\(\)"):
            half(classifier(torch.float16)).init(0)

    def test_a_state_of_another_precision(self):
        made, other = half(classifier()), program(classifier())
        made.init(0)
        with pytest.raises(ValueError, match="another plan: a loss scale: False there, True here"):
            made.step(other.init(0), labelled(6))

    def test_a_loss_named_as_the_scale(self):
        mean = ff.Mean(torch.ones((), requires_grad=True), 1)
        made = half(classifier(), loss=lambda outputs, batch: {"loss": mean, "loss_scale": mean})
        with pytest.raises(ValueError, match="loss_scale"):
            made.step(made.init(0), labelled(6))

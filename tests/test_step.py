import copy
import math

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn import step as step_module
from forgather_fn import tree
from forgather_fn.data import Batch
from forgather_fn.random import key
from tests.toys import (
    VIEWED,
    Branches,
    Noisy,
    assert_equal,
    assert_no_gradients,
    assert_same_tensors,
    branching,
    by_hand,
    classifier,
    fused_adamw,
    labelled,
    labelled_batches,
    program,
    trained,
    unchanged,
)

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
NAN = float("nan")


def summed_cross_entropy(outputs, batch):
    """A loss as users write them: its weight is not known before it is called."""
    return ff.Mean(F.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1]))


class TestAgainstAPlainLoop:
    def test_autograds_own_gradients_give_the_bits_of_torch(self):
        model = classifier()
        by_hand(model, labelled_batches(20), fused_adamw(model))
        assert_same_tensors(trained(classifier(), labelled_batches(20), viewed_elements=0), model)

    def test_gradients_in_views_give_the_bits_of_torch_where_tensors_are_whole_vectors(self):
        def aligned():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 16, bias=False))

        batches = [(torch.sin(torch.arange(96.0) + i).reshape(6, 16), (torch.arange(6) + i) % 16) for i in range(20)]
        model = aligned()
        by_hand(model, batches, fused_adamw(model))
        assert_same_tensors(trained(aligned(), batches, viewed_elements=VIEWED), model)

    @pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 2e-7), (torch.float64, 1e-12)], ids=str)
    def test_gradients_in_views_differ_from_torch_by_rounding_at_most(self, dtype, far):
        # Torch's kernel rounds the tail of a tensor in another way than its whole vectors; flat storage has no tails.
        batches = labelled_batches(20, dtype=dtype)
        model = classifier(dtype)
        by_hand(model, batches, fused_adamw(model))
        assert_same_tensors(trained(classifier(dtype), batches, viewed_elements=VIEWED), model, atol=far)

    @STORAGES
    def test_dropout_batch_statistics_clipping_and_a_schedule(self, viewed_elements):
        batches = labelled_batches(12, dtype=torch.float64)
        rate = ff.schedules.cosine(peak=1e-2, warmup=3, total=12)
        model = Noisy().double()
        by_hand(model, batches, fused_adamw(model), learning_rate=rate, max_norm=0.1, seed=3)
        made = program(Noisy().double(), schedule=rate, transforms=[ff.clipped(0.1)], viewed_elements=viewed_elements)
        assert_same_tensors(ff.fold(made.step, made.init(3), batches), model, atol=1e-12)

    @STORAGES
    def test_microbatches_draw_under_keys_of_their_own(self, viewed_elements):
        features, labels = labelled(7, dtype=torch.float64)
        model = Noisy().double()
        optimizer = fused_adamw(model)
        for part, (x, y) in enumerate(zip(features.split([3, 2, 2]), labels.split([3, 2, 2]), strict=True)):
            torch.manual_seed(key(5, 0, part, "forward"))
            (F.cross_entropy(model(x), y, reduction="sum") / 7).backward()
        optimizer.step()
        made = program(Noisy().double(), microbatches=3, viewed_elements=viewed_elements)
        state, _ = made.step(made.init(5), (features, labels))
        assert_same_tensors(state, model, atol=1e-12)


class TestPurity:
    @STORAGES
    def test_donating_and_copying_give_the_same_bits(self, viewed_elements):
        changes = {"average": ff.ema(0.9), "transforms": [ff.clipped(0.1), ff.noise(0.1)], "microbatches": 2}
        donated = trained(Noisy(), labelled_batches(6), viewed_elements=viewed_elements, **changes)
        kept = trained(Noisy(), labelled_batches(6), viewed_elements=viewed_elements, donate=False, **changes)
        assert_equal(donated, kept)

    @STORAGES
    def test_the_same_call_twice_gives_the_same_bits_and_leaves_its_inputs(self, viewed_elements):
        made = program(Noisy(), donate=False, average=ff.ema(0.9), viewed_elements=viewed_elements)
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        batch = labelled(6, seed=9)
        given = copy.deepcopy(batch)
        with unchanged(state):
            one, _ = made.step(state, batch)
            other, _ = made.step(state, batch)
        assert_equal(one, other)
        assert all(torch.equal(a, b) for a, b in zip(batch, given, strict=True))

    def test_states_of_one_program_stepped_in_turn_equal_runs_of_their_own(self):
        made = program(Noisy(), average=ff.ema(0.9))
        states = [made.init(0), made.init(1)]
        alone = [state.copy() for state in states]
        for batch in labelled_batches(5):
            states = [made.step(state, batch)[0] for state in states]
        assert ff.difference(*states) is not None
        for state, begun in zip(states, alone, strict=True):
            assert_equal(state, ff.fold(made.step, begun, labelled_batches(5)))

    def test_no_global_generator_is_touched(self):
        made = program(Noisy(), transforms=[ff.noise(0.1)], microbatches=2)
        state = made.init(0)
        before = torch.get_rng_state()
        state, _ = made.step(state, labelled(6))
        made.evaluate(state, [labelled(6)])
        made.apply(state, labelled(6)[0])
        made.gradients(state, labelled(6))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_global_generator_does_not_matter(self):
        results = []
        for seed in (1, 2):
            made = program(Noisy())
            torch.manual_seed(seed)
            results.append(ff.fold(made.step, made.init(0), labelled_batches(3)))
        assert_equal(*results)

    def test_the_seed_of_the_run_matters(self):
        one, other = (program(Noisy()) for _ in range(2))
        results = [made.step(made.init(seed), labelled(6))[0] for seed, made in enumerate([one, other])]
        assert "params" in ff.difference(attrs.evolve(results[0], seed=1), results[1])


class TestComposition:
    @STORAGES
    @pytest.mark.parametrize("transforms", [(), (ff.clipped(0.05),), (ff.noise(0.1), ff.clipped(0.05))], ids=str)
    def test_a_step_is_gradients_and_update_to_the_bit(self, viewed_elements, transforms):
        made = program(Noisy(), transforms=transforms, average=ff.ema(0.9), viewed_elements=viewed_elements)
        stepped = made.init(0)
        composed = stepped.copy()
        for batch in labelled_batches(4):
            stepped, whole = made.step(stepped, batch)
            gradients, buffers, means = made.gradients(composed, batch)
            composed, rest = made.update(composed, gradients, buffers)
            assert float(means["loss"]) == float(whole["loss"])
            assert rest["learning_rate"] == whole["learning_rate"]
            assert float(rest["grad_norm"]) == float(whole["grad_norm"])
        assert_equal(stepped, composed)

    @STORAGES
    def test_gradients_are_those_of_the_mean_and_change_nothing(self, viewed_elements):
        model = classifier()
        made = program(model, viewed_elements=viewed_elements)
        state = made.init(0)
        with unchanged(state):
            gradients, _, _ = made.gradients(state, labelled(6))
            kept = {name: gradient.clone() for name, gradient in gradients.items()}
            made.gradients(state, labelled(6, seed=1))
        reference = classifier()
        (F.cross_entropy(reference(labelled(6)[0]), labelled(6)[1], reduction="sum") / 6).backward()
        for name, parameter in reference.named_parameters():
            assert torch.equal(gradients[name], kept[name])
            torch.testing.assert_close(gradients[name], parameter.grad)

    @STORAGES
    def test_an_update_does_not_consume_the_gradient(self, viewed_elements):
        made = program(Noisy(), donate=False, transforms=[ff.clipped(0.01)], viewed_elements=viewed_elements)
        state = made.init(0)
        gradients, buffers, _ = made.gradients(state, labelled(6))
        one, _ = made.update(state, gradients, buffers)
        other, _ = made.update(state, gradients, buffers)
        assert_equal(one, other)

    def test_without_buffers_an_update_keeps_those_of_the_state(self):
        made = program(Noisy())
        state = made.init(0)
        before = {name: buffer.clone() for name, buffer in state.buffers.items()}
        gradients, buffers, _ = made.gradients(state, labelled(6))
        assert not torch.equal(buffers["seen"], before["seen"])
        state, _ = made.update(state, gradients)
        assert all(torch.equal(state.buffers[name], before[name]) for name in before)

    def test_states_updated_with_the_same_resized_buffers_share_no_memory(self):
        class Growing(nn.Linear):
            def __init__(self):
                super().__init__(5, 3)
                self.register_buffer("history", torch.zeros(1))

            def forward(self, features):
                self.history = torch.cat([self.history, torch.ones(1)]) if len(self.history) < 2 else self.history + 1
                return super().forward(features)

        made = program(Growing())
        state = made.init(0)
        gradients, buffers, _ = made.gradients(state, labelled(6))
        one, _ = made.update(state.copy(), gradients, buffers)
        other, _ = made.update(state, gradients, buffers)
        with unchanged(other):
            made.step(one, labelled(6))

    def test_other_gradients_than_the_last_ones_may_be_applied(self):
        # The counts of leaves that are updated together part, without a step that sees it.
        def run(viewed_elements):
            made = program(Branches(), viewed_elements=viewed_elements)
            state = made.init(0)
            left, _, _ = made.gradients(state, branching(True, False))
            made.gradients(state, branching(True, True))
            state, _ = made.update(state, left)
            return made.step(state, branching(True, True))[0]

        viewed, own = run(VIEWED), run(0)
        assert own.opt["count"].tolist() == viewed.opt["count"].tolist() == [2, 2, 2, 2, 1, 1]
        for name, tensor in own.params.items():
            torch.testing.assert_close(viewed.params[name], tensor, atol=2e-7, rtol=0)


def test_gradients_of_their_own_are_let_go_after_a_step():
    model = classifier()
    made = program(model, viewed_elements=0)
    made.step(made.init(0), labelled(6))
    assert all(parameter.grad is None for parameter in model.parameters())


class TestAccumulation:
    @STORAGES
    @pytest.mark.parametrize("loss", [ff.losses.cross_entropy, summed_cross_entropy], ids=["objective", "function"])
    @pytest.mark.parametrize("microbatches", [2, 3, 7])
    def test_ragged_microbatches_equal_one_batch(self, viewed_elements, loss, microbatches):
        def result(count):
            made = program(
                classifier(torch.float64),
                loss=loss,
                microbatches=count,
                transforms=[ff.clipped(0.05)],
                viewed_elements=viewed_elements,
            )
            return made.step(made.init(0), labelled(7, dtype=torch.float64))

        (one, first), (other, second) = result(1), result(microbatches)
        for name, tensor in one.params.items():
            torch.testing.assert_close(other.params[name], tensor, atol=1e-12, rtol=0)
        assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=1e-14)
        assert float(second["grad_norm"]) == pytest.approx(float(first["grad_norm"]), rel=1e-12)

    def test_unlike_weights_count_by_what_they_weigh(self):
        # Labels that are left out: the microbatches hold 3, 1 and 0 of them.
        features, labels = labelled(9, dtype=torch.float64)
        labels[3:8] = -100
        labels[8] = -100
        labels[5] = 1
        results = []
        for count in (1, 3):
            made = program(classifier(torch.float64), microbatches=count)
            results.append(made.step(made.init(0), (features, labels)))
        (one, first), (other, second) = results
        for name, tensor in one.params.items():
            torch.testing.assert_close(other.params[name], tensor, atol=1e-12, rtol=0)
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-14)
        assert one.tokens.item() == other.tokens.item() == 4

    def test_gradient_hooks_see_the_gradient_of_the_mean(self):
        seen = []
        model = classifier(torch.float64)
        model[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
        made = program(model, microbatches=3)
        gradients, _, _ = made.gradients(made.init(0), labelled(7, dtype=torch.float64))
        assert len(seen) == 3
        torch.testing.assert_close(sum(seen), gradients["0.weight"], atol=1e-12, rtol=0)

    def test_a_batch_without_labels_has_no_gradient(self):
        features, labels = labelled(6)
        made = program(classifier(), optimizer=ff.sgd(), microbatches=2)
        state = made.init(0)
        before = state.copy()
        state, metrics = made.step(state, (features, torch.full_like(labels, -100)))
        assert math.isnan(float(metrics["loss"]))
        assert float(metrics["grad_norm"]) == 0.0
        assert all(torch.equal(state.params[name], before.params[name]) for name in before.params)

    @pytest.mark.parametrize("microbatches", [1, 2])
    @pytest.mark.parametrize("number", [float, lambda weight: weight], ids=["number", "tensor"])
    def test_a_weight_of_zero_takes_its_part_out(self, microbatches, number):
        def masked(outputs, batch):
            mask = batch[1] >= 0
            return ff.Mean((outputs.square().sum(-1) * mask).sum(), number(mask.sum()))

        features, labels = labelled(6)
        made = program(classifier(), optimizer=ff.sgd(), loss=masked, microbatches=microbatches)
        state, metrics = made.step(made.init(0), (features, torch.full_like(labels, -100)))
        assert_same_tensors(state, classifier())
        assert math.isnan(float(metrics["loss"]))

    def test_a_weight_that_is_a_tensor_is_left_as_it_is(self):
        weight = torch.tensor(6.0)

        def loss(outputs, batch):
            return ff.Mean(F.cross_entropy(outputs, batch[1], reduction="sum"), weight)

        made = program(classifier(), loss=loss)
        _, metrics = made.step(made.init(0), labelled(6))
        features, labels = labelled(6)
        assert weight.item() == 6.0
        assert float(metrics["loss"]) == pytest.approx(F.cross_entropy(classifier()(features), labels).item(), rel=1e-6)


class Faulty(Noisy):
    """Fails in a pass, once: in forward after its buffers have changed, or in backward."""

    def __init__(self):
        super().__init__()
        self.failures = {}
        self.calls = 0

    def forward(self, features):
        outputs = super().forward(features)
        self.calls += 1
        failure = self.failures.pop(("forward", self.calls), None)
        if failure is not None:
            raise failure
        failure = self.failures.pop(("backward", self.calls), None)
        if failure is not None:
            outputs.register_hook(lambda gradient: fail(failure))
        return outputs


def fail(failure):
    raise failure


class TestFailures:
    @STORAGES
    @pytest.mark.parametrize(
        "failure", [RuntimeError("boom"), torch.OutOfMemoryError("boom"), KeyboardInterrupt("boom")]
    )
    @pytest.mark.parametrize("where", [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)], ids=str)
    def test_a_pass_that_fails_consumes_nothing_and_can_be_tried_again(self, viewed_elements, where, failure):
        # Calls are counted from the second step on, which has two microbatches.
        model = Faulty()
        made = program(model, microbatches=2, viewed_elements=viewed_elements)
        state, _ = made.step(made.init(0), labelled(6))
        model.failures[where[0], where[1] + 2] = failure
        with unchanged(state), pytest.raises(type(failure), match="boom"):
            made.step(state, labelled(6, seed=1))
        assert_no_gradients(model)
        assert model.seen.data_ptr() == state.buffers["seen"].data_ptr()
        state, _ = made.step(state, labelled(6, seed=1))
        assert not model.failures
        expected = trained(Noisy(), labelled_batches(2), microbatches=2, viewed_elements=viewed_elements)
        assert_equal(state, expected)

    @STORAGES
    @pytest.mark.parametrize("part", ["loss", "transform", "schedule", "wants"])
    def test_any_part_that_fails_before_the_update_consumes_nothing(self, viewed_elements, part):
        broken = []

        def breaks(name):
            if name in broken:
                raise ValueError(f"{name} is broken")

        def loss(outputs, batch):
            breaks("loss")
            return summed_cross_entropy(outputs, batch)

        def schedule(step):
            breaks("schedule")
            return 1e-2

        def update(gradients, state, **context):
            breaks("transform")
            return gradients, state

        made = program(
            Noisy(),
            loss=loss,
            schedule=schedule,
            transforms=[ff.clipped(0.1), ff.Transform(lambda params: None, update)],
            viewed_elements=viewed_elements,
        )
        state, _ = made.step(made.init(0), labelled(6))
        kept = state.copy()
        broken.append(part)
        wants = frozenset({"wants"} if part == "wants" else ())
        with unchanged(state), pytest.raises(ValueError, match=r"is broken|asked for"):
            made.step(state, labelled(6, seed=1), wants=wants)
        broken.clear()
        assert_equal(made.step(state, labelled(6, seed=1))[0], made.step(kept, labelled(6, seed=1))[0])

    def test_a_batch_that_does_not_fit_consumes_nothing(self):
        made = program(Noisy())
        state = made.init(0)
        with unchanged(state), pytest.raises(RuntimeError, match="shape"):
            made.step(state, (torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)))


class TestMetrics:
    def test_every_named_mean_is_reported(self):
        def loss(outputs, batch):
            right = (outputs.argmax(-1) == batch[1]).sum()
            return {"loss": summed_cross_entropy(outputs, batch), "accuracy": ff.Mean(right, len(batch[1]))}

        made = program(classifier(), loss=loss, microbatches=4)
        features, labels = labelled(7)
        _, metrics = made.step(made.init(0), (features, labels))
        outputs = classifier()(features)
        assert float(metrics["accuracy"]) == pytest.approx((outputs.argmax(-1) == labels).float().mean().item())
        assert float(metrics["loss"]) == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-6)
        assert not metrics["loss"].total.requires_grad

    @pytest.mark.parametrize("name", ["learning_rate", "grad_norm"])
    def test_a_name_of_the_steps_own_cannot_be_given_to_a_metric(self, name):
        def loss(outputs, batch):
            return {"loss": summed_cross_entropy(outputs, batch), name: ff.Mean(torch.tensor(123.0), 1)}

        made = program(classifier(), loss=loss)
        with pytest.raises(ValueError, match=f"'{name}'.*which a step reports itself; rename it"):
            made.step(made.init(0), labelled(6))

    def test_the_learning_rate_is_that_of_the_step(self):
        made = program(classifier(), schedule=lambda step: 0.1 * (step + 1))
        state = made.init(0)
        rates = []
        for batch in labelled_batches(3):
            state, metrics = made.step(state, batch)
            rates.append(metrics["learning_rate"])
        assert rates == [0.1, 0.2, pytest.approx(0.3)]

    @STORAGES
    def test_norms_of_each_gradient_are_computed_when_wanted(self, viewed_elements):
        made = program(classifier(), microbatches=2, loss=summed_cross_entropy, viewed_elements=viewed_elements)
        state = made.init(0)
        gradients, _, _ = made.gradients(state, labelled(6))
        _, plain = made.step(state.copy(), labelled(6))
        assert not [name for name in plain if name.startswith("grad_norm/")]
        _, metrics = made.step(state, labelled(6), wants=frozenset({"gradient_norms"}))
        for name, gradient in gradients.items():
            assert float(metrics[f"grad_norm/{name}"]) == pytest.approx(gradient.norm().item(), rel=1e-6)
        whole = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        assert float(metrics["grad_norm"]) == pytest.approx(whole, rel=1e-6)

    def test_counters(self):
        made = program(classifier())
        state = made.init(0)
        features, labels = labelled(6)
        labels[:2] = -100
        for _ in range(3):
            state, _ = made.step(state, (features, labels))
        state, _ = made.step(state, Batch((features, labels), 100, None))
        assert (state.step, state.samples, state.seed) == (4, 118, 0)
        assert (state.updates.item(), state.tokens.item(), state.skipped.item()) == (4, 16, 0)
        assert state.nonfinite.item() == -1


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def nan_inputs(batch):
    features, labels = batch
    return features * NAN, labels


def poisoning(outputs, batch):
    """A loss that is finite, and has an infinite gradient, where the first feature of the batch is 7."""
    poisoned = batch[0][0, 0] == 7
    return summed_cross_entropy(Poisoned.apply(outputs) if poisoned else outputs, batch)


def poison(batch):
    features, labels = batch
    features = features.clone()
    features[0, 0] = 7
    return features, labels


BAD = pytest.mark.parametrize("spoil", [nan_inputs, poison], ids=["loss", "gradient"])


def guarded(**changes):
    plain = {"loss": poisoning, "average": ff.ema(0.9), "transforms": [ff.clipped(0.1), counting()]}
    return program(Noisy(), **(plain | changes))


def counting():
    """A transform with a state: how many gradients it has seen."""

    def update(gradients, state, **context):
        return gradients, {"seen": state["seen"] + 1}

    return ff.Transform(lambda params: {"seen": torch.zeros(())}, update)


OPTIMIZERS = pytest.mark.parametrize(
    "optimizer",
    [
        ff.adamw(),
        ff.adam(weight_decay=0.1),
        ff.sgd(),
        ff.sgd(momentum=0.9, weight_decay=0.1),
        ff.from_torch(lambda groups: torch.optim.RMSprop(groups)),
    ],
    ids=["adamw", "adam", "sgd", "momentum", "from_torch"],
)


class TestNonFinite:
    @STORAGES
    @BAD
    def test_raise_changes_nothing_and_names_the_step(self, viewed_elements, spoil):
        made = guarded(viewed_elements=viewed_elements)
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        kept = state.copy()
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 2"):
            made.step(state, spoil(labelled(6)))
        assert_equal(made.step(state, labelled(6))[0], made.step(kept, labelled(6))[0])

    @STORAGES
    def test_raise_leaves_no_gradient_behind(self, viewed_elements):
        model = Noisy()
        made = program(model, viewed_elements=viewed_elements)
        with pytest.raises(ff.NonFiniteError):
            made.step(made.init(0), nan_inputs(labelled(6)))
        assert_no_gradients(model)

    @STORAGES
    @BAD
    @OPTIMIZERS
    def test_skip_changes_nothing_but_the_counters(self, viewed_elements, spoil, optimizer):
        made = guarded(on_nonfinite="skip", optimizer=optimizer, viewed_elements=viewed_elements)
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        before = state.copy()
        state, _ = made.step(state, spoil(labelled(6)))
        after, expected = state.as_tree(), before.as_tree()
        for name in (
            "params",
            "frozen",
            "buffers",
            "opt",
            "ema",
            "transforms",
            "updates",
            "nonfinite",
            "seed",
            "data",
        ):
            assert tree.difference(after[name], expected[name], name) is None
        assert (state.step, state.samples, state.skipped.item(), state.updates.item()) == (3, 18, 1, 2)

    @STORAGES
    def test_after_a_skipped_step_training_goes_on_as_if_only_the_step_had_been_counted(self, viewed_elements):
        made = guarded(on_nonfinite="skip", viewed_elements=viewed_elements, schedule=lambda step: 1e-2 / (step + 1))
        first, second = labelled(6, seed=1), labelled(6, seed=2)
        plain, _ = made.step(made.init(0), first)
        skipping = ff.fold(made.step, plain.copy(), [nan_inputs(first), second])
        plain, _ = made.step(attrs.evolve(plain, step=plain.step + 1, samples=plain.samples + 6), second)
        uncounted = {"skipped": 1, "tokens": 18}
        assert tree.difference({**skipping.as_tree(), **uncounted}, {**plain.as_tree(), **uncounted}) is None

    def test_a_resized_buffer_of_a_skipped_step_is_not_taken(self):
        class Growing(nn.Linear):
            def __init__(self):
                super().__init__(5, 3)
                self.register_buffer("history", torch.zeros(1))

            def forward(self, features):
                self.history = torch.cat([self.history, features.detach().sum()[None]])
                return super().forward(features)

        made = program(Growing(), on_nonfinite="skip")
        state = ff.fold(made.step, made.init(0), [labelled(6), nan_inputs(labelled(6)), labelled(6)])
        assert state.buffers["history"].shape == (3,)
        assert state.buffers["history"].isfinite().all()

    def test_what_a_transform_makes_after_clipping_is_looked_at(self):
        made = program(classifier(), transforms=[ff.clipped(1.0), ff.stateless(lambda gradient: gradient * NAN)])
        state = made.init(0)
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
            made.step(state, labelled(6))

    def test_a_transform_may_mend_what_is_not_finite(self):
        mended = ff.stateless(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        made = program(classifier(), loss=poisoning, transforms=[mended, ff.clipped(1.0)])
        state, metrics = made.step(made.init(0), poison(labelled(6)))
        assert math.isfinite(float(metrics["grad_norm"]))
        assert all(tensor.isfinite().all() for tensor in state.params.values())

    @pytest.mark.parametrize("policy", ["raise", "skip"])
    def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(self, policy):
        def loss(outputs, batch):
            mean = summed_cross_entropy(outputs, batch)
            return ff.Mean(mean.total + math.inf, mean.weight)

        made = program(classifier(), loss=loss, on_nonfinite=policy)
        state = made.init(0)
        if policy == "raise":
            with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
                made.step(state, labelled(6))
        else:
            state, _ = made.step(state, labelled(6))
            assert_same_tensors(state, classifier())
            assert state.skipped.item() == 1

    def test_an_update_with_a_bad_gradient_raises_too(self):
        made = guarded()
        state = made.init(0)
        gradients, buffers, _ = made.gradients(state, poison(labelled(6)))
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
            made.update(state, gradients, buffers)


class TestTheFlagOnTheDevice:
    """The path without a wait for the device, taken on the CPU."""

    @pytest.fixture(autouse=True)
    def _no_look(self, monkeypatch):
        monkeypatch.setattr(step_module, "flag_on_host", step_module.flag_on_device)

    @STORAGES
    @BAD
    @OPTIMIZERS
    def test_raise_blocks_this_update_and_all_later_ones(self, viewed_elements, spoil, optimizer):
        made = guarded(optimizer=optimizer, viewed_elements=viewed_elements)
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        before = state.copy()
        state = ff.fold(made.step, state, [spoil(labelled(6)), *labelled_batches(2), spoil(labelled(6))])
        after, expected = state.as_tree(), before.as_tree()
        for name in ("params", "buffers", "opt", "ema", "transforms", "updates", "skipped"):
            assert tree.difference(after[name], expected[name], name) is None
        assert (state.step, state.nonfinite.item()) == (6, 2)
        with pytest.raises(ff.NonFiniteError, match="step 2"):
            made.evaluate(state, [labelled(6)])

    @BAD
    def test_a_run_raises_at_its_end(self, spoil):
        made = guarded()
        with pytest.raises(ff.NonFiniteError, match="step 1"):
            ff.last(made.steps(made.init(0), [labelled(6), spoil(labelled(6)), labelled(6)]))

    @STORAGES
    @BAD
    def test_skip_gates_that_step_only(self, viewed_elements, spoil, monkeypatch):
        batches = [labelled(6), spoil(labelled(6)), labelled(6)]
        made = guarded(on_nonfinite="skip", viewed_elements=viewed_elements)
        on_device = ff.fold(made.step, made.init(0), batches)
        monkeypatch.undo()
        made = guarded(on_nonfinite="skip", viewed_elements=viewed_elements)
        assert_equal(on_device, ff.fold(made.step, made.init(0), batches))
        assert (on_device.skipped.item(), on_device.nonfinite.item()) == (1, -1)

    def test_finite_steps_give_the_same_bits(self, monkeypatch):
        made = guarded()
        on_device = ff.fold(made.step, made.init(0), labelled_batches(4))
        monkeypatch.undo()
        made = guarded()
        assert_equal(on_device, ff.fold(made.step, made.init(0), labelled_batches(4)))

    @pytest.mark.parametrize("value", [math.inf, -math.inf, NAN])
    def test_the_flag(self, value):
        def flag(policy, value, before):
            found, first, _ = step_module.flag_on_device(policy, torch.tensor(value), torch.tensor(before), 7)
            return found.item(), first.item()

        assert flag("raise", value, -1) == (1.0, 7)
        assert flag("raise", value, 3) == (1.0, 3)
        assert flag("raise", 1e38, 3) == (1.0, 3)
        assert flag("raise", -1e38, -1) == (0.0, -1)
        assert flag("skip", value, -1) == (1.0, -1)
        assert flag("skip", 0.0, -1) == (0.0, -1)


class TestPrecision:
    def test_float64_trains_in_float64(self):
        batches = labelled_batches(5, dtype=torch.float64)
        model = classifier().double()
        by_hand(model, batches, fused_adamw(model), max_norm=0.05)
        state = trained(classifier(), batches, precision="float64", transforms=[ff.clipped(0.05)])
        assert_same_tensors(state, model, atol=1e-12)

    def test_inputs_are_converted(self):
        state = trained(classifier(), labelled_batches(2), precision="float64")
        rounded = [(features.double(), labels) for features, labels in labelled_batches(2)]
        assert_equal(state, trained(classifier(torch.float64), rounded))

    def test_float32_converts_a_model_of_float64(self):
        state = trained(classifier(torch.float64), labelled_batches(2, dtype=torch.float64), precision="float32")
        assert {tensor.dtype for tensor in state.params.values()} == {torch.float32}
        assert_equal(state, trained(classifier(torch.float64).float(), labelled_batches(2)))

    def test_integers_are_not_converted(self):
        made = program(nn.Embedding(9, 3), precision="float64")
        state, _ = made.step(made.init(0), (torch.arange(6), torch.zeros(6, dtype=torch.long)))
        assert state.params["weight"].dtype == torch.float64

    @STORAGES
    def test_bfloat16_keeps_parameters_in_float32_and_differs_little(self, viewed_elements):
        dtypes = []

        def loss(outputs, batch):
            dtypes.append(outputs.dtype)
            return ff.losses.cross_entropy(outputs, batch)

        low = trained(
            classifier(), labelled_batches(5), precision="bfloat16", loss=loss, viewed_elements=viewed_elements
        )
        full = trained(classifier(), labelled_batches(5), viewed_elements=viewed_elements)
        assert set(dtypes) == {torch.bfloat16}
        for name, tensor in full.params.items():
            assert low.params[name].dtype == torch.float32
            torch.testing.assert_close(low.params[name], tensor, atol=2e-2, rtol=0)
        assert ff.difference(low, full) is not None

    def test_evaluation_and_predictions_run_in_bfloat16_too(self):
        made = program(classifier(), precision="bfloat16")
        state = made.init(0)
        assert made.apply(state, labelled(6)[0]).dtype == torch.bfloat16
        features, labels = labelled(6)
        full = F.cross_entropy(classifier()(features), labels).item()
        assert made.evaluate(state, [(features, labels)])["loss"] == pytest.approx(full, rel=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_of_torch_says_what_the_batch_was(compiled):
    made = program(classifier(), compile=compiled, backend="aot_eager")
    state = made.init(0)
    rows, labels = labelled(6)
    with pytest.raises(RuntimeError, match="dtype") as error:
        made.step(state, (rows.long(), labels))
    (note,) = error.value.__notes__
    what = f"(int64 {list(rows.shape)}, int64 [6])"
    assert note == f"The batch was {what}; the parameters are float32, precision='as_built'."
    made.step(state, (rows, labels))


def test_weights_that_are_not_finite_count_for_nothing():
    def weighed(outputs, batch):
        features, labels = batch
        return ff.Mean(ff.losses.cross_entropy(outputs, batch).total, features[:, 0].sum() * 0 + len(labels))

    made = program(classifier(), loss=weighed, on_nonfinite="skip")
    state, _ = made.step(made.init(0), labelled(6))
    assert int(state.tokens) == 6
    features, labels = labelled(6)
    state, _ = made.step(state, (features * torch.nan, labels))
    assert (int(state.tokens), int(state.skipped)) == (6, 1)
    state, _ = made.step(state, labelled(6))
    assert (int(state.tokens), int(state.updates)) == (12, 2)

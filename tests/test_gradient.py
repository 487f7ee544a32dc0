import math

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import tree
from tests.toys import (
    VIEWED,
    Branches,
    assert_same_tensors,
    branching,
    by_hand,
    classifier,
    fused_adamw,
    labelled,
    labelled_batches,
    program,
    trained,
)

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])


def gradients_of(model, batch, **changes):
    made = program(model, **changes)
    return made.gradients(made.init(0), batch)[0]


def same_weights(one, other):
    return tree.difference((one.params, one.opt), (other.params, other.opt)) is None


class TestAsAValue:
    @STORAGES
    def test_parameters_without_a_gradient_have_no_entry(self, viewed_elements):
        gradients = gradients_of(Branches(), branching(True, False), viewed_elements=viewed_elements)
        assert sorted(gradients) == ["left.bias", "left.weight", "shared.bias", "shared.weight"]
        assert len(gradients) == 4
        assert "right.weight" not in gradients
        with pytest.raises(KeyError):
            gradients["right.weight"]

    @STORAGES
    def test_the_repr_shows_sizes_and_no_tensor(self, viewed_elements):
        text = repr(gradients_of(classifier(), labelled(6), viewed_elements=viewed_elements))
        assert text == "Gradients(66 elements in 4 tensors)"

    @STORAGES
    @pytest.mark.parametrize("batch", [branching(True, True), branching(True, False), branching(False, False)])
    def test_the_norm_is_over_all_elements(self, viewed_elements, batch):
        gradients = gradients_of(Branches(), batch, viewed_elements=viewed_elements)
        expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        assert gradients.norm().item() == pytest.approx(expected, rel=1e-6)
        # And so with a divisor that is still to be carried out, whatever its sign.
        divided = gradients.divided(torch.tensor(-4.0))
        assert divided.norm().item() == pytest.approx(expected / 4, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(divided[name], gradient / -4)

    @STORAGES
    def test_the_norm_of_several_types_is_over_all_of_them(self, viewed_elements):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.low, self.high = nn.Linear(5, 4).bfloat16(), nn.Linear(4, 3).double()

            def forward(self, features):
                return self.high(self.low(features.bfloat16()).double())

        gradients = gradients_of(Mixed(), labelled(6), viewed_elements=viewed_elements)
        expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        assert gradients.norm().item() == pytest.approx(expected, rel=1e-6)
        assert gradients["low.weight"].dtype == torch.bfloat16

    @STORAGES
    def test_a_copy_has_memory_of_its_own(self, viewed_elements):
        gradients = gradients_of(classifier(), labelled(6), viewed_elements=viewed_elements)
        copy = gradients.divided(torch.tensor(2.0)).copy()
        kept = copy["0.weight"].clone()
        gradients["0.weight"].zero_()
        assert torch.equal(copy["0.weight"], kept)
        assert kept.any()
        assert copy.samples == 6


class TestClipping:
    @STORAGES
    @pytest.mark.parametrize("max_norm", [0.05, 0.3, 100.0])
    def test_it_is_that_of_torch(self, viewed_elements, max_norm):
        model = classifier()
        by_hand(model, labelled_batches(8), fused_adamw(model), max_norm=max_norm)
        changes = {"transforms": [ff.clipped(max_norm)], "viewed_elements": viewed_elements}
        assert_same_tensors(trained(classifier(), labelled_batches(8), **changes), model, atol=3e-7)

    @STORAGES
    def test_the_norm_before_clipping_is_reported(self, viewed_elements):
        model = classifier()
        nn.functional.cross_entropy(model(labelled(6)[0]), labelled(6)[1]).backward()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
        made = program(classifier(), transforms=[ff.clipped(0.01)], viewed_elements=viewed_elements)
        _, metrics = made.step(made.init(0), labelled(6))
        assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("max_norm", [0.01, None])
    def test_the_norm_that_is_reported_is_not_that_of_later_transforms(self, max_norm):
        made = program(classifier())
        _, plain = made.step(made.init(0), labelled(6))
        later = [ff.clipped(max_norm), ff.stateless(lambda gradient: gradient * 10)]
        made = program(classifier(), transforms=later)
        _, metrics = made.step(made.init(0), labelled(6))
        assert float(metrics["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-6)

    @STORAGES
    @pytest.mark.parametrize("factor", [1.001, 1.3, 1.9, 4.0])
    def test_a_gradient_below_the_threshold_is_left_as_it_is(self, viewed_elements, factor):
        changes = {"optimizer": ff.sgd(), "viewed_elements": viewed_elements}
        made = program(classifier(), **changes)
        plain, metrics = made.step(made.init(0), labelled(6))
        made = program(classifier(), transforms=[ff.clipped(factor * float(metrics["grad_norm"]))], **changes)
        state, _ = made.step(made.init(0), labelled(6))
        assert same_weights(state, plain)

    def test_the_gradient_is_as_long_as_the_threshold_afterwards(self):
        made = program(classifier(), optimizer=ff.sgd(), schedule=1.0, transforms=[ff.clipped(0.01)])
        state = made.init(0)
        before = state.copy()
        state, _ = made.step(state, labelled(6))
        moved = sum((state.params[name] - before.params[name]).square().sum().item() for name in before.params)
        assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)

    def test_a_threshold_of_none_reports_only(self):
        made = program(classifier(), transforms=[ff.clipped(None)])
        state, metrics = made.step(made.init(0), labelled(6))
        assert same_weights(state, trained(classifier(), [labelled(6)]))
        assert float(metrics["grad_norm"]) > 0

    def test_a_gradient_of_zero_stays_zero(self):
        features, labels = labelled(6)
        made = program(classifier(), optimizer=ff.sgd(), transforms=[ff.clipped(1.0)])
        state, metrics = made.step(made.init(0), (features, torch.full_like(labels, -100)))
        assert_same_tensors(state, classifier())
        assert float(metrics["grad_norm"]) == 0

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_threshold_that_is_no_positive_number_is_refused(self, max_norm):
        with pytest.raises(ValueError, match="clipped: max_norm must be a positive number, or None"):
            ff.clipped(max_norm)


class TestNoise:
    @STORAGES
    def test_it_is_normal_and_depends_on_seed_step_and_name_only(self, viewed_elements):
        class Wide(nn.Module):
            def __init__(self, names):
                super().__init__()
                torch.manual_seed(0)
                for name in names:
                    self.register_parameter(name, nn.Parameter(torch.zeros(50, 100)))

            def forward(self, features):
                return features[:, :3] + 0 * sum(parameter.sum() for parameter in self.parameters())

        def moved(names, seed=0, **changes):
            made = program(
                Wide(names),
                optimizer=ff.sgd(),
                schedule=1.0,
                transforms=[ff.noise(0.5)],
                viewed_elements=viewed_elements,
                **changes,
            )
            state, _ = made.step(made.init(seed), labelled(6))
            return state.params

        one, other = moved(["a", "b"]), moved(["b", "a"])
        assert torch.equal(one["a"], other["a"])
        assert torch.equal(one["b"], other["b"])
        assert not torch.equal(one["a"], one["b"])
        assert not torch.equal(one["a"], moved(["a"], seed=1)["a"])
        assert one["a"].std().item() == pytest.approx(0.5, rel=0.05)
        assert one["a"].mean().item() == pytest.approx(0.0, abs=0.03)

    def test_every_step_draws_anew(self):
        gradient = ff.stateless(torch.zeros_like)
        made = program(classifier(), optimizer=ff.sgd(), schedule=1.0, transforms=[gradient, ff.noise(0.1)])
        state = made.init(0)
        moves = []
        for _ in range(2):
            before = state.params["0.weight"].clone()
            state, _ = made.step(state, labelled(6))
            moves.append(state.params["0.weight"] - before)
        assert not torch.allclose(*moves)

    def test_none_of_it_changes_nothing(self):
        one = trained(classifier(), labelled_batches(2), transforms=[ff.noise(0.0)])
        assert same_weights(one, trained(classifier(), labelled_batches(2)))

    @pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
    def test_a_deviation_that_is_no_number_is_refused(self, std):
        with pytest.raises(ValueError, match="noise: std must be a number of at least 0"):
            ff.noise(std)


def momentum():
    """A transform with a state, as a mapping of tensors."""

    def init(params):
        return {name: torch.zeros_like(tensor) for name, tensor in params.items()}

    def update(gradients, state, **context):
        mixed = {name: 0.9 * state[name] + gradient for name, gradient in gradients.items()}
        return mixed, {**state, **mixed}

    return ff.Transform(init, update)


class TestTransforms:
    @STORAGES
    def test_they_are_applied_in_order(self, viewed_elements):
        def moved(*transforms):
            changes = {"optimizer": ff.sgd(), "schedule": 1.0, "viewed_elements": viewed_elements}
            return trained(
                classifier(torch.float64), [labelled(6, dtype=torch.float64)], transforms=transforms, **changes
            )

        double = ff.stateless(lambda gradient: gradient * 2)
        square = ff.stateless(torch.square)
        made = program(classifier(torch.float64))
        gradient = made.gradients(made.init(0), labelled(6, dtype=torch.float64))[0]["0.weight"]
        start = classifier(torch.float64)[0].weight
        torch.testing.assert_close(moved(double, square).params["0.weight"], start - 4 * gradient.square())
        torch.testing.assert_close(moved(square, double).params["0.weight"], start - 2 * gradient.square())

    @STORAGES
    @pytest.mark.parametrize(
        "transforms",
        [
            (ff.clipped(0.1), ff.noise(0.1)),
            (momentum(), ff.clipped(0.1)),
            (ff.clipped(0.1), momentum(), ff.clipped(0.05)),
        ],
        ids=["noise", "momentum", "twice"],
    )
    def test_a_chain_is_its_parts(self, viewed_elements, transforms):
        one = trained(classifier(), labelled_batches(3), transforms=transforms, viewed_elements=viewed_elements)
        other = trained(
            classifier(), labelled_batches(3), transforms=[ff.chain(*transforms)], viewed_elements=viewed_elements
        )
        for name in ("params", "opt"):
            assert tree.difference(one.as_tree()[name], other.as_tree()[name], name) is None
        assert tree.difference(one.transforms, other.transforms[0]) is None

    @STORAGES
    def test_a_state_of_its_own_is_a_part_of_the_run(self, viewed_elements):
        changes = {"optimizer": ff.sgd(), "viewed_elements": viewed_elements}
        ours = trained(
            classifier(torch.float64), labelled_batches(4, dtype=torch.float64), transforms=[momentum()], **changes
        )
        plain = trained(
            classifier(torch.float64),
            labelled_batches(4, dtype=torch.float64),
            optimizer=ff.sgd(momentum=0.9),
            viewed_elements=viewed_elements,
        )
        for name, tensor in plain.params.items():
            torch.testing.assert_close(ours.params[name], tensor, atol=1e-12, rtol=0)
            torch.testing.assert_close(ours.transforms[0][name], plain.opt["momentum"][name], atol=1e-12, rtol=0)

    def test_they_are_told_the_parameters_the_step_and_the_seed(self):
        seen = []

        def update(gradients, state, *, params, step, seed):
            seen.append((sorted(params), step, seed))
            return gradients, state

        made = program(classifier(), transforms=[ff.Transform(lambda params: None, update)])
        ff.fold(made.step, made.init(5), labelled_batches(2))
        assert [(step, seed) for _, step, seed in seen] == [(0, 5), (1, 5)]
        assert seen[0][0] == ["0.bias", "0.weight", "2.bias", "2.weight"]

    def test_they_may_report(self):
        def update(gradients, state, **context):
            return gradients.reporting(largest=max(g.abs().max() for g in gradients.values())), state

        made = program(classifier(), transforms=[ff.Transform(lambda params: None, update), ff.clipped(1.0)])
        state = made.init(0)
        gradients, _, _ = made.gradients(state, labelled(6))
        _, metrics = made.step(state, labelled(6))
        assert float(metrics["largest"]) == max(gradient.abs().max().item() for gradient in gradients.values())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda name, g: g[:1] if name == "2.bias" else g, r"changed 2\.bias from \(3,\) torch.float32 to \(1,\)"),
            (lambda name, g: g.double(), r"changed 0\.weight from .* torch.float32 to \(7, 5\) torch.float64"),
        ],
    )
    def test_one_that_changes_a_shape_or_a_type_is_refused(self, change, message):
        def update(gradients, state, **context):
            return {name: change(name, gradient) for name, gradient in gradients.items()}, state

        made = program(classifier(), transforms=[ff.Transform(lambda params: None, update, "mine")])
        with pytest.raises(ValueError, match=f"transform mine: it {message}"):
            made.step(made.init(0), labelled(6))

    def test_one_that_loses_a_name_is_refused(self):
        def update(gradients, state, **context):
            return {name: gradient for name, gradient in gradients.items() if name != "0.bias"}, state

        made = program(classifier(), transforms=[ff.Transform(lambda params: None, update)])
        with pytest.raises(ValueError, match=r"a gradient for every name it was given; differs in '0.bias'"):
            made.step(made.init(0), labelled(6))

    @STORAGES
    @pytest.mark.parametrize("before", [(), (ff.clipped(0.1),), (ff.clipped(None),)], ids=str)
    def test_changes_in_place_count(self, viewed_elements, before):
        def zeroed(gradients, state, **context):
            for gradient in gradients.values():
                gradient.zero_()
            return gradients, state

        def spoiled(gradients, state, **context):
            gradients["0.bias"].fill_(math.nan)
            return gradients, state

        changes = {"optimizer": ff.sgd(), "viewed_elements": viewed_elements}
        made = program(classifier(), transforms=[*before, ff.Transform(lambda params: None, zeroed)], **changes)
        state, _ = made.step(made.init(0), labelled(6))
        assert_same_tensors(state, classifier())
        made = program(classifier(), transforms=[*before, ff.Transform(lambda params: None, spoiled)], **changes)
        state = made.init(0)
        with pytest.raises(ff.NonFiniteError, match="step 0"):
            made.step(state, labelled(6))

    def test_a_shared_tensor_may_come_back_under_other_names(self):
        # What is written in place must not be what is still to be read.
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.one, self.other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

            def forward(self, features):
                return features[:, :3] * self.one + features[:, 1:4] * self.other

        def swapped(gradients, state, **context):
            return {"one": gradients["other"], "other": gradients["one"]}, state

        changes = {"optimizer": ff.sgd(), "schedule": 1.0}
        made = program(Pair(), transforms=[ff.Transform(lambda params: None, swapped)], **changes)
        plain = program(Pair(), **changes)
        state, _ = made.step(made.init(0), labelled(6))
        expected, _ = plain.step(plain.init(0), labelled(6))
        assert torch.equal(state.params["one"], expected.params["other"])
        assert torch.equal(state.params["other"], expected.params["one"])

    def test_a_sparse_gradient_is_refused_with_the_fix_or_added_up_exactly(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.table = nn.Parameter(torch.randn(9, 3))

            def forward(self, index):
                return nn.functional.embedding(index, self.table, sparse=True)

        batch = (torch.tensor([1, 1, 4]), torch.tensor([0, 1, 2]))
        for viewed_elements in (0, VIEWED):
            made = program(Functional(), viewed_elements=viewed_elements)
            try:
                gradients, _, _ = made.gradients(made.init(0), batch)
            except ValueError as error:
                assert "table got a sparse gradient" in str(error)  # noqa: PT017
                assert "sparse=False" in str(error)  # noqa: PT017
            else:
                model = Functional()
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                torch.testing.assert_close(gradients["table"], model.table.grad.to_dense())

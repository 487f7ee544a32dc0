import math

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import transforms, tree
from tests.toys import VIEWED, classifier, labelled, labelled_batches, program, trained

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 9, 3)).double()


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 5, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def moved(model, batch, transform, **changes):
    """Give what a step of 1 times the gradient moves the parameters by: the transformed gradient; and the plain one."""
    changes = {"optimizer": ff.sgd(), "schedule": 1.0, **changes}
    made = program(model, transforms=[transform], **changes)
    state = made.init(0)
    plain, _, _ = made.gradients(state, batch)
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    state, metrics = made.step(state, batch)
    return {name: before[name] - tensor for name, tensor in state.params.items()}, plain, before, metrics


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-12, rtol=1e-9)


class TestByValue:
    @STORAGES
    def test_it_is_that_of_torch(self, viewed_elements):
        limit = 0.01
        found, plain, before, _ = moved(
            convolutional(), images(), transforms.clipped_by_value(limit), viewed_elements=viewed_elements
        )
        parameters = {name: nn.Parameter(tensor) for name, tensor in before.items()}
        for name, parameter in parameters.items():
            parameter.grad = plain[name].clone()
        nn.utils.clip_grad_value_(parameters.values(), limit)
        assert any((plain[name].abs() > limit).any() for name in plain)
        assert_close(found, {name: parameter.grad for name, parameter in parameters.items()})

    def test_what_is_not_finite_is_still_seen(self):
        def spoiled(gradients, state, **context):
            gradients["0.bias"].fill_(math.inf)
            return gradients, state

        spoil = ff.Transform(lambda params: None, spoiled)
        made = program(classifier(), transforms=[spoil, transforms.clipped_by_value(0.1)])
        with pytest.raises(ff.NonFiniteError):
            made.step(made.init(0), labelled(6))


class TestByGroup:
    @STORAGES
    def test_each_group_is_clipped_as_torch_does(self, viewed_elements):
        limits = {"0.*": 0.05, "*.weight": 0.02}
        found, plain, before, metrics = moved(
            convolutional(), images(), transforms.clipped_by_group(limits), viewed_elements=viewed_elements
        )
        groups = {"0.*": ["0.weight", "0.bias"], "*.weight": ["1.weight", "3.weight"]}
        parameters = {name: nn.Parameter(tensor) for name, tensor in before.items()}
        for name, parameter in parameters.items():
            parameter.grad = plain[name].clone()
        for pattern, names in groups.items():
            norm = nn.utils.clip_grad_norm_([parameters[name] for name in names], limits[pattern])
            assert norm > limits[pattern]
            assert float(metrics[f"group_norm/{pattern}"]) == pytest.approx(float(norm), rel=1e-12)
        assert_close(found, {name: parameter.grad for name, parameter in parameters.items()})

    def test_a_pattern_that_matches_nothing_is_refused(self):
        made = program(classifier(), transforms=[transforms.clipped_by_group({"encoder.*": 1.0})])
        with pytest.raises(ValueError, match=r"clipped_by_group: 'encoder\.\*' matches no parameter; the parameters"):
            made.init(0)


def adaptive(gradient, weight, ratio, eps):
    """Clip a gradient by equation 3 of Brock et al., unit by unit, as timm's ``adaptive_clip_grad`` does."""

    def unitwise(tensor):
        if tensor.dim() <= 1:
            return tensor.norm(2)
        return tensor.norm(2, dim=tuple(range(1, tensor.dim())), keepdim=True)

    largest = unitwise(weight).clamp(min=eps) * ratio
    norm = unitwise(gradient)
    return torch.where(norm < largest, gradient, gradient * (largest / norm.clamp(min=1e-6)))


class TestByUnit:
    @STORAGES
    @pytest.mark.parametrize("ratio", [1e-3, 0.05, 10.0])
    def test_it_is_the_published_formula(self, viewed_elements, ratio):
        found, plain, before, _ = moved(
            convolutional(), images(), transforms.clipped_by_unit(ratio), viewed_elements=viewed_elements
        )
        assert_close(found, {name: adaptive(plain[name], before[name], ratio, 1e-3) for name in plain})

    def test_others_are_left_as_they_are(self):
        transform = transforms.clipped_by_unit(1e-3, match="0.*")
        found, plain, before, _ = moved(convolutional(), images(), transform)
        chosen = {name: adaptive(plain[name], before[name], 1e-3, 1e-3) for name in ("0.weight", "0.bias")}
        assert_close(found, dict(plain) | chosen)

    @pytest.mark.parametrize("match", ["head.*", lambda name, tensor: tensor.dim() > 7])
    def test_a_pattern_that_matches_nothing_is_refused(self, match):
        made = program(classifier(), transforms=[transforms.clipped_by_unit(match=match)])
        with pytest.raises(ValueError, match=r"clipped_by_unit: .* matches no parameter; the parameters are '0\.bias'"):
            made.init(0)


class TestCentralised:
    @STORAGES
    def test_it_is_the_published_formula(self, viewed_elements):
        found, plain, _, _ = moved(convolutional(), images(), transforms.centralised(), viewed_elements=viewed_elements)
        expected = dict(plain)
        for name in ("0.weight", "3.weight"):
            rows = plain[name].flatten(1)
            expected[name] = (rows - rows.mean(dim=1, keepdim=True)).reshape(plain[name].shape)
        assert_close(found, expected)


class TestSchedules:
    def test_a_norm_may_be_a_schedule(self):
        schedule = ff.schedules.piecewise(boundaries=(2,), values=(0.01, 1e9))
        changes = {"optimizer": ff.sgd(), "schedule": 1.0}
        made = program(classifier(), transforms=[ff.clipped(schedule)], **changes)
        state = made.init(0)
        for step, batch in enumerate(labelled_batches(4)):
            before = state.copy()
            state, metrics = made.step(state, batch)
            gap = torch.cat([(before.params[n] - t).flatten() for n, t in state.params.items()]).norm()
            expected = min(0.01 if step < 2 else 1e9, float(metrics["grad_norm"]))
            assert float(gap) == pytest.approx(expected, rel=1e-3)

    def test_a_schedule_cannot_be_in_a_graph(self):
        with pytest.raises(ValueError, match="works on the host and cannot be a part of a compiled step"):
            program(classifier(), transforms=[ff.clipped(ff.schedules.constant(1.0))], compile=True)

    def test_annealed_noise_falls_as_published(self):
        std = transforms.annealed(eta=0.3)
        nothing = ff.stateless(torch.zeros_like)
        model = nn.Sequential(nn.Linear(5, 4000), nn.Linear(4000, 3))
        changes = {"optimizer": ff.sgd(), "schedule": 1.0, "transforms": [nothing, ff.noise(std)]}
        made = program(model, **changes)
        state = made.init(0)
        for step in range(3):
            before = state.params["0.weight"].clone()
            state, _ = made.step(state, labelled(6))
            found = float((state.params["0.weight"] - before).std())
            assert found == pytest.approx(math.sqrt(0.3 / (1 + step) ** 0.55), rel=0.03)

    def test_noise_of_one_size_is_as_before(self):
        one = trained(classifier(), labelled_batches(2), transforms=[ff.noise(0.1)])
        other = trained(classifier(), labelled_batches(2), transforms=[ff.noise(ff.schedules.constant(0.1))])
        assert all(torch.equal(tensor, other.params[name]) for name, tensor in one.params.items())


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        transforms.clipped_by_value,
        transforms.clipped_by_unit,
        lambda number: transforms.clipped_by_unit(eps=number),
        lambda number: transforms.clipped_by_group({"*": number}),
    ],
)
def test_numbers_that_are_not_positive_are_refused(make, number):
    with pytest.raises(ValueError, match="must be a positive number"):
        make(number)


@pytest.mark.parametrize(
    ("first", "following"),
    [({"n": 0}, lambda state: {"n": state["n"] + 1}), ((), lambda state: (*state, torch.zeros(1)))],
    ids=["number", "growing"],
)
def test_a_state_of_any_kind_is_as_it_was_after_a_step_that_is_left_out(first, following):
    transform = ff.Transform(lambda params: first, lambda gradients, state, **_: (gradients, following(state)))
    made = program(classifier(), transforms=[transform], on_nonfinite="skip")
    features, labels = labelled(6)
    state, _ = made.step(made.init(0), (features, labels))
    once = state.transforms
    state, _ = made.step(state, (features * torch.nan, labels))
    assert int(state.skipped) == 1
    assert tree.difference(state.transforms, once) is None
    state, _ = made.step(state, (features, labels))
    assert tree.difference(state.transforms, once) is not None

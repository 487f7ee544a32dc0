"""Updates in the backward pass give the bits of ordinary ones, and hold one gradient at a time."""

import functools
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn import step as step_module
from forgather_fn import testing
from forgather_fn.tree import difference
from forgather_fn.wanted import WANTS
from tests import zoo
from tests.toys import assert_equal, classifier, labelled, labelled_batches, program, unchanged

fused = functools.partial(program, update="in_backward")
OPTIMIZERS = {name: zoo.OPTIMIZERS[name] for name in ("adamw", "adam", "sgd", "plain_sgd")}
OBJECTS = sorted(set(zoo.SPECIMENS) - {"tied_by_storage"})
NUMBERS = frozenset(WANTS) - {"gradients"}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("precision", ["as_built", "bfloat16"])
def test_the_bits_are_those_of_the_ordinary_update(name, precision):
    states, seen = [], []
    for fields in ({"viewed_elements": 0}, {"update": "in_backward"}):
        plan = zoo.plan_of(name, model=zoo.instance(name), precision=precision, average=ff.ema(0.5), **fields)
        made = ff.single(plan)
        state = made.init(0)
        for samples in (4, 5, 3):
            state, metrics = made.step(state, zoo.SPECIMENS[name].batch(samples), wants=NUMBERS)
            seen.append({key: float(value) for key, value in metrics.items()})
        states.append(state)
    assert_equal(*states)
    for ours, theirs in zip(seen[3:], seen[:3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("donate", [True, False])
def test_every_optimizer_that_updates_parameters_one_by_one(optimizer, donate):
    states = []
    for fields in ({"viewed_elements": 0}, {"update": "in_backward", "donate": donate}):
        made = program(
            classifier(), optimizer=OPTIMIZERS[optimizer](), schedule=lambda step: 0.1 / (1 + step), **fields
        )
        states.append(ff.fold(made.step, made.init(0), labelled_batches(5)))
    assert_equal(*states)


def test_it_goes_on_from_an_ordinary_run_and_the_other_way_round(tmp_path):
    whole = program(classifier(), viewed_elements=0)
    data = ff.batches(labelled(24), batch_size=6)
    expected = ff.last(ff.until(steps=4)(whole.steps(whole.init(0), data)))
    state = None
    for number, made in enumerate([fused(classifier()), program(classifier(), viewed_elements=0)] * 2, start=1):
        state = made.init(0) if state is None else made.restore(tmp_path)
        state = ff.last(ff.at_end(ff.saved(tmp_path))(ff.until(steps=number)(made.steps(state, data))))
    assert_equal(expected, state)


def test_one_gradient_is_held_at_a_time():
    """When a gradient comes, none that came before it is still there."""
    held: list[weakref.ref[Tensor]] = []
    alive = []

    class Watched(nn.Sequential):
        pass

    model = Watched(*[nn.Linear(5, 5) for _ in range(4)], nn.Linear(5, 3))
    made = fused(model)
    state = made.init(0)
    for parameter in model.parameters():

        def look(gradient: Tensor) -> None:
            alive.append(sum(reference() is not None for reference in held))
            held.append(weakref.ref(gradient))

        parameter.register_hook(look)
    made.step(state, labelled(6))
    assert len(alive) == 10
    assert max(alive) <= 2  # weight and bias of one layer come together
    assert all(parameter.grad is None for parameter in model.parameters())


class TestFailures:
    def test_a_loss_that_is_not_finite_changes_nothing(self):
        made = fused(classifier())
        state = made.init(0)
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
            made.step(state, (labelled(6)[0] / 0, labelled(6)[1]))
        made.step(state, labelled(6))

    def test_a_loss_whose_gradient_is_finite_all_the_same(self):
        def loss(outputs, batch):
            return ff.Mean(ff.losses.cross_entropy(outputs, batch).total + math.inf, len(batch[1]))

        made = fused(classifier(), loss=loss)
        state = made.init(0)
        with unchanged(state), pytest.raises(ff.NonFiniteError, match="step 0"):
            made.step(state, labelled(6))

    @pytest.mark.parametrize("donate", [True, False])
    def test_a_gradient_that_is_not_finite_after_others_were(self, donate):
        class Kink(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.first(x)
                out: Tensor = self.second(hidden + (hidden * 0).abs().sqrt())  # of which the derivative is not finite
                return out

        made = fused(Kink(), donate=donate)
        state = made.init(0)
        before = state.copy()
        with pytest.raises(
            ff.NonFiniteError, match=r"step 0 \(the 1st\): the gradient of first\.\w+ .* consumed: go on from a chec"
        ):
            made.step(state, labelled(6))
        assert state.consumed is donate
        if not donate:
            assert_equal(state, before)

    def test_a_failure_in_the_middle_says_what_is_lost(self):
        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise MemoryError("no more")

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.second(Failing.apply(self.first(x)))
                return out

        made = fused(Model())
        state = made.init(0)
        with pytest.raises(MemoryError) as caught:
            made.step(state, labelled(6))
        assert "the state is consumed" in caught.value.__notes__[0]
        assert state.consumed

    def test_an_old_value_that_is_needed_later_is_an_error(self):
        class Stale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                hidden = torch.tanh(self.first(x)) @ self.second.weight.detach().t() @ self.second.weight.detach()
                out: Tensor = self.second(hidden)
                return out

        made = fused(Stale())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.step(made.init(0), labelled(6))

    def test_on_an_accelerator_later_updates_are_blocked(self, monkeypatch):
        from forgather_fn import in_backward

        monkeypatch.setattr(in_backward, "flag_on_host", step_module.flag_on_device)
        made = fused(classifier())
        state, _ = made.step(made.init(0), labelled(6))
        kept = state.copy()
        state, _ = made.step(state, (labelled(6)[0] / 0, labelled(6)[1]))
        state, _ = made.step(state, labelled(6))
        assert (int(state.nonfinite), int(state.updates)) == (1, 1)
        for part in ("params", "opt"):
            assert difference(getattr(kept, part), getattr(state, part), part) is None

    def test_metrics_that_it_cannot_give(self):
        made = fused(classifier())
        state = made.init(0)
        with unchanged(state), pytest.raises(ValueError, match="a step was asked for"):
            made.step(state, labelled(6), wants=frozenset({"curvature"}))


@pytest.mark.parametrize("name", ["mlp", "dropout", "batchnorm", "unused"])
def test_the_laws_of_a_step(name):
    checked = testing.check_step(
        zoo.plan_of(name, update="in_backward", viewed_elements=0), zoo.SPECIMENS[name].batch(5)
    )
    assert checked[:4] == ("purity", "donation", "composition", "evaluation")  # no step can be left out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transforms": (ff.clipped(1.0),)}, "with transforms: they are given the gradient of all .* clipping"),
        ({"microbatches": 2}, "with microbatches"),
        ({"precision": "float16"}, 'with precision="float16"'),
        ({"on_nonfinite": "skip"}, 'with on_nonfinite="skip"'),
        ({"compile": True}, "with compile=True"),
        ({"optimizer": zoo.OPTIMIZERS["rmsprop"]()}, "with from_torch.*: it is not known to update parameters one by"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        fused(classifier(), **fields)


def test_a_loss_that_reaches_no_trained_parameter_moves_nothing():
    class Beside(nn.Module):
        """A model whose loss depends on a tensor that is no parameter."""

        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 3)
            self.beside = torch.ones(3, requires_grad=True)

        def forward(self, features):
            with torch.no_grad():
                logits = self.body(features)
            return logits * self.beside

    batch, states = labelled(6), []
    for changes in ({"update": "in_backward"}, {}):
        torch.manual_seed(0)
        made = program(Beside(), **changes, viewed_elements=0)
        state, metrics = made.step(made.init(0), batch)
        states.append(state)
        assert float(metrics["grad_norm"]) == 0.0
    assert_equal(*states)


def test_weights_tied_by_memory_alone_are_refused():
    made = ff.single(zoo.plan_of("tied_by_storage", update="in_backward"))
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight share memory, but are two parameters"):
        made.init(0)


def test_gradients_and_update_can_be_called_by_themselves():
    made, usual = fused(classifier()), program(classifier(), viewed_elements=0)
    state, other = made.init(0), usual.init(0)
    gradients, buffers, _ = made.gradients(state, labelled(6))
    assert sorted(gradients) == sorted(state.params)
    assert math.isfinite(float(gradients.norm()))
    state, _ = made.update(state, gradients, buffers)
    other, _ = usual.step(other, labelled(6))
    assert difference(state.params, other.params) is None

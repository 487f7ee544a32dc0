import pytest
import torch

import forgather_fn as ff
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import classifier, decaying, labelled, labelled_batches, program, trained


class Lookahead:
    """The published algorithm around an optimizer of torch: Zhang et al., arXiv 1907.08610, Algorithm 1."""

    def __init__(self, inner, steps, alpha):
        self.inner, self.steps, self.alpha, self.count = inner, steps, alpha, 0
        self.slow = [[p.detach().clone() for p in row["params"]] for row in inner.param_groups]

    param_groups = property(lambda self: self.inner.param_groups)

    def zero_grad(self, **options):
        self.inner.zero_grad(**options)

    @torch.no_grad()
    def step(self):
        self.inner.step()
        self.count += 1
        if self.count % self.steps == 0:
            for row, slow in zip(self.param_groups, self.slow, strict=True):
                for p, held in zip(row["params"], slow, strict=True):
                    held.add_(self.alpha * (p - held))
                    p.copy_(held)


@STORAGES
@DTYPES
@pytest.mark.parametrize(("steps", "alpha"), [(5, 0.5), (3, 0.8), (1, 1.0)])
def test_every_step_is_that_of_the_paper(viewed_elements, dtype, steps, alpha):
    compare(
        ff.optim.lookahead(ff.adamw(weight_decay=0.1), steps=steps, alpha=alpha),
        lambda model: Lookahead(torch.optim.AdamW(decaying(model, 0.1), fused=True), steps, alpha),
        dtype=dtype,
        viewed_elements=viewed_elements,
    )


def test_the_slow_weights_are_what_is_evaluated_and_exported():
    made = program(classifier(), optimizer=ff.optim.lookahead(ff.sgd(), steps=4, alpha=0.5), schedule=0.1)
    state = ff.fold(made.step, made.init(0), labelled_batches(3))
    features, _ = labelled(5)
    torch.testing.assert_close(made.apply(state, features), classifier()(features).detach())
    fast = trained(classifier(), labelled_batches(4), optimizer=ff.sgd(), schedule=0.1)
    state, _ = made.step(state, labelled(6, seed=3))
    for (name, slow), first in zip(made.export(state).named_parameters(), classifier().parameters(), strict=True):
        torch.testing.assert_close(slow, (first + fast.params[name]) / 2)


def test_a_step_that_is_left_out_does_not_count():
    optimizer = ff.optim.lookahead(ff.sgd(), steps=2)
    good, bad = labelled(6), (labelled(6)[0] / 0, labelled(6)[1])
    batches = [good, bad, good, bad, good]
    state = trained(classifier(), batches, optimizer=optimizer, on_nonfinite="skip")
    expected = trained(classifier(), [good] * 3, optimizer=optimizer)
    assert int(state.opt["count"]) == 3
    for name, tensor in expected.params.items():
        assert torch.equal(state.params[name], tensor)


@pytest.mark.parametrize("options", [{"steps": 0}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_numbers_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match="lookahead: steps must be an integer of at least 1, and alpha in"):
        ff.optim.lookahead(ff.sgd(), **options)


def test_an_optimizer_that_evaluates_another_point_is_refused():
    with pytest.raises(ValueError, match="trains one point and evaluates another"):
        ff.optim.lookahead(ff.optim.schedule_free_adamw())


def test_an_optimizer_that_keeps_copies_of_the_parameters_is_refused():
    """Its next update would start from the copies, as if nothing had been set back."""
    inner = ff.optim.partitioned({"all": ("*", ff.optim.master_weights(ff.sgd()))})
    made = ff.single(
        ff.Plan(
            model=lambda: torch.nn.Linear(2, 2).bfloat16(),
            loss=ff.losses.mse,
            optimizer=ff.optim.lookahead(inner),
            schedule=0.1,
        )
    )
    with pytest.raises(ValueError, match=r"keeps copies .* the other way round"):
        made.init()

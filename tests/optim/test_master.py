import pytest
import torch

import forgather_fn as ff
from tests.optim.comparing import RATE, STORAGES
from tests.specimens import Half
from tests.toys import (
    Branches,
    assert_equal,
    branching,
    classifier,
    decaying,
    labelled_batches,
    mean_cross_entropy,
    program,
    trained,
)


def halved():
    torch.manual_seed(0)
    return Half()


def rounded_by_hand(model, batches, make):
    """Train float32 parameters by the gradients of a model that has them rounded to its own types."""
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = make(masters)
    for step, batch in enumerate(batches):
        for row in optimizer.param_groups:
            row["lr"] = RATE(step)
        model.zero_grad(set_to_none=True)
        mean_cross_entropy(model, batch).backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            p.data.copy_(master)
    return dict(zip((name for name, _ in model.named_parameters()), masters, strict=True))


MODELS = {
    "all": (lambda: classifier(torch.bfloat16), lambda: labelled_batches(15, dtype=torch.bfloat16)),
    "some": (halved, lambda: labelled_batches(15)),
    "sometimes": (
        lambda: Branches().bfloat16(),
        lambda: [branching(*on, seed=i, dtype=torch.bfloat16) for i, on in enumerate([(1, 1), (0, 1), (1, 0)] * 4)],
    ),
}


@STORAGES
@pytest.mark.parametrize(("model", "batches"), MODELS.values(), ids=MODELS.keys())
def test_it_is_the_training_of_float32_parameters_that_the_model_sees_rounded(viewed_elements, model, batches):
    decaying_like = decaying(model(), 0.3)

    def make(masters):
        rows = [{**row, "params": []} for row in decaying_like]
        for master in masters:
            rows[0 if master.dim() >= 2 else 1]["params"].append(master)
        return torch.optim.AdamW(rows, fused=True)

    expected = rounded_by_hand(model(), batches(), make)
    optimizer = ff.optim.master_weights(ff.adamw(weight_decay=0.3))
    state = trained(model(), batches(), optimizer=optimizer, schedule=RATE, viewed_elements=viewed_elements)
    for name, tensor in state.params.items():
        master = state.opt["master"].get(name, tensor)
        atol = 3e-7 if viewed_elements else 0.0  # the fused kernel rounds otherwise on other ranges of memory
        torch.testing.assert_close(master.float(), expected[name].detach(), atol=atol, rtol=0.0)
        assert torch.equal(tensor, master.to(tensor.dtype)), name


def test_small_updates_add_up():
    batches = labelled_batches(40, dtype=torch.bfloat16)
    changes = {"schedule": 1e-5, "viewed_elements": 0}
    first = classifier(torch.bfloat16)[0].weight
    lost = trained(classifier(torch.bfloat16), batches, optimizer=ff.adamw(weight_decay=0.0), **changes)
    kept = trained(
        classifier(torch.bfloat16), batches, optimizer=ff.optim.master_weights(ff.adamw(weight_decay=0.0)), **changes
    )
    moved = (kept.opt["master"]["0.weight"] - first.float()).abs().mean()
    assert moved > 5e-5
    assert (lost.params["0.weight"] - first).float().abs().mean() < moved / 2


@pytest.mark.parametrize(
    "inner",
    [
        ff.optim.lion(weight_decay=0.1),
        ff.optim.muon(match=["body.weight", "head.weight"]),
        ff.optim.schedule_free_adamw(),
        ff.optim.adafactor(),
        ff.optim.lookahead(ff.sgd(momentum=0.9), steps=2),
    ],
    ids=repr,
)
def test_it_composes_with_every_other(inner):
    made = program(halved(), optimizer=ff.optim.master_weights(inner))
    state = ff.fold(made.step, made.init(0), labelled_batches(4))
    assert all(held.dtype == torch.float32 for held in state.opt["master"].values())
    assert set(state.opt["master"]) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    dtypes = {p.dtype for p in made.export(state).parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}


def test_updates_in_the_backward_pass():
    optimizer = ff.optim.master_weights(ff.adamw(weight_decay=0.1))
    changes = {"optimizer": optimizer, "viewed_elements": 0}
    one = trained(halved(), labelled_batches(5), update="in_backward", **changes)
    assert_equal(one, trained(halved(), labelled_batches(5), **changes))


def test_a_model_without_half_precision_is_trained_as_without():
    state = trained(classifier(), labelled_batches(3), optimizer=ff.optim.master_weights(ff.sgd(momentum=0.9)))
    expected = trained(classifier(), labelled_batches(3), optimizer=ff.sgd(momentum=0.9))
    assert len(state.opt["master"]) == 0
    for name, tensor in expected.params.items():
        assert torch.equal(state.params[name], tensor)


@STORAGES
def test_a_compiled_step_keeps_the_copies(viewed_elements):
    optimizer = ff.optim.master_weights(ff.adamw(weight_decay=0.1, betas=(lambda step: 0.9, 0.99)))
    changes = {"optimizer": optimizer, "viewed_elements": viewed_elements}
    expected = trained(halved(), labelled_batches(3), **changes)
    state = trained(halved(), labelled_batches(3), compile=True, backend="aot_eager", **changes)
    for name, tensor in expected.opt["master"].items():
        torch.testing.assert_close(state.opt["master"][name], tensor, atol=1e-4, rtol=0.0)
        assert torch.equal(state.params[name], state.opt["master"][name].to(torch.bfloat16))
        assert not torch.equal(state.opt["master"][name], state.params[name].float())

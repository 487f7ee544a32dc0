"""The loss of each source of a mixture."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import forgather_fn as ff
from tests import specimens

NAMES = ("code", "prose")


def labelled(samples: int) -> dict[str, torch.Tensor]:
    return {**specimens.words(samples), "source": torch.arange(samples) % 3 // 2}


def by_hand(logits: torch.Tensor, batch: dict[str, torch.Tensor], source: int) -> torch.Tensor:
    rows = batch["source"] == source
    return F.cross_entropy(logits[rows, :-1].flatten(0, 1), batch["labels"][rows, 1:].flatten())


@pytest.mark.parametrize("samples", [2, 5])
def test_each_source_has_the_loss_of_its_samples(samples: int) -> None:
    torch.manual_seed(0)
    batch = labelled(samples)
    logits = torch.randn(samples, 6, specimens.WORDS, dtype=torch.float64, requires_grad=True)
    found = ff.losses.by_source(ff.losses.causal_lm, NAMES)(logits, batch)
    assert torch.equal(found["loss"].total, ff.losses.causal_lm(logits, batch).total)
    logits = logits.detach()
    for number, name in enumerate(NAMES):
        expected = by_hand(logits, batch, number)
        torch.testing.assert_close(found[f"loss/{name}"].value(), expected, rtol=0, atol=1e-12, equal_nan=True)
        assert not found[f"loss/{name}"].total.requires_grad
    assert bool(torch.isnan(found["loss/prose"].value())) is (samples == 2)


@pytest.mark.parametrize(
    "loss",
    [
        ff.losses.smoothed(ff.losses.causal_lm, epsilon=0.1),
        ff.losses.with_z_loss(ff.losses.causal_lm),
        ff.losses.weighted(ff.losses.causal_lm, by="importance"),
    ],
    ids=repr,
)
def test_the_parts_of_any_loss_add_up_to_it(loss: Any) -> None:
    torch.manual_seed(0)
    batch = {**labelled(5), "importance": torch.rand(5)}
    found = ff.losses.by_source(loss, NAMES)(torch.randn(5, 6, specimens.WORDS, dtype=torch.float64), batch)
    total = sum(found[f"loss/{name}"].total for name in NAMES)
    torch.testing.assert_close(total, found["loss"].total, rtol=1e-12, atol=0)
    assert float(sum(found[f"loss/{name}"].weight for name in NAMES)) == pytest.approx(float(found["loss"].weight))


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_mixture_reports_its_sources(microbatches: int) -> None:
    sources = {name: specimens.words(n) for name, n in zip(NAMES, (4, 9), strict=True)}
    mixture = ff.data.mixture(sources, label="source")
    plan = ff.Plan(
        model=specimens.llama,
        loss=ff.losses.by_source(ff.losses.causal_lm, mixture.names),
        optimizer=ff.sgd(),
        schedule=0.1,
        microbatches=microbatches,
    )
    program = ff.single(plan)
    state = program.init(0)
    found = program.evaluate(state, ff.batches(mixture, batch_size=3))
    for name, dataset in sources.items():
        alone = {**dataset, "source": torch.full((len(dataset["labels"]),), NAMES.index(name))}
        expected = program.evaluate(state, ff.batches(alone, batch_size=4))
        assert found[f"loss/{name}"] == pytest.approx(expected["loss"], rel=1e-6)
    (tick,) = ff.until(steps=1)(program.steps(state, ff.batches(mixture, batch_size=8)))
    assert {"loss/code", "loss/prose"} <= set(tick.metrics)


def test_what_has_no_sources_is_refused() -> None:
    loss = ff.losses.by_source(ff.losses.causal_lm, NAMES)
    batch = specimens.words(2)
    with pytest.raises(ValueError, match=r"by_source: the batch has no 'source'; it has \['input_ids', 'labels'\]"):
        loss(torch.randn(2, 6, specimens.WORDS), batch)
    with pytest.raises(ValueError, match="expected the names of the sources"):
        ff.losses.by_source(ff.losses.causal_lm, ("a", "a"))
    with pytest.raises(ValueError, match="by_source: the loss"):
        ff.losses.by_source(ff.losses.from_output(weight="samples"), NAMES)

"""The zoo: every specimen with its loss and data, and the plans that train it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import nn

import forgather_fn as ff
from forgather_fn.plan import Plan
from forgather_fn.workspace import VIEWED_ELEMENTS
from tests import specimens


@attrs.frozen
class Specimen:
    """One model with its loss and data.

    Attributes:
        model: Builds it, from torch's default generator.
        loss: For it.
        batch: ``samples -> data``, always the same.
        outside: What puts it outside the law of accumulation.
    """

    model: Callable[[], nn.Module]
    loss: Any
    batch: Callable[[int], Any]
    outside: str | None = None


SPECIMENS: dict[str, Specimen] = {
    "mlp": Specimen(specimens.mlp, ff.losses.cross_entropy, specimens.ragged_classes),
    "mlp_mse": Specimen(specimens.mlp, ff.losses.mse, specimens.values),
    "mlp_function": Specimen(specimens.mlp, specimens.named_losses, specimens.ragged_classes),
    "mlp_own_loss": Specimen(specimens.Returning, ff.losses.from_output(weight="samples"), specimens.pairs_by_name),
    "batchnorm": Specimen(
        specimens.channels_last_cnn, ff.losses.cross_entropy, specimens.images, outside="batch statistics"
    ),
    "groupnorm": Specimen(specimens.channels_last_groupnorm, ff.losses.cross_entropy, specimens.images),
    "tied_by_object": Specimen(specimens.tied_by_object, ff.losses.causal_lm, specimens.token_pairs),
    "tied_by_storage": Specimen(specimens.tied_by_storage, ff.losses.causal_lm, specimens.token_pairs),
    "partly_frozen": Specimen(specimens.partly_frozen, ff.losses.cross_entropy, specimens.ragged_classes),
    "unused": Specimen(specimens.Unused, ff.losses.cross_entropy, specimens.ragged_classes),
    "intermittent": Specimen(specimens.Intermittent, ff.losses.cross_entropy, specimens.ragged_classes),
    "two_dtypes": Specimen(specimens.TwoDtypes, ff.losses.cross_entropy, specimens.ragged_classes),
    "half": Specimen(specimens.Half, ff.losses.cross_entropy, specimens.ragged_classes),
    "odd": Specimen(specimens.Odd, ff.losses.cross_entropy, specimens.ragged_classes),
    "reassigning": Specimen(specimens.Reassigning, ff.losses.cross_entropy, specimens.ragged_classes),
    "dropout": Specimen(
        specimens.dropout_mlp, ff.losses.cross_entropy, specimens.ragged_classes, outside="draws random numbers"
    ),
    "llama": Specimen(specimens.llama, ff.losses.causal_lm, specimens.words),
    "gpt2": Specimen(specimens.gpt2, ff.losses.from_output(weight="next_tokens"), specimens.words),
    "gpt2_dropout": Specimen(
        functools.partial(specimens.gpt2, 0.3),
        ff.losses.from_output(weight="next_tokens"),
        specimens.words,
        outside="draws random numbers",
    ),
    "bert": Specimen(specimens.bert, ff.losses.cross_entropy, specimens.sentences),
    "vit": Specimen(specimens.vit, ff.losses.cross_entropy, specimens.pictures),
}

OPTIMIZERS: dict[str, Callable[[], ff.Optimizer]] = {
    "adamw": lambda: ff.adamw(weight_decay=0.1),
    "adam": lambda: ff.adam(weight_decay=0.01),
    "sgd": lambda: ff.sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "plain_sgd": lambda: ff.sgd(),
    "rmsprop": lambda: ff.from_torch(lambda groups: torch.optim.RMSprop(groups, momentum=0.5)),
}

TRANSFORMS: dict[str, tuple[ff.Transform, ...]] = {
    "none": (),
    "clipped": (ff.clipped(0.1),),
    "noise": (ff.noise(0.01),),
    "chain": (ff.chain(ff.noise(0.01), ff.clipped(0.1)), ff.stateless(torch.tanh)),
}

STORAGES = {"views": VIEWED_ELEMENTS, "own": 0}
"""Where gradients lie: in views of a flat buffer, or where autograd puts them."""


def plan_of(name: str, **fields: Any) -> Plan:
    """Make a plan for a specimen; the model is a factory, unless another is given."""
    chosen = SPECIMENS[name]
    return Plan(**{"model": chosen.model, "loss": chosen.loss, "optimizer": ff.adamw(), "schedule": 0.01} | fields)


def plans(name: str, storage: str) -> st.SearchStrategy[Plan]:
    """Give plans for a specimen: of any optimizer, transforms, average and number of microbatches, and of a module as
    well as its factory.

    Hypothesis, derandomized, draws the same for every specimen; so each begins elsewhere in the lists.
    """
    turn = sorted(SPECIMENS).index(name) + sorted(STORAGES).index(storage)

    def one_of(choices: Sequence[Any]) -> st.SearchStrategy[Any]:
        first = turn % len(choices)
        return st.sampled_from([*choices[first:], *choices[:first]])

    return st.builds(
        lambda model, optimizer, transforms, **fields: plan_of(
            name,
            model=model(),
            optimizer=OPTIMIZERS[optimizer](),
            transforms=TRANSFORMS[transforms],
            viewed_elements=STORAGES[storage],
            **fields,
        ),
        model=one_of([lambda: SPECIMENS[name].model, lambda: instance(name)]),
        optimizer=one_of(sorted(OPTIMIZERS)),
        transforms=one_of(sorted(TRANSFORMS)),
        microbatches=one_of([1, 2, 3]),
        precision=one_of(["as_built", "float32", "bfloat16", "float64", "float16"]),
        init=one_of(["as_built", "by_name"]),
        average=one_of([None, ff.ema(0.5)]),
        on_nonfinite=one_of(["raise", "skip"]),
    )


def instance(name: str) -> nn.Module:
    """Build a specimen, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SPECIMENS[name].model()

import pytest
import torch
from torch import nn

import forgather_fn as ff
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import Branches, branching, classifier, labelled_batches, program


def split(model, weight_decay, muon, match=lambda name: "0" in name, **options):
    """Muon of torch on some matrices, AdamW on the rest."""
    own = {name: p for name, p in model.named_parameters() if p.dim() == 2 and match(name)}
    rest = [p for name, p in model.named_parameters() if name not in own]
    rows = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(list(own.values()), weight_decay=weight_decay, **muon),
        torch.optim.AdamW([row for row in rows if row["params"]], betas=(0.9, 0.95), fused=True, **options),
    ]


@STORAGES
@DTYPES
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"adjust_lr_fn": "match_rms_adamw"}),
        ({"adjust": "original", "nesterov": False}, {"nesterov": False}),
        (
            {"adjust": "original", "momentum": 0.8, "iterations": 3, "coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
            {"momentum": 0.8, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
        ),
    ],
)
def test_every_step_is_that_of_torch(viewed_elements, dtype, ours, theirs):
    # Muon rounds to bfloat16 inside: where it did so the other way once, the gap would be seen.
    compare(
        ff.optim.muon(weight_decay=0.2, match="0.weight", **ours),
        lambda model: split(model, 0.2, theirs),
        dtype=dtype,
        viewed_elements=viewed_elements,
    )


@STORAGES
def test_gradients_that_come_and_go(viewed_elements):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate([(1, 1), (0, 1), (1, 0), (1, 1)] * 3)]
    compare(
        ff.optim.muon(weight_decay=0.2, adjust="original"),
        lambda model: split(model, 0.2, {}, match=lambda name: True),
        model=lambda dtype: Branches().to(dtype),
        batches=batches,
        viewed_elements=viewed_elements,
    )


class Dot(nn.Module):
    """The sum of the products with one weight, whose gradient is the input."""

    def __init__(self, weight):
        super().__init__()
        self.w = nn.Parameter(weight)

    def forward(self, x):
        return (self.w * x[0].reshape(self.w.shape)).sum()


def test_a_convolution_is_the_matrix_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 4, 3, 2, 2, generator=generator)
    results = []
    for shape in [(4, 3, 2, 2), (4, 12)]:
        made = program(
            Dot(weight.reshape(shape).clone()),
            loss=lambda outputs, batch: ff.Mean(outputs, 1.0),
            optimizer=ff.optim.orthogonal(),
        )
        state, _ = made.step(made.init(0), (gradient[None], torch.zeros(1)))
        results.append(state.params["w"].reshape(4, 12).clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], weight.reshape(4, 12))


def test_singular_values_are_brought_near_to_one():
    from forgather_fn.optim.muon import COEFFICIENTS, newton_schulz

    generator = torch.Generator().manual_seed(0)
    for shape in [(8, 8), (20, 6), (6, 20)]:
        found = torch.linalg.svdvals(
            newton_schulz(torch.randn(shape, generator=generator), 5, COEFFICIENTS, 1e-7).float()
        )
        assert found.min() > 0.3
        assert found.max() < 1.4


def test_embeddings_heads_and_vectors_are_left_to_adamw():
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(3, 4), "layers": nn.ModuleList([nn.Linear(4, 4)]), "lm_head": nn.Linear(4, 3)}
    )
    hypers = ff.optim.muon().groups(dict(model.named_parameters()))
    assert {name for name, hyper in hypers.items() if hyper.part == "muon"} == {"layers.0.weight"}
    assert {hyper.part for hyper in hypers.values()} == {"muon", "rest"}


def test_slots_are_kept_for_the_parameters_of_each_part_only():
    state = program(classifier(), optimizer=ff.optim.muon(match="*.weight")).init(0)
    assert list(state.opt["muon"]["momentum"]) == ["0.weight", "2.weight"]
    assert list(state.opt["rest"]["exp_avg"]) == ["0.bias", "2.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be a number in"),
        ({"iterations": 0}, "iterations must be an integer from 1 to 99"),
        ({"coefficients": (1.0, 2.0)}, "coefficients three numbers"),
        ({"adjust": "originl"}, "'originl' is not one of"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ff.optim.muon(**options)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"muon: '0.bias' has less than two dimensions"):
        program(classifier(), optimizer=ff.optim.muon(match="0.*")).init(0)


def test_a_model_of_matrices_alone_leaves_nothing_for_the_rest():
    """As one whose adapters of low rank are trained, and nothing else."""
    adapted = ff.lora(classifier, "*weight", rank=2, alpha=4)
    made = program(adapted, optimizer=ff.optim.muon())
    state = ff.fold(made.step, made.init(0), labelled_batches(2))
    assert set(state.opt["muon"]["momentum"]) == set(state.params)
    assert state.opt["rest"] == {}

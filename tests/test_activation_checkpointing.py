"""Blocks that are run again in the backward pass give the same bits, and keep less."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.activation_checkpointing import activation_checkpointed
from tests import zoo
from tests.toys import VIEWED, assert_equal, labelled, labelled_batches, program


class Counting(nn.Module):
    """A residual block of dropout, batch statistics, and a buffer that is made anew; it says how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.register_buffer("seen", torch.zeros(()))
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.runs += 1
        self.seen = self.seen + 1
        out: Tensor = x + self.body(x) * scale * self.seen
        return out


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Counting() for _ in range(3)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("viewed_elements", [0, VIEWED])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("blocks", [("layers.*",), (Counting,), ("layers.0", nn.Dropout, "*body")])
@pytest.mark.parametrize("precision", ["as_built", "float16"])
def test_the_bits_are_the_same(viewed_elements, microbatches, blocks, precision):
    fields = {"viewed_elements": viewed_elements, "microbatches": microbatches, "precision": precision}
    states = []
    for model in (Deep(), activation_checkpointed(Deep(), *blocks)):
        made = program(model, **fields)
        states.append(ff.fold(made.step, made.init(0), labelled_batches(5)))
    assert_equal(*states)
    assert states[1].buffers["layers.0.seen"].item() == int(states[1].updates) * microbatches
    assert int(states[1].updates) >= 2  # the first in float16 overflow


@pytest.mark.parametrize(
    ("name", "blocks"), [("llama", "model.layers.*"), ("gpt2_dropout", "transformer.h.*"), ("vit", "*layer*")]
)
def test_the_bits_of_models_of_hugging_face_are_the_same(name, blocks):
    states = []
    for model in (zoo.instance(name), activation_checkpointed(zoo.instance(name), blocks)):
        made = ff.single(zoo.plan_of(name, model=model))
        states.append(ff.fold(made.step, made.init(0), [zoo.SPECIMENS[name].batch(4)] * 2))
    assert_equal(*states)


@pytest.mark.parametrize("name", ["llama", "gpt2_dropout", "vit", "bert"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_models_that_do_it_themselves_give_the_same_bits(name, microbatches):
    states = []
    for model in (zoo.instance(name), zoo.instance(name)):
        if states:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        made = ff.single(zoo.plan_of(name, model=model, microbatches=microbatches))
        states.append(ff.fold(made.step, made.init(0), [zoo.SPECIMENS[name].batch(4)] * 2))
    assert_equal(*states)


def test_blocks_run_twice_in_training_and_once_in_evaluation():
    model = activation_checkpointed(Deep(), Counting)
    made = program(model)
    state, _ = made.step(made.init(0), labelled(6))
    assert [layer.runs for layer in model.layers] == [2, 2, 2]
    made.evaluate(state, [labelled(6)])
    assert [layer.runs for layer in model.layers] == [3, 3, 3]


def test_less_is_kept_for_the_backward_pass():
    def kept(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(labelled(600)[0])
        return sum(sizes)

    assert kept(activation_checkpointed(Deep(), "layers.*")) < kept(Deep()) / 2


def test_a_block_inside_a_block_belongs_to_it():
    model = activation_checkpointed(Deep(), nn.BatchNorm1d, "layers.?", "layers.0.body")
    assert [name for name, child in model.named_modules() if "forward" in vars(child)] == [
        "layers.0",
        "layers.1",
        "layers.2",
    ]
    again = activation_checkpointed(model, "layers.?")
    made = program(again)
    made.step(made.init(0), labelled(6))
    assert [layer.runs for layer in again.layers] == [2, 2, 2]


def test_names_and_signatures_stay():
    model = activation_checkpointed(Deep(), Counting)
    assert list(model.state_dict()) == list(Deep().state_dict())
    assert list(inspect.signature(model.layers[0].forward).parameters) == ["x", "scale"]


def test_a_copy_runs_its_own_blocks():
    model = activation_checkpointed(Deep(), Counting)
    other = copy.deepcopy(model)
    other(labelled(6)[0]).sum().backward()
    assert [layer.runs for layer in model.layers] == [0, 0, 0]
    assert [layer.runs for layer in other.layers] == [2, 2, 2]
    assert model.layers[0].body[0].weight.grad is None


def test_compiled_steps_run_blocks_again():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3))

    states = []
    for fields in ({}, {"compile": True, "backend": "aot_eager"}):
        torch.manual_seed(0)
        made = program(activation_checkpointed(build(), "1"), **fields)
        states.append(ff.fold(made.step, made.init(0), labelled_batches(2)))
    for name, weight in states[0].params.items():
        torch.testing.assert_close(states[1].params[name], weight, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("layer.*", r"'layer\.\*' chooses no module; there are 'layers', 'layers\.0', "),
        (nn.Conv2d, "Conv2d'> chooses no module"),
        (Deep, "the block is the whole model"),
    ],
)
def test_what_chooses_nothing_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        activation_checkpointed(Deep(), block)

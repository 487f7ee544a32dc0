"""What waits on the host comes back as it was, and nothing that need not go there does."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import forgather_fn as ff
from forgather_fn import activation_offloading
from forgather_fn.activation_checkpointing import activation_checkpointed
from forgather_fn.activation_offloading import activation_offloaded
from tests import zoo
from tests.test_activation_checkpointing import Counting, Deep
from tests.toys import VIEWED, assert_equal, labelled, labelled_batches, program


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the host for an accelerator, so that tensors are really copied; gives the sizes of those that are."""
    sizes: list[int] = []
    send = activation_offloading._sent

    def noted(tensor: torch.Tensor) -> object:
        sizes.append(tensor.numel())
        return send(tensor)

    monkeypatch.setattr(activation_offloading, "_on_host", lambda tensor: False)
    monkeypatch.setattr(activation_offloading, "_sent", noted)
    return sizes


@pytest.mark.parametrize("viewed_elements", [0, VIEWED])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("blocks", [("layers.*",), (Counting,), ("layers.0", nn.Dropout, "*body")])
@pytest.mark.parametrize("precision", ["as_built", "float16"])
def test_the_bits_are_the_same(moved, viewed_elements, microbatches, blocks, precision):
    fields = {"viewed_elements": viewed_elements, "microbatches": microbatches, "precision": precision}
    states = []
    for model in (Deep(), activation_offloaded(Deep(), *blocks, least_bytes=0)):
        made = program(model, **fields)
        states.append(ff.fold(made.step, made.init(0), labelled_batches(4)))
    assert_equal(*states)
    assert moved


@pytest.mark.parametrize(
    ("name", "blocks"), [("llama", "model.layers.*"), ("gpt2_dropout", "transformer.h.*"), ("vit", "*layer*")]
)
@pytest.mark.parametrize("again", [False, True])
def test_the_bits_of_models_of_hugging_face_are_the_same(moved, name, blocks, again):
    def offloaded() -> nn.Module:
        model = zoo.instance(name)
        return activation_offloaded(activation_checkpointed(model, blocks) if again else model, blocks, least_bytes=0)

    states = []
    for model in (zoo.instance(name), offloaded()):
        made = ff.single(zoo.plan_of(name, model=model))
        states.append(ff.fold(made.step, made.init(0), [zoo.SPECIMENS[name].batch(4)] * 2))
    assert_equal(*states)
    assert moved


def test_parameters_buffers_and_small_tensors_stay(moved):
    model = activation_offloaded(Deep(), "layers.*", least_bytes=600)
    made = program(model)
    made.step(made.init(0), labelled(40))
    assert moved
    assert min(moved) * 4 >= 600
    assert len(set(moved)) == 1  # the activations of 40 rows of 5, and neither weights nor buffers


def test_on_the_host_nothing_is_copied():
    model = activation_offloaded(Deep(), "layers.*", least_bytes=0)
    sent = []
    with saved_tensors_hooks(lambda tensor: sent.append(tensor) or tensor, lambda tensor: tensor):
        model(labelled(6)[0])
    assert all(not isinstance(tensor, activation_offloading._Host) for tensor in sent)
    model(labelled(6)[0]).sum().backward()


def test_of_blocks_that_run_again_only_inputs_wait(moved):
    x = labelled(50)[0]
    activation_offloaded(Deep(), "layers.*", least_bytes=0)(x)
    everything = sum(moved)
    moved.clear()
    activation_offloaded(activation_checkpointed(Deep(), "layers.*"), "layers.*", least_bytes=0)(x)
    assert sum(moved) < everything / 2


class Twice(nn.Module):
    """Uses one weight two times, so that its value is needed after its first gradient is there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


def test_changes_in_between_are_found():
    block = activation_offloaded(nn.Sequential(Twice()), Twice)
    out = block(labelled(6)[0].requires_grad_()).sum()
    with torch.no_grad():
        block[0].layer.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"\(5, 5\) that the backward pass .* needs has been modified"):
        out.backward()


def test_updates_in_the_backward_pass_agree():
    states = []
    for wrap in (lambda model: model, lambda model: activation_offloaded(model, "layers.*")):
        made = program(wrap(Deep()), update="in_backward")
        states.append(ff.fold(made.step, made.init(0), labelled_batches(2)))
    assert_equal(*states)


def test_names_signatures_and_copies():
    model = activation_offloaded(Deep(), Counting)
    assert list(model.state_dict()) == list(Deep().state_dict())
    assert list(inspect.signature(model.layers[0].forward).parameters) == ["x", "scale"]
    other = copy.deepcopy(model)
    other(labelled(6)[0]).sum().backward()
    assert [layer.runs for layer in model.layers] == [0, 0, 0]
    assert [layer.runs for layer in other.layers] == [1, 1, 1]
    again = activation_offloaded(model, Counting)
    assert not isinstance(again.layers[0].forward.__wrapped__, activation_offloading._Offloaded)


def test_a_step_that_is_compiled_whole_is_refused():
    made = program(activation_offloaded(Deep(), "layers.*"), compile=True, backend="aot_eager")
    with pytest.raises(ff.CompileError, match="the step cannot be compiled whole"):
        made.step(made.init(0), labelled(6))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        ("layer.*", {}, r"activation_offloaded: 'layer\.\*' chooses no module; there are 'layers', "),
        (Deep, {}, "the block is the whole model, of which its loss keeps as much"),
        ("layers.*", {"least_bytes": -1}, "least_bytes must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(block, options, message):
    with pytest.raises(ValueError, match=message):
        activation_offloaded(Deep(), block, **options)

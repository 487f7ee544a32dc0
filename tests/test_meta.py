"""Models that are built on the meta device get memory and values where they are trained."""

import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.meta import initialise_from_meta, on_meta, separable
from tests import zoo
from tests.toys import assert_equal, classifier, labelled, program

CPU = torch.device("cpu")
RESET = ["mlp", "batchnorm", "groupnorm", "tied_by_object", "tied_by_storage", "partly_frozen", "unused", "two_dtypes"]
HUGGING_FACE = ["llama", "gpt2", "bert", "vit"]


def on(device: str, factory):
    """Wrap a factory so that it builds on a device."""

    def build() -> nn.Module:
        with torch.device(device):
            return factory()

    return build


class Table(nn.Module):
    """Has a buffer that its constructor computes, and says how again, or does not."""

    table: Tensor

    def __init__(self, kind: torch.dtype, *, resets: bool) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.register_buffer("table", torch.ones(3).to(kind), persistent=False)
        if resets:
            self.reset_parameters = self.fill

    def fill(self) -> None:
        self.table.fill_(1)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.body(features) * self.table
        return out


class Replacing(nn.Module):
    """Makes its buffer anew when it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.register_buffer("table", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table = torch.ones(3)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.body(features) * self.table
        return out


@pytest.mark.parametrize("name", [*RESET, *HUGGING_FACE])
class TestValues:
    def test_are_those_of_a_model_that_is_built_at_home(self, name):
        factory = zoo.SPECIMENS[name].model
        plan = zoo.plan_of(name, model=on("meta", factory), init="by_name")
        ours = ff.single(plan)
        state = ours.init(3)
        theirs = ff.single(zoo.plan_of(name, init="by_name"))
        assert_equal(state, theirs.init(3))
        batch = zoo.SPECIMENS[name].batch(4)
        one, _ = ours.step(state, batch)
        other, _ = theirs.step(theirs.init(3), batch)
        assert_equal(one, other)

    def test_another_seed_gives_others(self, name):
        made = ff.single(zoo.plan_of(name, model=on("meta", zoo.SPECIMENS[name].model), init="by_name"))
        assert ff.difference(made.init(0), made.init(1)) is not None


def test_ties_strides_and_attributes_are_kept():
    with torch.device("meta"):
        model = zoo.SPECIMENS["tied_by_object"].model()
        model.append(nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last).requires_grad_(False))
    model[0].weight.own = "kept"
    assert on_meta(model)
    initialise_from_meta(model, 0, CPU)
    assert not on_meta(model)
    assert model[0].weight is model[2].weight
    assert model[0].weight.own == "kept"
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[3].weight.requires_grad


def test_weights_tied_by_memory_alone_stay_so():
    model = on("meta", zoo.SPECIMENS["tied_by_storage"].model)()
    initialise_from_meta(model, 0, CPU)
    assert model[0].weight is not model[2].weight
    assert model[0].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_checkpoint_is_restored_into_it(tmp_path):
    made = program(on("meta", classifier), init="by_name")
    stream = made.steps(made.init(0), [labelled(6)] * 2)
    state = ff.last(ff.at_end(ff.saved(tmp_path))(stream))
    assert_equal(state, program(on("meta", classifier), init="by_name").restore(tmp_path))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("resets", [True, False])
def test_buffers_that_nothing_fills_are_refused_by_name(kind, resets):
    made = program(on("meta", lambda: Table(kind, resets=resets)), init="by_name")
    if not resets:
        with pytest.raises(ValueError, match=r"nothing gave 'table' a value: .* reset_parameters\(\)"):
            made.init(0)
        return
    assert torch.equal(made.init(0).buffers["table"], torch.ones(3).to(kind))


def test_a_buffer_that_is_filled_in_part_is_refused():
    model = on("meta", lambda: Table(torch.float32, resets=True))()
    model.reset_parameters = lambda: model.table[:2].fill_(1)
    with pytest.raises(ValueError, match="nothing gave 'table' a value"):
        initialise_from_meta(model, 0, CPU)


def test_a_buffer_that_is_made_anew_is_taken():
    state = program(on("meta", Replacing), init="by_name").init(0)
    assert torch.equal(state.buffers["table"], torch.ones(3))


def test_a_parameter_that_nothing_fills_is_refused_by_name():
    model = on("meta", lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)))()
    model[1].reset_parameters = lambda: nn.init.zeros_(model[1].bias)
    with pytest.raises(ValueError, match=r"nothing gave '1\.weight' a value"):
        initialise_from_meta(model, 0, CPU)


def test_a_plain_tensor_is_refused_by_name():
    model = on("meta", classifier)()
    model[1].table = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"'1\.table' of the model is a plain tensor on the meta device"):
        initialise_from_meta(model, 0, CPU)


def test_tensors_that_are_elsewhere_are_initialised_too():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, device="meta"))
    whole = program(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), init="by_name").init(2)
    assert_equal(whole, program(model, init="by_name").init(2))


def test_as_built_it_has_no_values():
    with pytest.raises(ValueError, match=r'on the meta device .* Plan\(init="by_name"\)'):
        program(on("meta", classifier)).init(0)


class Reaching(nn.Module):
    """Has a part whose values the whole sets, reads, or shares."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        if how == "shares":
            self.other.weight = self.one.weight

    def reset_parameters(self) -> None:
        if self.how == "sets":
            nn.init.zeros_(self.one.weight.data)
        if self.how == "reads":
            self.other.bias.data.add_(self.one.bias.data)
        if self.how == "looks" and self.other.bias.sum() > 0:
            nn.init.zeros_(self.other.bias)


@pytest.mark.parametrize(
    ("how", "apart"), [("not", True), ("sets", False), ("reads", False), ("shares", False), ("looks", False)]
)
def test_parts_are_initialised_apart_where_they_touch_nothing_else(how, apart):
    model = on("meta", lambda: Reaching(how))()
    before = dict(model.named_parameters())
    assert separable(model, [{"one"}, {"other", ""}]) is apart
    assert all(tensor is before[name] and tensor.is_meta for name, tensor in model.named_parameters())
    assert separable(Reaching(how), [{"one"}, {"other", ""}]) is False

import copy
import pickle

import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.state import Arrays, raise_if_nonfinite
from tests.toys import classifier, labelled, labelled_batches, program

VIEWS = (
    "params",
    "frozen",
    "buffers",
    "opt",
    "transforms",
    "ema",
    "controls",
    "updates",
    "skipped",
    "tokens",
    "nonfinite",
)


def norm_classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


@pytest.fixture
def made():
    return program(norm_classifier(), average=ff.ema(0.9))


def test_a_consumed_state_names_the_step_and_shows_the_fix(made):
    state = ff.fold(made.step, made.init(0), labelled_batches(3))
    made.step(state, labelled(6))
    with pytest.raises(ff.ConsumedStateError, match="consumed by step 3") as caught:
        state.params["0.weight"]
    for fix in ("state, metrics = program.step(state, batch)", "kept = state.copy()", "donate=False"):
        assert fix in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", VIEWS)
def test_no_tensor_of_a_consumed_state_can_be_read(made, name):
    state = made.init(0)
    getattr(state, name)
    made.step(state, labelled(6))
    with pytest.raises(ff.ConsumedStateError):
        getattr(state, name)


@pytest.mark.parametrize(
    "use",
    [
        lambda made, state: made.step(state, labelled(6)),
        lambda made, state: made.gradients(state, labelled(6)),
        lambda made, state: made.evaluate(state, [labelled(6)]),
        lambda made, state: made.apply(state, labelled(6)[0]),
        lambda made, state: made.export(state),
        lambda made, state: list(made.steps(state, [labelled(6)])),
        lambda made, state: state.copy(),
        lambda made, state: state.as_tree(),
        lambda made, state: ff.difference(state, state),
    ],
    ids=["step", "gradients", "evaluate", "apply", "export", "steps", "copy", "as_tree", "difference"],
)
def test_no_function_takes_a_consumed_state(made, use):
    state = made.init(0)
    use(made, state.copy())
    made.step(state, labelled(6))
    with pytest.raises(ff.ConsumedStateError, match="step 0"):
        use(made, state)


def test_an_update_refuses_a_consumed_state(made):
    state = made.init(0)
    gradients, buffers, _ = made.gradients(state, labelled(6))
    after, _ = made.update(state, gradients, buffers)
    with pytest.raises(ff.ConsumedStateError, match="step 0"):
        made.update(state, gradients, buffers)
    assert after.step == 1


def test_a_state_can_be_consumed_once_only(made):
    state = made.init(0)
    state.consume("a test")
    with pytest.raises(ff.ConsumedStateError, match="consumed by a test"):
        state.consume("another")
    assert repr(state).endswith("consumed by a test)")


@pytest.mark.parametrize("stepped", ["original", "alias"])
def test_an_alias_of_a_consumed_state_is_refused_too(made, stepped):
    original = made.init(0)
    alias = attrs.evolve(original, samples=100)
    first, second = (original, alias) if stepped == "original" else (alias, original)
    made.step(first, labelled(6))
    with pytest.raises(ff.ConsumedStateError):
        made.step(second, labelled(6))


def test_the_integers_of_a_consumed_state_stay_readable(made):
    state = made.init(7)
    assert not state.consumed
    made.step(state, labelled(6))
    assert state.consumed
    assert (state.step, state.samples, state.seed) == (0, 0, 7)


def test_a_copy_goes_its_own_way(made):
    state = made.init(0)
    copy = state.copy()
    after, _ = made.step(state, labelled(6))
    assert not copy.consumed
    assert ff.difference(copy, program(norm_classifier(), average=ff.ema(0.9)).init(0)) is None
    again, _ = made.step(copy, labelled(6))
    assert ff.difference(after, again) is None


def test_a_copy_shares_no_memory_but_the_frozen_parameters():
    model = norm_classifier()
    model[0].weight.requires_grad_(False)
    state = program(model, average=ff.ema(0.9)).init(0)
    copy = state.copy()
    tensors = [(name, tensor) for name, tensor in leaves(state) if isinstance(tensor, torch.Tensor)]
    assert len(tensors) > 20
    for (name, one), (_, other) in zip(leaves(state), leaves(copy), strict=True):
        if isinstance(one, torch.Tensor):
            assert (one.data_ptr() == other.data_ptr()) is name.startswith("frozen"), name


def leaves(state):
    from forgather_fn.tree import walk

    return list(walk(state.as_tree()))


def test_a_state_is_data_only(made):
    state, _ = made.step(made.init(0), labelled(6))
    assert {type(leaf) for _, leaf in leaves(state)} <= {torch.Tensor, int, float, str, type(None)}
    assert set(state.as_tree()) >= {"step", "samples", "seed", "data", *(f.name for f in attrs.fields(Arrays))}


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("optimizer", [ff.adamw(), ff.from_torch(lambda rows: torch.optim.RMSprop(rows))], ids=repr)
def test_a_state_that_was_sent_elsewhere_goes_on_to_the_bit(twin, optimizer):
    made = program(norm_classifier(), optimizer=optimizer, average=ff.ema(0.9))
    state, _ = made.step(made.init(0), labelled(6))
    sent = twin(state)
    assert ff.difference(sent, state) is None
    after = ff.fold(made.step, state, labelled_batches(2))
    assert not sent.consumed
    assert ff.difference(ff.fold(made.step, sent, labelled_batches(2)), after) is None


def test_a_state_is_frozen(made):
    state = made.init(0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        state.step = 3
    with pytest.raises(AttributeError):
        state.params = {}


def test_states_compare_by_identity_and_not_by_elements(made):
    state = made.init(0)
    assert state == state
    assert state != state.copy()
    assert len({state, state.copy()}) == 2


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("params/2.bias", lambda state: state.params["2.bias"][1].add_(1)),
        ("buffers/1.running_mean", lambda state: state.buffers["1.running_mean"].add_(1)),
        ("opt/exp_avg/0.weight", lambda state: state.opt["exp_avg"]["0.weight"].add_(1)),
        ("ema/1.weight", lambda state: state.ema["1.weight"].add_(1)),
        ("tokens", lambda state: state.tokens.add_(1)),
        ("skipped", lambda state: state.skipped.add_(1)),
    ],
)
def test_a_comparison_names_the_path_that_differs(made, path, change):
    state = made.init(0)
    other = state.copy()
    assert ff.difference(state, other) is None
    change(other)
    assert ff.difference(state, other).startswith(f"{path}: ")


def test_a_comparison_looks_at_the_integers_first(made):
    state = made.init(0)
    assert ff.difference(state, attrs.evolve(state, step=3)) == "step: 0 and 3"
    assert ff.difference(state, attrs.evolve(state, data="x")) == "data: None and 'x'"


def test_the_repr_is_short_and_shows_no_tensor():
    state = program(classifier(hidden=5000), average=ff.ema(0.9)).init(3)
    text = repr(state)
    assert text.startswith("TrainState(step=0, samples=0, seed=3, params=45,003 in 4 tensors (175.8 KiB)")
    assert "ema=45,003" in text
    assert "opt=90," in text
    assert "tensor(" not in text
    assert len(text) < 300


def test_the_repr_of_a_consumed_state_says_so(made):
    state = made.init(0)
    made.step(state, labelled(6))
    assert repr(state) == "TrainState(step=0, samples=0, seed=0, consumed by step 0)"


def test_the_flag_of_the_device_is_raised_with_the_first_bad_step(made):
    state = made.init(0)
    raise_if_nonfinite(state)
    state.nonfinite.fill_(5)
    with pytest.raises(ff.NonFiniteError, match=r"^step 5 \(the 6th\): .*not finite") as caught:
        raise_if_nonfinite(state)
    assert 'on_nonfinite="skip"' in str(caught.value)

import copy
import gc
import io
import warnings
import weakref

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import forgather_fn as ff
from tests.toys import (
    VIEWED,
    Noisy,
    assert_equal,
    assert_same_tensors,
    by_hand,
    classifier,
    fused_adamw,
    labelled,
    labelled_batches,
    program,
    trained,
    unchanged,
)


class Tied(nn.Module):
    """A weight under three names: twice the same parameter, and once another over its memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.again, self.copy = (nn.Linear(5, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)
        self.again.weight = self.encode.weight
        self.copy.weight = nn.Parameter(self.encode.weight.detach())

    def forward(self, features):
        return self.head(self.encode(features) + self.again(features) + self.copy(features))


def normalised():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


@pytest.fixture
def bound():
    """A program, its module, and a state that the module is bound to, after two steps."""
    module = Noisy()
    made = program(module)
    return made, module, ff.fold(made.step, made.init(0), labelled_batches(2))


class TestTheModuleIsTheState:
    def test_its_parameters_are_views_of_the_state(self, bound):
        made, module, state = bound
        for name, parameter in module.named_parameters():
            assert parameter.data_ptr() == state.params[name].data_ptr()
        parameters = list(module.parameters())
        made.step(state, labelled(6))
        assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))

    def test_init_leaves_the_values_of_an_instance(self):
        state = program(classifier()).init(0)
        assert_same_tensors(state, classifier())

    def test_values_loaded_in_place_are_those_of_the_state(self, bound):
        made, module, state = bound
        module.load_state_dict(Noisy().state_dict())
        for name, tensor in Noisy().named_parameters():
            assert torch.equal(state.params[name], tensor)
        made.step(state, labelled(6))

    def test_a_part_in_evaluation_mode_stays_in_it(self):
        module = Noisy()
        module.body[1].eval()
        made = program(module)
        state, _ = made.step(made.init(0), labelled(6))
        assert state.buffers["body.1.num_batches_tracked"].item() == 0
        made.evaluate(state, [labelled(6)])
        assert [child.training for child in module.body] == [True, False, True, True]
        assert module.training

    def test_a_model_in_evaluation_mode_as_a_whole_is_trained_in_training_mode(self):
        made = program(Noisy().eval())
        assert_equal(ff.fold(made.step, made.init(0), labelled_batches(2)), trained(Noisy(), labelled_batches(2)))
        assert made.plan.model.training


class TestStatesAndPrograms:
    def test_a_state_that_is_not_bound_is_bound_before_it_is_used(self, bound):
        made, module, state = bound
        kept = state.copy()
        state, _ = made.step(state, labelled(6, seed=5))
        features = labelled(6)[0]
        assert torch.equal(made.apply(kept, features), made.apply(kept.copy(), features))
        assert not torch.equal(made.apply(kept, features), made.apply(state, features))
        assert module.body[0].weight.data_ptr() == state.params["body.0.weight"].data_ptr()

    @pytest.mark.parametrize("frozen_by", ["first", "second", "none"])
    def test_two_programs_on_one_module_train_as_if_alone(self, frozen_by):
        def optimizer(name):
            return ff.adamw(groups=[ff.group("body.0.*", frozen=True)] if name == frozen_by else [])

        module = Noisy()
        one = program(module, optimizer=optimizer("first"))
        first = one.init(0)
        other = program(module, optimizer=optimizer("second"), loss=ff.losses.Objective(
            total=lambda outputs, batch: outputs.square().sum(), weight=lambda batch: 6.0
        ))  # fmt: skip
        second = other.init(0)
        begun = second.copy()
        for batch in labelled_batches(3):
            first, _ = one.step(first, batch)
            second, _ = other.step(second, batch)
        assert_equal(first, trained(Noisy(), labelled_batches(3), optimizer=optimizer("first")))
        assert_equal(second, ff.fold(other.step, begun, labelled_batches(3)))
        assert ("body.0.weight" in second.params) is (frozen_by != "second")

    def test_what_the_user_froze_after_one_program_is_frozen_in_the_next(self):
        module = classifier()
        program(module).init(0)
        module[0].requires_grad_(False)
        assert sorted(program(module).init(0).frozen) == ["0.bias", "0.weight"]

    def test_a_second_init_leaves_the_first_state_alone(self):
        for changes in ({}, {"init": "by_name"}):
            module = Noisy()
            module.body[3].bias.requires_grad_(False)
            made = program(module, **changes)
            first = made.init(0)
            with unchanged(first):
                second = made.init(1)
                made.step(second, labelled(6))
            made.step(first, labelled(6))

    def test_init_by_name_is_a_function_of_its_seed(self):
        made = program(normalised(), init="by_name")
        first = made.init(3)
        kept = first.copy()
        made.step(first, labelled(6))
        assert made.init(4).params["0.weight"].ne(kept.params["0.weight"]).any()
        assert_equal(made.init(3), kept)

    def test_a_factory_is_a_function_of_the_seed(self):
        made = program(normalised)
        first = made.init(3)
        kept = first.copy()
        made.step(first, labelled(6))
        assert made.init(4).params["0.weight"].ne(kept.params["0.weight"]).any()
        assert_equal(made.init(3), kept)

    @pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
    def test_what_is_not_used_any_more_is_freed(self, viewed_elements):
        optimizer = ff.from_torch(lambda rows: torch.optim.RMSprop(rows))
        module = Noisy()
        made = program(module, optimizer=optimizer, average=ff.ema(0.9), viewed_elements=viewed_elements)
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        kept = state.copy()
        held = [weakref.ref(kept.params.buffers[0]), weakref.ref(kept.ema.buffers[0])]
        made.step(kept, labelled(6))
        made.step(state, labelled(6))
        del kept
        gc.collect()
        assert [reference() for reference in held] == [None, None]
        held = [weakref.ref(module), weakref.ref(state)]
        del made, module, state, optimizer
        gc.collect()
        assert [reference() for reference in held] == [None, None]


class TestChangesFromOutside:
    @pytest.mark.parametrize(
        "move",
        [
            lambda module: module.double().float(),
            lambda module: module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True),
            lambda module: setattr(module.body[0], "weight", nn.Parameter(module.body[0].weight.detach().clone())),
        ],
        ids=["double_float", "assign", "replaced"],
    )
    @pytest.mark.parametrize("viewed_elements", [VIEWED, 0])
    def test_moves_that_keep_the_values_are_undone_with_a_notice(self, viewed_elements, move):
        module = Noisy()
        made = program(module, viewed_elements=viewed_elements)
        state, _ = made.step(made.init(0), labelled(6))
        move(module)
        with pytest.warns(UserWarning, match="bound to the state again"):
            state, _ = made.step(state, labelled(6, seed=1))
        state, _ = made.step(state, labelled(6, seed=2))
        assert_equal(state, trained(Noisy(), labelled_batches(3), viewed_elements=viewed_elements))

    def test_a_move_of_the_buffers_alone_is_undone_too(self, bound):
        made, module, state = bound
        module.seen = module.seen.clone()
        module.body[1].running_mean = module.body[1].running_mean.clone()
        state, _ = made.step(state, labelled(6, seed=2))
        assert_equal(state, trained(Noisy(), labelled_batches(3)))

    @pytest.mark.parametrize(
        "change",
        [
            lambda module: module.load_state_dict(
                {name: tensor + 1 for name, tensor in module.state_dict().items()}, assign=True
            ),
            lambda module: module.bfloat16(),
            lambda module: setattr(module.body[0], "weight", nn.Parameter(torch.zeros(16, 6))),
            lambda module: module.body[0].register_parameter("weight", None),
        ],
        ids=["assign", "dtype", "shape", "gone"],
    )
    def test_changes_that_would_be_lost_are_refused_by_name(self, bound, change):
        made, module, state = bound
        change(module)
        with unchanged(state), pytest.raises(ValueError, match=r"body\.0\.weight of the bound module was replaced"):
            made.step(state, labelled(6))

    def test_after_a_refusal_a_new_program_takes_the_values_of_the_module(self, bound):
        _, module, _ = bound
        fresh = Noisy()
        fresh.load_state_dict(module.state_dict())
        with torch.no_grad():
            fresh.body[0].weight += 1
        module.load_state_dict(fresh.state_dict(), assign=True)
        assert_same_tensors(program(module).init(0), fresh)

    def test_a_gradient_that_is_not_asked_for_any_more_leaves_the_parameter_as_it_is(self, bound):
        made, module, state = bound
        before = state.params["body.3.weight"].clone()
        module.body[3].weight.requires_grad_(False)
        state, _ = made.step(state, labelled(6))
        assert torch.equal(state.params["body.3.weight"], before)

    def test_whether_a_parameter_is_trained_does_not_depend_on_which_states_were_stepped(self, bound):
        made, module, state = bound
        other, before = state.copy(), state.params["body.3.weight"].clone()
        module.body[3].weight.requires_grad_(False)
        moved = []
        for each in (state, other):
            try:
                after, _ = made.step(each, labelled(6))
            except ValueError as error:
                assert "body.3.weight" in str(error)  # noqa: PT017
            else:
                moved.append(not torch.equal(after.params["body.3.weight"], before))
        assert len(set(moved)) <= 1

    @pytest.mark.parametrize("viewed_elements", [VIEWED, 0])
    @pytest.mark.parametrize("clear", [True, False])
    def test_gradients_that_are_left_on_the_module_are_not_taken_into_a_step(self, viewed_elements, clear):
        module = classifier()
        made = program(module, viewed_elements=viewed_elements)
        state, _ = made.step(made.init(0), labelled(6))
        if clear:
            module.zero_grad(set_to_none=True)
        module(labelled(6)[0]).sum().backward()
        state, _ = made.step(state, labelled(6, seed=1))
        assert_equal(state, trained(classifier(), labelled_batches(2), viewed_elements=viewed_elements))

    def test_no_notice_is_given_in_ordinary_use(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = program(Noisy(), average=ff.ema(0.9))
            state, _ = made.step(made.init(0), labelled(6))
            kept = state.copy()
            made.evaluate(state, [labelled(6)], params="ema")
            made.step(kept, labelled(6))
            made.export(state)
            made.step(state, labelled(6))


class TestStateDict:
    def test_it_has_the_size_of_the_model(self, bound):
        _, module, _ = bound
        stream, plain = io.BytesIO(), io.BytesIO()
        torch.save(module.state_dict(), stream)
        torch.save(Noisy().state_dict(), plain)
        assert len(stream.getvalue()) == pytest.approx(len(plain.getvalue()), abs=200)

    @pytest.mark.parametrize("part", ["", "body", "body.1"])
    def test_a_part_can_be_saved_by_itself(self, bound, part, tmp_path):
        _, module, _ = bound
        child = module.get_submodule(part)
        saved = child.state_dict()
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in saved.values())
        safetensors.torch.save_file(saved, tmp_path / "part.safetensors")
        assert saved.keys() == Noisy().get_submodule(part).state_dict().keys()

    def test_a_prefix_and_a_destination_are_honoured(self, bound):
        _, module, _ = bound
        for destination in ({}, {"mine": torch.zeros(3)[:1]}):
            given = module.state_dict(destination=destination, prefix="model.")
            assert given is destination
            assert {"model.seen", "model.body.0.weight"} <= set(destination)
            assert destination["model.seen"].untyped_storage().nbytes() == 4

    def test_variables_are_the_parameters_themselves_when_asked_for(self, bound):
        _, module, _ = bound
        assert module.state_dict(keep_vars=True)["body.0.weight"] is module.body[0].weight

    @pytest.mark.parametrize("bind", [True, False])
    def test_tied_weights_stay_tied(self, bind):
        module = Tied()
        if bind:
            made = program(module)
            made.step(made.init(0), labelled(6))
        saved = module.state_dict()
        assert saved["encode.weight"].data_ptr() == saved["again.weight"].data_ptr() == saved["copy.weight"].data_ptr()
        assert saved["encode.weight"].data_ptr() != saved["encode.bias"].data_ptr()

    def test_it_loads_into_a_fresh_model(self, bound):
        _, module, state = bound
        fresh = Noisy()
        fresh.load_state_dict(module.state_dict())
        assert_same_tensors(state, fresh)

    def test_two_state_dicts_share_no_memory(self, bound):
        _, module, _ = bound
        one, other = module.state_dict(), module.state_dict()
        one["body.0.weight"].zero_()
        assert other["body.0.weight"].any()
        assert module.body[0].weight.any()


class TestCopiesOfTheModule:
    def test_a_deep_copy_is_unbound(self, bound):
        made, module, state = bound
        twin = copy.deepcopy(module)
        with unchanged(state), torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.add_(1)
        stream = io.BytesIO()
        torch.save(twin.state_dict(), stream)
        assert len(stream.getvalue()) < 6000
        made.step(state, labelled(6))

    def test_a_deep_copy_can_be_trained_by_itself(self, bound):
        made, module, state = bound
        twin, plain = copy.deepcopy(module), Noisy()
        plain.load_state_dict(module.state_dict())
        by_hand(twin, labelled_batches(2), fused_adamw(twin))
        by_hand(plain, labelled_batches(2), fused_adamw(plain))
        for one, other in zip(twin.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
        assert state.step == 2
        made.step(state, labelled(6))

    def test_a_deep_copy_can_be_given_to_another_program(self, bound):
        made, module, state = bound
        twin = program(copy.deepcopy(module))
        other = twin.init(0)
        with unchanged(state):
            twin.step(other, labelled(6))
        made.step(state, labelled(6))


class TestExport:
    def test_an_exported_model_is_not_changed_by_other_states(self, bound):
        made, module, state = bound
        exported = made.export(state)
        assert exported is not module
        kept = state.copy()
        made.step(state, labelled(6))
        assert_same_tensors(kept, exported)

    def test_frozen_parameters_are_of_its_own_too_and_ask_for_gradients_as_before(self):
        module = classifier()
        module[0].bias.requires_grad_(False)
        made = program(module, optimizer=ff.adamw(groups=[ff.group("2.*", frozen=True)]))
        state = made.init(0)
        exported = made.export(state)
        assert [p.requires_grad for p in exported.parameters()] == [True, False, True, True]
        with unchanged(state), torch.no_grad():
            for parameter in exported.parameters():
                parameter.zero_()
        state, _ = made.step(state, labelled(6))
        assert sorted(state.frozen) == ["0.bias", "2.bias", "2.weight"]

    def test_tied_weights_stay_tied(self):
        made = program(Tied())
        exported = made.export(made.init(0))
        assert exported.encode.weight is exported.again.weight
        assert exported.encode.weight.data_ptr() == exported.copy.weight.data_ptr()

    def test_an_average_that_is_not_kept_cannot_be_exported(self, bound):
        made, _, state = bound
        with pytest.raises(ValueError, match="keeps no average"):
            made.export(state, params="ema")

    def test_it_can_be_read_without_this_library(self, bound):
        made, _, state = bound
        stream = io.BytesIO()
        torch.save(made.export(state), stream)
        assert b"forgather" not in stream.getvalue()
        # And training goes on, with a state_dict that is safe to save.
        made.step(state, labelled(6))
        saved = made.plan.model.state_dict()
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in saved.values())

    def test_it_can_be_trained_by_hand(self, bound):
        made, _, state = bound
        exported, plain = made.export(state), Noisy()
        plain.load_state_dict(exported.state_dict())
        by_hand(exported, labelled_batches(2), fused_adamw(exported))
        by_hand(plain, labelled_batches(2), fused_adamw(plain))
        for one, other in zip(exported.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


class Histories(nn.Module):
    """Every kind of buffer at once: batch statistics, one that grows, one that comes and one that goes, and a tie."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.drop = nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.tied, self.frozen = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)
        self.tied.weight = nn.Parameter(self.body.weight.detach())
        self.register_buffer("history", torch.zeros(0))
        self.register_buffer("latest", None)
        self.register_buffer("first", torch.ones(3))

    def forward(self, features):
        self.history = torch.cat([self.history, features.detach().sum()[None]])
        self.latest = features.detach()[0, :3]
        outputs = self.drop(self.norm(self.body(features))) + self.tied(features) + self.frozen(features)
        if self.first is not None:
            outputs = outputs * self.first
            self.first = None
        return outputs + self.history.sum()


def made_from(viewed_elements):
    changes = {"average": ff.ema(0.9), "transforms": [ff.clipped(0.5)], "microbatches": 2}
    return program(Histories(), viewed_elements=viewed_elements, **changes)


OPERATIONS = {
    "evaluate": lambda made, state: made.evaluate(state, [labelled(5)]),
    "average": lambda made, state: made.evaluate(state, [labelled(5)], params="ema"),
    "apply": lambda made, state: made.apply(state, labelled(5)[0]),
    "gradients": lambda made, state: made.gradients(state, labelled(6)),
    "export": lambda made, state: made.export(state),
    "export_average": lambda made, state: made.export(state, params="ema"),
    "fail": lambda made, state: failing(made, state),
    "move": lambda made, state: made.plan.model.double().float(),
    "copy": lambda made, state: copy.deepcopy(made.plan.model),
    "save": lambda made, state: made.plan.model.state_dict(),
    "clear": lambda made, state: made.plan.model.zero_grad(set_to_none=True),
}


def failing(made, state):
    features, labels = labelled(6)
    with pytest.raises(ff.NonFiniteError):
        made.step(state, (features * float("nan"), labels))


operations = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 5)),
    st.tuples(st.just("update"), st.integers(0, 5)),
    st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.just(0)),
)


@pytest.mark.filterwarnings("ignore:the bound module's parameters were moved:UserWarning")
@pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), operations), min_size=3, max_size=12))
def test_whatever_is_done_in_whatever_order_states_are_those_of_runs_of_their_own(viewed_elements, tape):
    made = made_from(viewed_elements)
    begun = made.init(0)
    states, histories = [begun, begun.copy()], [[], []]
    for which, (name, seed) in tape:
        state, batch = states[which], labelled(6, seed=seed)
        if name == "step":
            states[which], _ = made.step(state, batch)
            histories[which].append(seed)
        elif name == "update":
            gradients, buffers, _ = made.gradients(state, batch)
            states[which], _ = made.update(state, gradients, buffers)
            histories[which].append(seed)
        elif name == "fork":
            states[1 - which], histories[1 - which] = state.copy(), list(histories[which])
        else:
            OPERATIONS[name](made, state)
    for state, history in zip(states, histories, strict=True):
        alone = made_from(viewed_elements)
        assert_equal(state, ff.fold(alone.step, alone.init(0), [labelled(6, seed=seed) for seed in history]))

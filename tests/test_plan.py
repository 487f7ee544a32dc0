import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff
from tests.toys import classifier, labelled, labelled_batches, program, trained, unchanged


def plan(**changes):
    plain = {"model": classifier(), "loss": ff.losses.cross_entropy, "optimizer": ff.adamw(), "schedule": 1e-3}
    return ff.Plan(**(plain | changes))


class TestChecks:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"microbatches": 0}, "Plan: microbatches must be an integer of at least 1, got 0"),
            ({"microbatches": True}, "microbatches must be an integer of at least 1, got True"),
            ({"microbatches": 1.5}, "microbatches must be an integer of at least 1, got 1.5"),
            (
                {"precision": "half"},
                "precision='half' is not one of 'as_built', 'float32', 'float64', 'bfloat16', 'float16'",
            ),
            ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is not one of 'raise', 'skip'"),
            ({"init": "zeros"}, "init='zeros' is not one of 'as_built', 'by_name'"),
            ({"average": 0.9}, r"average.*0\.9"),
            ({"optimizer": torch.optim.AdamW}, r"optimizer=torch\.optim\.adamw\.AdamW is not one.*from_torch"),
            ({"loss": nn.CrossEntropyLoss()}, r"loss=CrossEntropyLoss\(\) is not a function of \(outputs, batch\)"),
            ({"loss": nn.functional.cross_entropy}, r"loss=torch\.nn\.functional\.cross_entropy is not a function"),
            ({"transforms": [1.0]}, r"transforms takes Transforms such as ff\.clipped\(1\.0\), got 1\.0"),
            ({"transforms": ff.clipped(1.0)}, r"transforms takes a sequence of them"),
            ({"donate": "no"}, "donate must be True or False, got 'no'"),
            ({"donate": 0}, "donate must be True or False, got 0"),
            ({"unroll": "no"}, "unroll must be True or False, got 'no'"),
            ({"viewed_elements": "many"}, "viewed_elements must be an integer of at least 0, got 'many'"),
            ({"viewed_elements": -1.5}, "viewed_elements must be an integer of at least 0, got -1.5"),
            ({"viewed_elements": True}, "viewed_elements must be an integer of at least 0, got True"),
            ({"viewed_elements": -1}, "viewed_elements must be an integer of at least 0, got -1"),
            ({"backend": 3}, "backend takes the name of a compiler, such as 'inductor', or a function; got 3"),
            ({"device": "quantum"}, "device 'quantum' cannot be used here"),
            ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ],
    )
    def test_a_setting_that_is_not_known_is_refused_with_the_choices(self, changes, message):
        with pytest.raises(ValueError, match=message):
            plan(**changes)

    @pytest.mark.parametrize("name", ["model", "loss", "optimizer", "schedule"])
    def test_four_parts_are_needed(self, name):
        given = {"model": classifier(), "loss": ff.losses.mse, "optimizer": ff.adamw(), "schedule": 1e-3}
        del given[name]
        with pytest.raises(TypeError, match=name):
            ff.Plan(**given)

    def test_it_is_frozen_and_given_by_name(self):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            plan().microbatches = 2
        with pytest.raises(TypeError):
            ff.Plan(classifier(), ff.losses.mse, ff.adamw(), 1e-3)

    def test_transforms_may_be_any_sequence(self):
        assert isinstance(plan(transforms=[ff.clipped(1.0)]).transforms, tuple)

    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            (lambda step: float("nan") if step == 2 else 1e-3, r"nan.*step 2|step 2.*nan"),
            (lambda step: float("inf"), r"inf.*step 0|step 0.*inf"),
            (lambda step: -1e-3, r"-0\.001.*step 0|step 0.*-0\.001"),
            (lambda step: None, r"None.*step 0|step 0.*None"),
        ],
        ids=["nan", "inf", "negative", "none"],
    )
    def test_a_schedule_that_gives_no_rate_is_refused_with_the_step_and_consumes_nothing(self, schedule, message):
        made, seen = program(classifier(), schedule=schedule), []
        steps = made.steps(made.init(0), labelled_batches(3))
        seen.append(steps.state)
        with pytest.raises(ValueError, match=message):
            seen.extend(tick.state for tick in steps)
        assert not seen[-1].consumed

    @pytest.mark.parametrize("schedule", [float("nan"), -1.0, float("inf"), "1e-3", None])
    def test_a_constant_that_is_no_rate_is_refused_when_the_plan_is_made(self, schedule):
        with pytest.raises(ValueError, match=f"{schedule}.*step 0"):
            plan(schedule=schedule)

    @pytest.mark.parametrize("instance", [False, True])
    def test_a_scheduler_of_torch_is_refused_when_the_plan_is_made(self, instance):
        optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10) if instance else torch.optim.lr_scheduler.StepLR
        with pytest.raises(ValueError, match=r"StepLR.* is not a function of the step.*ff.schedules.cosine"):
            plan(schedule=schedule)


class TestProgram:
    def test_it_prints_its_parts_a_line_each(self):
        text = repr(program(classifier(), transforms=[ff.clipped(1.0)], average=ff.ema(0.9)))
        assert text.startswith("Program(\n  model=torch.nn.modules.container.Sequential\n  loss=cross_entropy\n")
        assert "\n  transforms=(clipped(max_norm=1.0),)\n" in text
        assert "\n  average=ema(decay=0.9)\n" in text
        assert "object at 0x" not in text
        assert "tensor(" not in text

    def test_nothing_of_the_model_is_touched_before_init(self):
        model = classifier().eval()
        before = [parameter.data_ptr() for parameter in model.parameters()]
        program(model, precision="float64")
        assert [parameter.data_ptr() for parameter in model.parameters()] == before
        assert not model.training
        assert model[0].weight.dtype == torch.float32

    def test_a_factory_is_not_called_before_init(self):
        calls = []

        def factory():
            calls.append(1)
            return classifier()

        made = program(factory)
        assert not calls
        made.init(0)
        assert calls == [1]

    @pytest.mark.parametrize(
        "other",
        [
            lambda: program(nn.Linear(5, 3)),
            lambda: program(classifier(hidden=8)),
            lambda: program(classifier(), optimizer=ff.sgd(momentum=0.9)),
            lambda: program(classifier(), average=ff.ema(0.9)),
            lambda: program(classifier(), transforms=[ff.clipped(1.0)]),
        ],
        ids=["model", "shapes", "optimizer", "average", "transforms"],
    )
    def test_a_state_of_another_program_is_refused_and_not_consumed(self, other):
        mine, theirs = program(classifier()), other()
        mine.init(0)
        state = theirs.init(0)
        with pytest.raises(ValueError, match=r"\w"):
            mine.step(state, labelled(6))
        assert not state.consumed
        theirs.step(state, labelled(6))

    def test_a_state_of_an_equal_program_is_taken(self):
        mine, theirs = program(classifier()), program(classifier())
        mine.init(0)
        state = ff.fold(theirs.step, theirs.init(0), labelled_batches(2))
        expected = trained(classifier(), labelled_batches(3))
        assert ff.difference(mine.step(state, labelled(6, seed=2))[0], expected) is None

    @pytest.mark.parametrize("viewed_elements", [0, 10**9])
    @pytest.mark.parametrize("model", [lambda: nn.Linear(5, 3), lambda: classifier(hidden=8)], ids=["names", "shapes"])
    def test_gradients_of_another_model_are_refused(self, model, viewed_elements):
        mine, theirs = program(classifier(), viewed_elements=viewed_elements), program(model())
        state = mine.init(0)
        gradients, _, _ = theirs.gradients(theirs.init(0), labelled(6))
        with unchanged(state), pytest.raises(ValueError, match=r"gradient"):
            mine.update(state, gradients)

    def test_a_schedule_may_be_a_number(self):
        ours = trained(classifier(), labelled_batches(3), schedule=2e-3)
        assert ff.difference(ours, trained(classifier(), labelled_batches(3), schedule=lambda step: 2e-3)) is None

    def test_the_number_of_samples_may_be_given(self):
        made = program(nn.Linear(5, 3))
        state, _ = made.step(made.init(0), ff.Batch(labelled(6), 10, None))
        assert state.samples == 10

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.losses import Objective
from forgather_fn.model import (
    build,
    call_arguments,
    enter_training,
    evaluation_mode,
    initialise_by_name,
    parameter_anatomy,
)
from tests.named import named
from tests.toys import classifier, labelled, program


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.third = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
        self.other.weight = self.one.weight
        self.third.bias = nn.Parameter(self.third.bias.detach())


class TestAnatomy:
    def test_a_tied_parameter_has_one_name_and_several_sites(self):
        anatomy = parameter_anatomy(Shared())
        assert list(anatomy.params) == ["one.weight", "one.bias", "other.bias", "third.weight", "third.bias"]
        assert [(site.name, name) for site, name in anatomy.sites if "weight" in site.name] == [
            ("one.weight", "one.weight"),
            ("other.weight", "one.weight"),
            ("third.weight", "third.weight"),
        ]

    def test_parameters_that_share_a_part_of_their_memory_are_refused(self):
        module, storage = nn.Module(), torch.zeros(10)
        module.left, module.right = nn.Parameter(storage[:6]), nn.Parameter(storage[5:])
        with pytest.raises(ValueError, match=r"left and right share a part of their memory.*clone"):
            parameter_anatomy(module)

    def test_a_parameter_over_the_transpose_of_another_is_refused(self):
        module = nn.Linear(3, 3)
        module.turned = nn.Parameter(module.weight.detach().t())
        with pytest.raises(ValueError, match=r"weight and turned share|turned and weight share"):
            parameter_anatomy(module)

    def test_a_parameter_inside_a_longer_one_is_refused_though_another_lies_between(self):
        module, storage = nn.Module(), torch.zeros(10)
        module.whole, module.first = nn.Parameter(storage), nn.Parameter(storage[1:2])
        module.second = nn.Parameter(storage[5:6])
        with pytest.raises(ValueError, match="share a part"):
            parameter_anatomy(module)

    def test_interleaved_parameters_without_a_common_element_are_not_silently_joined(self):
        module, storage = nn.Module(), torch.arange(10.0)
        module.even, module.odd = nn.Parameter(storage[::2]), nn.Parameter(storage[1::2])
        try:
            params = parameter_anatomy(module).params
        except ValueError as error:
            assert "even and odd" in str(error)  # noqa: PT017
        else:
            assert list(params) == ["even", "odd"]

    def test_empty_parameters_are_not_tied(self):
        module = nn.Module()
        module.one, module.other = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        assert list(parameter_anatomy(module).params) == ["one", "other"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Sequential(nn.LazyLinear(3)), r"0\.weight is .*lazy.*run the model once"),
            (
                nn.Sequential(nn.Linear(5, 3), nn.LazyBatchNorm1d(affine=False)),
                r"1\.running_mean.*lazy|lazy.*1\.running_mean",
            ),
            (nn.Sequential(nn.Linear(5, 3, device="meta")), r"0\.weight is on the meta device"),
            (nn.Sequential(nn.Embedding(5, 3, sparse=True)), r"0\.weight asks for sparse gradients.*sparse=False"),
            (nn.Sequential(nn.EmbeddingBag(5, 3, sparse=True)), r"0\.weight asks for sparse gradients.*sparse=False"),
            (nn.Sequential(nn.ReLU()), "Sequential has no parameter that asks for a gradient"),
            (nn.Linear(5, 3).requires_grad_(False), "Linear has no parameter that asks for a gradient"),
            (lambda: torch.zeros(3), "the model factory returned Tensor; expected a torch.nn.Module"),
            ("model", "model must be a torch.nn.Module or a function that builds one, got str"),
        ],
        ids=named,
    )
    def test_what_cannot_be_trained_is_refused_by_name(self, module, message):
        with pytest.raises(ValueError, match=message):
            program(module).init(0)

    def test_a_program_without_a_model_says_what_to_call(self):
        made = program(classifier())
        state = program(classifier()).init(0)
        with pytest.raises(ValueError, match=r"call program\.init\(seed\)"):
            made.step(state, labelled(6))


class TestBuild:
    def test_a_factory_is_called_under_a_key_of_the_seed(self):
        def factory():
            return nn.Linear(5, 3)

        before = torch.get_rng_state()
        one, again, other = build(factory, 0), build(factory, 0), build(factory, 1)
        assert torch.equal(one.weight, again.weight)
        assert not torch.equal(one.weight, other.weight)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_class_is_a_factory(self):
        class Model(nn.Linear):
            def __init__(self):
                super().__init__(5, 3)

        assert isinstance(build(Model, 0), Model)

    def test_a_factorys_model_stays_as_it_was_built(self):
        def factory():
            model = nn.Linear(5, 3)
            nn.init.constant_(model.weight, 0.5)
            return model

        assert program(factory).init(0).params["weight"].eq(0.5).all()


class Named(nn.Module):
    def __init__(self, *, turned):
        super().__init__()
        parts = {
            "embed": lambda: nn.Embedding(5, 4),
            "attention": lambda: nn.MultiheadAttention(4, 2),
            "norm": lambda: nn.LayerNorm(4),
            "head": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        }
        for name in sorted(parts, reverse=turned):
            self.add_module(name, parts[name]())


class TestInitialisationByName:
    def test_values_do_not_depend_on_the_order_of_construction(self):
        one, other = Named(turned=False), Named(turned=True)
        torch.manual_seed(1)
        initialise_by_name(one, 5)
        torch.manual_seed(2)
        initialise_by_name(other, 5)
        held = dict(other.named_parameters())
        assert all(torch.equal(tensor, held[name]) for name, tensor in one.named_parameters())

    def test_equal_modules_of_other_names_get_other_values(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        initialise_by_name(module, 0)
        assert not torch.equal(module[0].weight, module[1].weight)

    def test_a_part_that_is_built_alone_starts_as_in_the_whole(self):
        whole, part = Named(turned=False), nn.Module()
        part.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        initialise_by_name(whole, 5)
        initialise_by_name(part, 5)
        assert torch.equal(whole.head[1].weight, part.head[1].weight)

    def test_the_seed_matters_and_the_global_generator_does_not(self):
        weights = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            module = nn.Linear(4, 4)
            torch.manual_seed(noise)
            before = torch.get_rng_state()
            initialise_by_name(module, seed)
            assert torch.equal(torch.get_rng_state(), before)
            weights.append(module.weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_values_have_the_distribution_of_the_modules_own_initialisation(self):
        module = nn.Linear(100, 200)
        nn.init.zeros_(module.weight)
        initialise_by_name(module, 0)
        assert module.weight.abs().max() <= 0.1
        assert module.weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)

    def test_tied_weights_stay_tied(self):
        module = Shared()
        initialise_by_name(module, 0)
        assert module.one.weight is module.other.weight

    def test_a_module_that_cannot_draw_its_own_values_is_refused(self):
        class Bare(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))

        module = nn.Sequential(nn.Linear(5, 3), Bare())
        with pytest.raises(ValueError, match=r'init="by_name": 1 \(Bare\) has parameters of its own.*reset_parameters'):
            program(module, init="by_name").init(0)
        with pytest.raises(ValueError, match=r"the model \(Bare\)"):
            program(Bare(), init="by_name").init(0)

    def test_a_module_without_parameters_of_its_own_needs_nothing(self):
        initialise_by_name(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Identity()), 0)

    def test_an_instance_and_a_factory_start_alike(self):
        def factory():
            return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

        instance = program(factory(), init="by_name").init(3)
        assert ff.difference(instance, program(factory, init="by_name").init(3)) is None


class TestModes:
    def test_modes_are_put_back_as_they_were_part_by_part(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
        module[1][0].eval()
        before = [child.training for child in module.modules()]
        modes = evaluation_mode(module)
        assert not any(child.training for child in module.modules())
        modes.restore()
        assert [child.training for child in module.modules()] == before

    def test_a_module_in_training_mode_keeps_the_modes_of_its_parts(self):
        module = nn.Sequential(nn.Dropout(), nn.ReLU())
        module[0].eval()
        enter_training(module)
        assert [module.training, module[0].training, module[1].training] == [True, False, True]
        module.eval()
        enter_training(module)
        assert [module.training, module[0].training, module[1].training] == [True, True, True]


class Calls(nn.Module):
    def forward(self, features, mask=None):
        return features


class CallsAny(nn.Module):
    def forward(self, features, **rest):
        return features


def plain(outputs, batch):
    return ff.Mean(outputs.sum(), 1)


class TestCalls:
    @pytest.mark.parametrize(
        ("module", "loss", "batch", "args", "kwargs"),
        [
            (Calls(), plain, 5, (5,), {}),
            (Calls(), plain, (5, 6), (5,), {}),
            (Calls(), plain, (5, 6, 7), (5, 6), {}),
            (Calls(), plain, (5,), (5,), {}),
            (Calls(), plain, {"features": 5, "mask": 6, "index": 7}, (), {"features": 5, "mask": 6}),
            (CallsAny(), plain, {"features": 5, "labels": 6}, (), {"features": 5, "labels": 6}),
            (CallsAny(), ff.losses.cross_entropy, {"features": 5, "labels": 6, "y": 7}, (), {"features": 5}),
            (
                CallsAny(),
                ff.losses.from_output(weight="samples"),
                {"features": 5, "labels": 6},
                (),
                {"features": 5, "labels": 6},
            ),
        ],
    )
    def test_a_batch_becomes_arguments(self, module, loss, batch, args, kwargs):
        given, named = call_arguments(module, loss)(batch)
        assert (tuple(given), named) == (args, kwargs)

    def test_a_dict_without_any_argument_is_refused_with_both_sides(self):
        with pytest.raises(
            ValueError, match=r"no key of the batch.*Calls\.forward.*'inputs', 'labels'.*'features', 'mask'"
        ):
            call_arguments(Calls(), plain)({"inputs": 1, "labels": 2})


def test_an_objective_may_say_how_the_model_is_called():
    objective = Objective(
        total=lambda outputs, batch: outputs.sum(),
        weight=lambda batch: 1.0,
        arguments=lambda batch: ((batch["a"],), {}),
    )
    assert call_arguments(nn.Linear(2, 1), objective)({"a": 1, "b": 2}) == ((1,), {})

import math

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forgather_fn as ff
from tests.toys import Noisy, assert_equal, classifier, labelled, program, unchanged


def ragged(count=23):
    features, labels = labelled(count, dtype=torch.float64)
    labels[::4] = -100
    return features, labels


def cut(rows, size):
    return [tuple(column[i : i + size] for column in rows) for i in range(0, len(rows[0]), size)]


@pytest.fixture
def made():
    return program(classifier(torch.float64))


class TestEvaluate:
    @pytest.mark.parametrize("size", [1, 2, 5, 22, 23, 100])
    @pytest.mark.parametrize("form", ["stream", "list", "loader"])
    def test_it_is_the_exact_mean_whatever_the_batch_size(self, made, size, form):
        rows = ragged()
        data = {
            "stream": ff.batches(rows, batch_size=size),
            "list": cut(rows, size),
            "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=size),
        }[form]
        model = classifier(torch.float64)
        expected = F.cross_entropy(model(rows[0]), rows[1]).item()
        assert made.evaluate(made.init(0), data) == {"loss": pytest.approx(expected, rel=1e-13)}

    def test_float32_sums_are_kept_in_float64(self):
        # Ten thousand equal terms, whose float32 sum is off by 1e-4 and more.
        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.value = nn.Parameter(torch.tensor(0.1))

            def forward(self, features):
                return self.value.expand(len(features))

        made = program(Constant(), loss=lambda outputs, batch: ff.Mean(outputs.sum(), len(outputs)))
        found = made.evaluate(made.init(0), [torch.zeros(1, 1)] * 3000)["loss"]
        assert found == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)

    def test_every_named_mean_is_given(self):
        def loss(outputs, batch):
            right = (outputs.argmax(-1) == batch[1]).sum()
            total = F.cross_entropy(outputs, batch[1], reduction="sum")
            return {"loss": ff.Mean(total, len(batch[1])), "accuracy": ff.Mean(right, len(batch[1]))}

        features, labels = labelled(23)
        made = program(classifier(), loss=loss)
        found = made.evaluate(made.init(0), cut((features, labels), 6))
        assert set(found) == {"loss", "accuracy"}
        assert found["accuracy"] == pytest.approx((classifier()(features).argmax(-1) == labels).double().mean().item())
        assert all(type(value) is float for value in found.values())

    def test_a_metric_that_only_some_batches_have(self):
        def loss(outputs, batch):
            total = ff.Mean(F.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1]))
            return {"loss": total} | ({"rare": ff.Mean(outputs.sum(), 1)} if len(batch[1]) == 6 else {})

        made = program(classifier(), loss=loss)
        assert set(made.evaluate(made.init(0), cut(labelled(8), 6))) == {"loss", "rare"}

    def test_dropout_is_off_and_batch_norm_uses_what_it_has_learned(self):
        model = Noisy()
        made = program(model)
        state, _ = made.step(made.init(0), labelled(6))
        features, labels = labelled(9, seed=1)
        reference = Noisy().eval()
        reference.load_state_dict(model.state_dict())
        expected = F.cross_entropy(reference(features), labels).item()
        assert made.evaluate(state, [(features, labels)])["loss"] == pytest.approx(expected, rel=1e-6)

    def test_it_leaves_no_trace(self):
        model = Noisy()
        model.body[2].eval()
        made = program(model, average=ff.ema(0.9))
        state, _ = made.step(made.init(0), labelled(6))
        modes = [child.training for child in model.modules()]
        generator = torch.get_rng_state()
        with unchanged(state):
            for params in ("params", "ema"):
                made.evaluate(state, cut(labelled(9), 4), params=params)
        assert [child.training for child in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), generator)
        for name, buffer in model.named_buffers():
            assert buffer.data_ptr() == state.buffers[name].data_ptr(), name
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == state.params[name].data_ptr(), name

    def test_a_batch_that_fails_leaves_no_trace_either(self):
        model = Noisy()
        made = program(model)
        state, _ = made.step(made.init(0), labelled(6))
        with unchanged(state), pytest.raises(RuntimeError, match="shape"):
            made.evaluate(state, [labelled(6), (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))])
        assert model.training
        with unchanged(state), pytest.raises(KeyboardInterrupt):
            made.evaluate(state, broken())
        assert model.training
        assert torch.is_grad_enabled()

    def test_no_gradient_is_taken(self):
        graphs = []

        def loss(outputs, batch):
            graphs.append(outputs.requires_grad)
            return ff.losses.cross_entropy(outputs, batch)

        made = program(classifier(), loss=loss)
        made.evaluate(made.init(0), [labelled(6)])
        assert graphs == [False]

    def test_random_losses_are_repeatable_and_leave_the_training_alone(self):
        def loss(outputs, batch):
            keep = torch.rand(len(outputs)) < 0.5
            return ff.Mean(F.cross_entropy(outputs, batch[1], reduction="none")[keep].sum(), int(keep.sum()))

        made = program(classifier(), loss=loss)
        state = made.init(0)
        data = cut(labelled(40), 10)
        one = made.evaluate(state, data)
        torch.manual_seed(99)
        assert made.evaluate(state, data) == one

    def test_two_evaluations_of_a_stream_are_the_same(self, made):
        state = made.init(0)
        stream = ff.batches(ragged(), batch_size=5)
        assert made.evaluate(state, stream) == made.evaluate(state, stream)

    def test_no_batch_is_an_error(self, made):
        state = made.init(0)
        with pytest.raises(ValueError, match="the evaluation data gave no batch; an iterator can be used once only"):
            made.evaluate(state, [])
        data = iter(cut(ragged(), 5))
        made.evaluate(state, data)
        with pytest.raises(ValueError, match="pass a stream or a list"):
            made.evaluate(state, data)

    def test_a_mean_over_nothing_is_nan_and_no_error(self, made):
        features, labels = ragged()
        assert math.isnan(made.evaluate(made.init(0), [(features, labels.fill_(-100))])["loss"])

    def test_no_average_is_an_error_with_the_fix(self, made):
        with pytest.raises(ValueError, match=r"keeps no average; add Plan\(average=ff.ema\(decay\)\)"):
            made.evaluate(made.init(0), [ragged()], params="ema")

    def test_unknown_parameters_are_refused_and_leave_no_trace(self, made):
        state = made.init(0)
        with unchanged(state), pytest.raises(ValueError, match="params='best' is not one of 'params', 'ema'"):
            made.evaluate(state, [ragged()], params="best")
        assert made.plan.model.training


def broken():
    yield labelled(6)
    raise KeyboardInterrupt


class TestApply:
    def test_it_is_the_model_in_evaluation_mode(self):
        model = Noisy()
        made = program(model)
        state, _ = made.step(made.init(0), labelled(6))
        features = labelled(4)[0]
        reference = Noisy().eval()
        reference.load_state_dict(model.state_dict())
        with unchanged(state):
            outputs = made.apply(state, features)
        assert torch.equal(outputs, reference(features))
        assert not outputs.requires_grad
        assert model.training

    def test_inputs_go_by_position_and_by_name(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(5, 3)

            def forward(self, features, scale=1.0, *, shift=0.0):
                return self.body(features) * scale + shift

        made = program(Two())
        state = made.init(0)
        features = labelled(4)[0]
        plain = made.apply(state, features)
        torch.testing.assert_close(made.apply(state, features, 2.0, shift=torch.tensor(1.0)), plain * 2 + 1)
        torch.testing.assert_close(made.apply(state, features=features, scale=3.0), plain * 3)

    def test_any_state_can_be_asked(self):
        made = program(Noisy())
        states = [made.init(0)]
        for seed in range(3):
            states.append(made.step(states[-1].copy(), labelled(6, seed=seed))[0])
        features = labelled(4)[0]
        expected = [made.apply(state, features) for state in states]
        for i in (2, 0, 3, 1):
            assert torch.equal(made.apply(states[i], features), expected[i])
        assert len({outputs.sum().item() for outputs in expected}) == 4

    def test_outputs_stay_as_they_are_when_training_goes_on(self):
        class GivesItsWeight(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(5, 3)
                self.register_buffer("count", torch.zeros(1))

            def forward(self, features):
                self.count += 1
                return {"logits": self.body(features)}

        made = program(GivesItsWeight())
        state = made.init(0)
        outputs = made.apply(state, labelled(4)[0])["logits"]
        kept = outputs.clone()
        made.step(state, labelled(6))
        assert torch.equal(outputs, kept)

    def test_sampling_models_draw_the_same_numbers_each_time(self):
        class Samples(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(5, 3)

            def forward(self, features):
                return torch.multinomial(self.body(features).softmax(-1), 1)

        made = program(Samples())
        state = made.init(0)
        features = labelled(50)[0]
        generator = torch.get_rng_state()
        assert torch.equal(made.apply(state, features), made.apply(state, features))
        assert torch.equal(torch.get_rng_state(), generator)


def test_evaluations_between_steps_do_not_change_the_run():
    made, plain = program(Noisy()), program(Noisy())
    state, expected = made.init(0), plain.init(0)
    for seed in range(4):
        made.evaluate(state, [labelled(7)])
        state, _ = made.step(state, labelled(6, seed=seed))
        made.apply(state, labelled(2)[0])
        expected, _ = plain.step(expected, labelled(6, seed=seed))
    assert_equal(state, expected)


def test_an_optimizer_may_have_other_parameters_evaluated_than_are_trained():
    plain = ff.sgd()
    optimizer = attrs.evolve(plain, evaluated=lambda state, params: params.map(lambda buffer: 2 * buffer))
    made = program(classifier(), optimizer=optimizer)
    state = made.init(0)
    features, labels = labelled(5)
    doubled = {name: 2 * tensor for name, tensor in state.params.items()}
    with unchanged(state):
        outputs = torch.func.functional_call(classifier(), doubled, (features,))
        torch.testing.assert_close(made.apply(state, features), outputs)
        loss = F.cross_entropy(outputs, labels).item()
        assert made.evaluate(state, [(features, labels)]) == {"loss": pytest.approx(loss)}
        for name, parameter in made.export(state).named_parameters():
            assert torch.equal(parameter, doubled[name])
    other = program(classifier(), optimizer=plain)
    assert_equal(made.step(state, labelled(6))[0], other.step(other.init(0), labelled(6))[0])

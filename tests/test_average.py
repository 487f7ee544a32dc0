import pytest
import torch

import forgather_fn as ff
from tests.toys import classifier, labelled, labelled_batches, program


@pytest.mark.parametrize(
    ("dtype", "far"), [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_average_written_by_hand(dtype, far, decay):
    made = program(classifier(dtype), average=ff.ema(decay))
    state = made.init(0)
    expected = {name: tensor.double().clone() for name, tensor in state.params.items()}
    for batch in labelled_batches(5, dtype=dtype):
        state, _ = made.step(state, batch)
        for name, tensor in state.params.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in expected.items():
        assert state.ema[name].dtype == dtype
        torch.testing.assert_close(state.ema[name].double(), tensor, atol=far, rtol=far)


def test_it_starts_as_a_copy_of_the_parameters():
    state = program(classifier(), average=ff.ema(0.9)).init(0)
    for name, tensor in state.params.items():
        assert torch.equal(state.ema[name], tensor)
        assert state.ema[name].data_ptr() != tensor.data_ptr()


def test_without_an_average_none_is_kept():
    assert program(classifier()).init(0).ema is None


def test_evaluation_prediction_and_export_can_take_it():
    made = program(classifier(), average=ff.ema(0.5))
    state = ff.fold(made.step, made.init(0), labelled_batches(3))
    features, labels = labelled(6)
    model = classifier()
    model.load_state_dict(dict(state.ema))
    assert torch.equal(made.apply(state, features, params="ema"), model(features))
    assert not torch.equal(made.apply(state, features), model(features))
    expected = torch.nn.functional.cross_entropy(model(features), labels).item()
    assert made.evaluate(state, [(features, labels)], params="ema")["loss"] == pytest.approx(expected, rel=1e-6)
    exported = made.export(state, params="ema")
    assert all(torch.equal(tensor, state.ema[name]) for name, tensor in exported.named_parameters())


def test_an_average_of_ones_own():
    def latest(average, params, *, good, updates):
        assert float(good) == 1.0
        for mine, current in zip(average.buffers, params.buffers, strict=True):
            mine.copy_(current * updates)
        return average

    from forgather_fn.average import Average

    made = program(classifier(), average=Average(latest))
    state = ff.fold(made.step, made.init(0), labelled_batches(3))
    assert torch.equal(state.ema["0.weight"], state.params["0.weight"] * 3)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), 1.5])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema: decay must be in \[0, 1\), got"):
        ff.ema(decay)

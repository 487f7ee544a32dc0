import math

import pytest
import torch
from torch import nn

import forgather_fn as ff
from tests.toys import Noisy, classifier, labelled, labelled_batches, program


@pytest.mark.parametrize(
    ("dtype", "far"), [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 1e-7)], ids=str
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
        assert state.ema[name].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
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
    def latest(average, params, *, found_inf, updates):
        assert float(found_inf) == 0.0
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


def averages(average, steps=12, **changes):
    """Train, and give the parameters after each update, the average after each, and the last state."""
    made = program(classifier(torch.float64), average=average, **changes)
    state, params, found = made.init(0), [], []
    for batch in labelled_batches(steps, dtype=torch.float64):
        state, _ = made.step(state, batch)
        params.append({name: tensor.clone() for name, tensor in state.params.items()})
        found.append({name: tensor.clone() for name, tensor in state.ema.items()})
    return params, found, made, state


def assert_close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-13, rtol=1e-12)


def test_a_warm_up_begins_with_small_decays():
    params, found, _, _ = averages(ff.ema(0.3, warmup=True))
    expected = {name: tensor.detach().clone() for name, tensor in classifier(torch.float64).named_parameters()}
    for step, (now, average) in enumerate(zip(params, found, strict=True), start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * tensor + (1 - decay) * now[name] for name, tensor in expected.items()}
        assert_close(average, expected)


@pytest.mark.parametrize("gamma", [0.0, 6.94])
def test_the_power_profile_is_the_published_one(gamma):
    params, found, _, _ = averages(ff.power_ema(gamma))
    # The weight of the parameters after update s in the average after update t is that of the profile, in closed form.
    for t in range(1, 13):
        betas = [(1 - 1 / s) ** (gamma + 1) for s in range(1, t + 1)]
        weights = [(1 - betas[s]) * math.prod(betas[s + 1 :]) for s in range(t)]
        assert sum(weights) == pytest.approx(1.0)
        expected = {n: sum(w * p[n] for w, p in zip(weights, params, strict=False)) for n in params[0]}
        assert_close(found[t - 1], expected)
        if gamma == 0:
            assert weights == pytest.approx([1 / t] * t)


@pytest.mark.parametrize(("start", "every"), [(1, 1), (4, 3), (5, 2), (100, 1)])
@pytest.mark.parametrize("changes", [{}, {"compile": True, "backend": "aot_eager"}], ids=["eager", "compiled"])
def test_swa_is_the_average_of_torch(start, every, changes):
    params, found, _, _ = averages(ff.swa(start=start, every=every), **changes)
    model = classifier(torch.float64)
    theirs = torch.optim.swa_utils.AveragedModel(model)
    for step, (now, average) in enumerate(zip(params, found, strict=True), start=1):
        model.load_state_dict(now)
        if step >= start and (step - start) % every == 0:
            theirs.update_parameters(model)
        assert_close(average, dict(theirs.module.named_parameters()) if step >= start else now)


@pytest.mark.parametrize("average", [ff.ema(0.5, warmup=True), ff.power_ema(2.0), ff.swa(start=2)], ids=repr)
def test_steps_that_are_left_out_do_not_count(average):
    batches = labelled_batches(6)
    bad = batches[2][0] * math.nan, batches[2][1]
    changes = {"average": average, "on_nonfinite": "skip", "schedule": 1e-2}
    made = program(classifier(), **changes)
    with_bad = ff.fold(made.step, made.init(0), [*batches[:2], bad, *batches[3:]])
    plain = program(classifier(), **changes)
    without = ff.fold(plain.step, plain.init(0), [*batches[:2], *batches[3:]])
    for name, tensor in without.ema.items():
        assert torch.equal(with_bad.ema[name], tensor)


@pytest.mark.parametrize("average", [ff.ema(0.9, warmup=True), ff.swa(start=2)], ids=repr)
def test_others_are_evaluated_and_exported_as_ema(average):
    _, _, made, state = averages(average)
    exported = made.export(state, params="ema")
    assert all(torch.equal(tensor, state.ema[name]) for name, tensor in exported.named_parameters())
    assert any(not torch.equal(tensor, state.params[name]) for name, tensor in exported.named_parameters())
    features, labels = labelled(9, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(exported(features), labels).item()
    found = made.evaluate(state, [(features, labels)], params="ema")["loss"]
    assert found == pytest.approx(expected, rel=1e-12)


class TestRefreshedStatistics:
    def test_they_are_those_of_torch(self):
        made = program(Noisy(), average=ff.swa(start=2))
        state = ff.fold(made.step, made.init(0), labelled_batches(4))
        before = state.copy()
        model = made.export(state, params="ema")
        batches = labelled_batches(5)
        torch.optim.swa_utils.update_bn([rows for rows, _ in batches], model)
        refreshed = ff.refreshed_statistics(made, state, batches)
        assert ff.difference(before, state) is None
        for name, buffer in model.named_buffers():
            if name != "seen":  # which is no statistic of a batch norm
                assert torch.equal(refreshed.buffers[name], buffer)
        assert torch.equal(refreshed.buffers["seen"], state.buffers["seen"])
        assert not torch.equal(refreshed.buffers["body.1.running_mean"], state.buffers["body.1.running_mean"])
        features, _ = labelled(6)
        assert torch.equal(made.apply(refreshed, features, params="ema"), _evaluating(model, features))

    def test_a_stream_is_read_once_in_order(self):
        made = program(Noisy(), average=ff.swa(start=1))
        state = ff.fold(made.step, made.init(0), labelled_batches(2))
        rows, labels = labelled(12)
        stream = ff.batches((rows, labels), batch_size=6)
        one = ff.refreshed_statistics(made, state, stream)
        other = ff.refreshed_statistics(made, state, [(rows[:6], labels[:6]), (rows[6:], labels[6:])])
        assert ff.difference(one, other) is None

    def test_dropout_draws_neither_from_the_global_generator_nor_for_it(self):
        model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        made = program(model, average=ff.swa(start=1))
        state, found = made.init(0), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(ff.refreshed_statistics(made, state, [(torch.ones(6, 5), torch.zeros(6))]))
            assert torch.equal(torch.get_rng_state(), before)
        assert ff.difference(*found) is None

    def test_a_model_without_batch_norms_is_refused(self):
        made = program(classifier(), average=ff.swa(start=1))
        with pytest.raises(ValueError, match="Sequential has no batch norm"):
            ff.refreshed_statistics(made, made.init(0), labelled_batches(1))

    def test_data_that_are_no_sequences_are_refused(self):
        made = program(Noisy(), average=ff.swa(start=1))
        with pytest.raises(ValueError, match="a tensor in a tuple or list; got dict"):
            ff.refreshed_statistics(made, made.init(0), [{"x": torch.zeros(2, 5)}])


def _evaluating(model, features):
    with torch.no_grad():
        return model.eval()(features)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.swa(start=0), "start and every must be integers of at least 1"),
        (lambda: ff.swa(start=1, every=0), "start and every must be integers of at least 1"),
        (lambda: ff.power_ema(-1.0), "gamma must be a finite number of at least 0"),
        (lambda: ff.power_ema(math.nan), "gamma must be a finite number of at least 0"),
    ],
)
def test_numbers_of_other_averages_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


AVERAGES = {"ema": ff.ema(0.999), "power_ema": ff.power_ema(0.0), "swa": ff.swa(start=1)}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_half_precision_is_kept_in_float32(name):
    """In bfloat16 an average stands still: a thousandth of the way is less than the distance to the next number."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(torch.bfloat16)
    program = ff.single(
        ff.Plan(model=model, loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1, average=AVERAGES[name])
    )
    state = program.init(seed=0)
    x, y = torch.randn(8, 5, dtype=torch.bfloat16), torch.randn(8, 3, dtype=torch.bfloat16)
    wide = {key: tensor.double() for key, tensor in state.params.items()}
    for step in range(1, 40):
        state, _ = program.step(state, (x, y))
        share = 0.001 if name == "ema" else 1 / step
        wide = {key: tensor.lerp(state.params[key].double(), share) for key, tensor in wide.items()}
    for key, tensor in state.ema.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wide[key], rtol=0, atol=1e-6)
    exported = program.export(state, params="ema")
    assert exported.weight.dtype == torch.bfloat16
    assert torch.equal(exported.weight, wide["weight"].to(torch.bfloat16))
    assert program.evaluate(state, [(x, y)], params="ema")["loss"] > 0

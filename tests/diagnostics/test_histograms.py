"""Histograms, read back with TensorBoard's own reader."""

import pytest
import toolz

import forgather_fn as ff
from forgather_fn.diagnostics import histograms
from tests.toys import classifier, labelled_batches, program


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "histograms"), size_guidance={"histograms": 0})
    found.Reload()
    return {tag: [(e.step, e.histogram_value) for e in found.Histograms(tag)] for tag in found.Tags()["histograms"]}


def test_parameters_and_gradients_are_those_of_the_step(tmp_path):
    made, seen = program(classifier, transforms=(ff.clipped(1e-3),)), {}

    def note(tick):
        seen[tick.state.step] = tick.state.copy()

    toolz.pipe(
        made.steps(made.init(0), labelled_batches(4)),
        ff.every(1, note),
        ff.every(2, histograms(tmp_path, params="*.weight", gradients="0.*")),
        ff.last,
    )
    found = read(tmp_path)
    assert set(found) == {"param/0.weight", "param/2.weight", "gradient/0.weight", "gradient/0.bias"}
    assert [step for step, _ in found["param/0.weight"]] == [2, 4]
    weight, histogram = seen[2].params["0.weight"], found["param/0.weight"][0][1]
    assert (histogram.num, histogram.sum) == (weight.numel(), pytest.approx(weight.sum().item(), rel=1e-5))
    gradients, _, _ = made.gradients(seen[1], labelled_batches(2)[1])
    histogram = found["gradient/0.weight"][0][1]
    assert histogram.sum_squares == pytest.approx(gradients["0.weight"].square().sum().item(), rel=1e-5)


def test_what_is_not_finite_is_left_out(tmp_path):
    made = program(classifier)

    def spoil(tick):
        tick.state.params["0.weight"][0, 0] = float("nan")
        tick.state.params["0.bias"].fill_(float("inf"))

    spoilt = ff.every(1, spoil, histograms(tmp_path))
    toolz.pipe(made.steps(made.init(0), labelled_batches(1)), spoilt, ff.last)
    found = read(tmp_path)
    assert set(found) == {"param/0.weight", "param/2.weight", "param/2.bias"}
    assert found["param/0.weight"][0][1].num == 7 * 5 - 1


@pytest.mark.parametrize(("params", "gradients"), [("layers.*", None), (None, "layers.*")])
def test_names_that_match_nothing_are_refused_at_the_first_look(tmp_path, params, gradients):
    made = program(classifier)
    stage = ff.every(1, histograms(tmp_path, params=params, gradients=gradients))
    with pytest.raises(ValueError, match=r"has a name like 'layers\.\*'; there are, the nearest first: "):
        toolz.pipe(made.steps(made.init(0), labelled_batches(1)), stage, ff.last)


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="histograms: of nothing"):
        histograms(tmp_path, params=None)


def test_gradients_that_nobody_holds_are_refused(tmp_path):
    made = program(classifier, update="in_backward")
    stage = ff.every(1, histograms(tmp_path, gradients="*"))
    with pytest.raises(ValueError, match="lets go of one by one"):
        toolz.pipe(made.steps(made.init(0), labelled_batches(1)), stage, ff.last)

import json

import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.reports import jsonl
from tests.toys import classifier, labelled, labelled_batches, program


class Ticking:
    """A clock that goes on by a second each time that it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def reported(*stages, data=None, rows=None, **changes):
    made = program(classifier(), **changes)
    rows = [] if rows is None else rows
    run = made.steps(made.init(0), labelled_batches(4) if data is None else data)
    toolz.pipe(run, *(stages or [ff.every(2, ff.report(rows.append))]), ff.last)
    return rows


class TestReport:
    def test_a_row_holds_the_metrics_the_results_and_where_it_is(self):
        rows = []
        reported(ff.every(2, lambda tick: {"eval_x": 7.0}, ff.report(rows.append)), ff.until(steps=4), rows=rows)
        made = program(classifier())
        first, _ = made.step(made.init(0), labelled(6))
        _, metrics = made.step(first, labelled(6, seed=1))
        row = rows[0]
        assert (row.step, row.samples, row.started, row.horizon, row.epoch) == (2, 12, 0, 4, None)
        assert row.values["loss"] == float(metrics["loss"])
        assert row.values["learning_rate"] == 1e-2
        assert row.values["eval_x"] == 7.0
        assert row.values["grad_norm"] == pytest.approx(float(metrics["grad_norm"]))
        assert [row.step for row in rows] == [2, 4]

    def test_epochs_are_told_where_they_are_known(self):
        rows = reported(data=ff.batches(labelled(20), batch_size=5, epochs=2))
        assert [row.epoch for row in rows] == [0.5, 1.0, 1.5, 2.0]

    def test_rates_are_means_since_the_row_before(self):
        clock, rows = Ticking(), []
        batches = labelled_batches(4)
        batches[3][1][:3] = -100
        reported(ff.every(2, ff.report(rows.append, clock=clock)), rows=rows, data=batches)
        assert "samples_per_second" not in rows[0].values
        elapsed = rows[1].seconds - rows[0].seconds
        assert rows[1].values["samples_per_second"] == pytest.approx(12 / elapsed)
        assert rows[1].values["tokens_per_second"] == pytest.approx(9 / elapsed)

    @pytest.mark.parametrize("looks", [1, 2])
    def test_seconds_are_those_since_the_stream_began(self, looks):
        """Neither is the time before it, of models and checkpoints, nor that of a stream before."""
        rows, now = [], [0.0]

        def batches():
            for batch in labelled_batches(2):
                now[0] += 1.0
                yield batch

        report = ff.report(rows.append, clock=lambda: now[0])
        for _ in range(2):
            now[0] += 100.0
            reported(*[ff.every(1, report)] * looks, data=batches(), rows=rows)
        assert [row.seconds for row in rows] == [second for second in (1, 2, 1, 2) for _ in range(looks)]
        assert [("samples_per_second" in row.values) for row in rows[::looks]] == [False, True, False, True]

    def test_where_a_sample_is_a_token_there_is_one_rate(self):
        rows = []
        reported(ff.every(2, ff.report(rows.append, clock=Ticking())), rows=rows)
        assert "samples_per_second" in rows[1].values
        assert "tokens_per_second" not in rows[1].values

    def test_a_clock_that_stands_still_gives_no_rate(self):
        rows = []
        reported(ff.every(1, ff.report(rows.append, clock=lambda: 5.0)), rows=rows)
        assert all("samples_per_second" not in row.values for row in rows)

    def test_every_sink_gets_every_row_in_order(self):
        seen = []
        reported(
            ff.every(2, ff.report(lambda row: seen.append(("a", row.step)), lambda row: seen.append(("b", row.step))))
        )
        assert seen == [("a", 2), ("b", 2), ("a", 4), ("b", 4)]

    def test_it_asks_for_what_its_sinks_want(self):
        rows = []
        reported(ff.every(3, ff.report(rows.append, wants=["gradient_norms"])), rows=rows)
        assert sorted(name for name in rows[0].values if name.startswith("grad_norm/")) == [
            "grad_norm/0.bias", "grad_norm/0.weight", "grad_norm/2.bias", "grad_norm/2.weight",
        ]  # fmt: skip

    def test_what_others_asked_for_is_not_written(self):
        rows = []
        other = ff.Observer(lambda tick: None, wants=frozenset({"gradient_norms", "gradients"}))
        reported(ff.every(3, other), ff.every(3, ff.report(rows.append, wants=["parameter_norms"])), rows=rows)
        assert {name.partition("/")[0] for name in rows[0].values if "/" in name} == {"param_norm"}

    @pytest.mark.parametrize(
        ("wants", "message"),
        [("update_norm", r"it can give \['update_norms'"), ("gradients", "are tensors, and a row has numbers")],
    )
    def test_what_cannot_be_written_is_refused_when_the_report_is_made(self, wants, message):
        with pytest.raises(ValueError, match=message):
            ff.report(print, wants=[wants])

    def test_sinks_are_closed_at_the_end_and_on_exceptions(self):
        for failing in (False, True):
            closed = []
            sinks = [Closing(closed, "a"), Closing(closed, "b")]

            def fail(tick, failing=failing):
                if failing:
                    raise RuntimeError("boom")

            try:
                reported(ff.every(2, ff.report(*sinks), fail))
            except RuntimeError:
                assert failing
            assert sorted(closed) == ["a", "b"]

    def test_a_sink_that_fails_to_close_keeps_no_other_from_closing(self):
        closed = []
        with pytest.raises(OSError, match="disk"):
            reported(ff.every(2, ff.report(Closing(closed, "a", failing=True), Closing(closed, "b"))))
        assert sorted(closed) == ["a", "b"]

    @pytest.mark.parametrize("ending", [[], [ff.until(steps=3)]], ids=["data", "until"])
    @pytest.mark.parametrize("place", ["before", "after"])
    def test_one_report_may_look_every_so_often_and_at_the_end(self, tmp_path, ending, place):
        report = ff.report(jsonl(tmp_path / "metrics.jsonl"))
        looks = [ff.every(2, report), ff.at_end(report)]
        reported(*(looks + ending if place == "before" else [looks[0], *ending, looks[1]]), data=labelled_batches(3))
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 3]

    def test_a_step_that_was_not_finite_is_raised_at_the_next_row(self):
        made, rows = program(classifier()), []
        state = made.init(0)
        state.nonfinite.fill_(3)
        with pytest.raises(ff.NonFiniteError, match="step 3"):
            toolz.pipe(made.steps(state, labelled_batches(2)), ff.every(2, ff.report(rows.append)), ff.last)
        assert rows == []

    def test_a_metric_that_is_no_number_is_refused_by_its_name(self):
        wide = ff.Transform(lambda params: None, lambda g, s, **context: (g.reporting(wide=torch.zeros(2)), s))
        with pytest.raises(ValueError, match="wide"):
            reported(transforms=[wide])


class Closing:
    def __init__(self, closed, name, failing=False):
        self.closed, self.name, self.failing = closed, name, failing

    def __call__(self, row):
        pass

    def close(self):
        self.closed.append(self.name)
        if self.failing:
            raise OSError("disk")


class TestEvaluated:
    def test_it_is_the_evaluation_of_the_state_at_the_tick(self):
        made, rows = program(classifier()), []
        evaluation = ff.batches(labelled(11, seed=9), batch_size=4)
        toolz.pipe(
            made.steps(made.init(0), labelled_batches(4)),
            ff.every(2, ff.evaluated(evaluation), ff.report(rows.append)),
            ff.last,
        )
        for row in rows:
            other = program(classifier())
            state = ff.fold(other.step, other.init(0), labelled_batches(row.step))
            assert row.values["eval_loss"] == other.evaluate(state, evaluation)["loss"]

    def test_of_the_average_and_under_another_name(self):
        made, seen = program(classifier(), average=ff.ema(0.5)), []
        data = [labelled(11, seed=9)]

        def observe(tick):
            seen.append((dict(tick.results), made.evaluate(tick.state, data, params="ema")))

        toolz.pipe(
            made.steps(made.init(0), labelled_batches(2)),
            ff.every(2, ff.evaluated(data, params="ema", name="average"), observe),
            ff.last,
        )
        assert seen[0][0] == {"average_loss": seen[0][1]["loss"]}

import contextlib
import itertools
import json
import threading

import pytest
import toolz
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.control import Aborted, Command, ControlError, Inbox, controlled
from forgather_fn.control.progress import Progress
from forgather_fn.loop import Demand
from tests.toys import assert_equal, classifier, labelled, labelled_batches, program, trained


@pytest.fixture
def made():
    return program(classifier())


@pytest.fixture
def inbox(tmp_path):
    return Inbox(tmp_path)


def steps(made, count=5):
    return made.steps(made.init(0), labelled_batches(count))


def posting(inbox, at, *commands):
    """Ask at a step, as a client would that sees it; the answers are kept."""
    answers = []

    def observe(tick):
        if tick.state.step == at:
            answers.extend(map(inbox.post, commands))

    return ff.every(1, observe), answers


def saved_steps(run):
    return [entry.step for entry in list_checkpoints(run) if entry.whole]


class TestCommands:
    def test_save_is_the_save_of_the_observer_upstream(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 2, "save")
        toolz.pipe(steps(made), ff.every(10**9, ff.saved(tmp_path, keep=5)), post, controlled(inbox), ff.last)
        path = str(tmp_path / "checkpoints" / "checkpoint-2")
        assert answers[0].result() == {"command": "save", "step": 2, "paths": [path]}
        assert saved_steps(tmp_path) == [2, 5]
        restored = made.restore(path)
        assert_equal(restored, trained(classifier(), labelled_batches(2)))

    def test_save_where_the_last_look_saved_already_writes_nothing_again(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 2, "save")
        toolz.pipe(steps(made), ff.every(2, ff.saved(tmp_path)), post, controlled(inbox), ff.last)
        entry = next(entry for entry in list_checkpoints(tmp_path) if entry.step == 2)
        assert answers[0].result()["paths"] == [str(entry.path)]
        assert entry.manifest.order == 0  # committed once

    def test_save_at_the_end_only_can_be_asked_for_too(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "save")
        toolz.pipe(steps(made), ff.at_end(ff.saved(tmp_path)), post, controlled(inbox), ff.last)
        assert answers[0].result()["step"] == 3
        assert saved_steps(tmp_path) == [3, 5]

    def test_save_by_seconds_can_be_asked_for_too(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "save")
        toolz.pipe(steps(made), ff.every_seconds(1e6, ff.saved(tmp_path)), post, controlled(inbox), ff.last)
        assert answers[0].result()["step"] == 3

    def test_save_goes_to_the_run_where_nothing_upstream_saves(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 2, "save")
        toolz.pipe(steps(made), post, controlled(inbox), ff.last)
        assert answers[0].result()["paths"] == [str(tmp_path / "checkpoints" / "checkpoint-2")]
        assert saved_steps(tmp_path) == [2]

    def test_save_without_a_place_is_refused_and_the_run_goes_on(self, made):
        inbox = Inbox()
        post, answers = posting(inbox, 2, "save", "save-stop")
        assert toolz.pipe(steps(made), post, controlled(inbox), ff.last).step == 5
        for answer in answers:
            with pytest.raises(ControlError, match=r"this run saves nothing: write ff.every\(n, ff.saved\(run\)\)"):
                answer.result()

    def test_stop_ends_after_the_saves_of_the_end(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "stop")
        final = toolz.pipe(steps(made), ff.every(10, ff.saved(tmp_path)), post, controlled(inbox), ff.last)
        assert_equal(final, trained(classifier(), labelled_batches(3)))
        checkpoint = str(tmp_path / "checkpoints" / "checkpoint-3")
        assert answers[0].result() == {"command": "stop", "step": 3, "checkpoint": checkpoint}

    def test_stop_saves_nothing_where_nothing_saves_at_the_end(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "stop")
        assert toolz.pipe(steps(made), post, controlled(inbox), ff.last).step == 3
        assert answers[0].result() == {"command": "stop", "step": 3, "checkpoint": None}
        assert saved_steps(tmp_path) == []

    def test_stop_lets_stages_downstream_see_the_last_step_and_fetches_no_batch(self, made, inbox):
        seen, fetched = [], []

        def batches():
            for seed in itertools.count():
                fetched.append(seed)
                yield labelled(6, seed=seed)

        post, _ = posting(inbox, 3, "stop")
        run = made.steps(made.init(0), batches())
        toolz.pipe(run, post, controlled(inbox), ff.every(1, lambda tick: seen.append(tick.state.step)), ff.last)
        assert (seen, fetched) == ([1, 2, 3], [0, 1, 2])

    def test_save_stop_saves_and_ends(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "save-stop")
        assert toolz.pipe(steps(made), post, controlled(inbox), ff.last).step == 3
        assert answers[0].result()["checkpoint"] == str(tmp_path / "checkpoints" / "checkpoint-3")
        assert saved_steps(tmp_path) == [3]

    @pytest.mark.parametrize("command", ["save", "save-stop"])
    def test_a_save_that_fails_is_told_and_the_run_goes_on(self, made, inbox, tmp_path, monkeypatch, command):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        post, answers = posting(inbox, 2, command)
        monkeypatch.setattr("forgather_fn.checkpoint.saving.commit", full)
        stages = (ff.every(10, ff.saved(tmp_path)), post, controlled(inbox))
        stages += (ff.every(1, lambda tick: monkeypatch.undo() if tick.state.step == 3 else None),)
        assert toolz.pipe(steps(made), *stages, ff.last).step == 5
        with pytest.raises(ControlError, match=f"^{command}: OSError: .*No space left on device"):
            answers[0].result()
        assert "No space left" in inbox.last_error
        assert saved_steps(tmp_path) == [5]

    def test_abort_saves_nothing_and_leaves_what_was_saved(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 3, "abort")
        ends = []
        stages = (ff.every(2, ff.saved(tmp_path)), ff.at_end(ends.append), post, controlled(inbox))
        with pytest.raises(Aborted) as aborted:
            toolz.pipe(steps(made), *stages, ff.at_end(ends.append), ff.last)
        assert (aborted.value.code, aborted.value.step) == (3, 3)
        assert (saved_steps(tmp_path), ends) == ([2], [])
        checkpoint = str(tmp_path / "checkpoints" / "checkpoint-2")
        assert answers[0].result() == {"command": "abort", "step": 3, "checkpoint": checkpoint}

    def test_abort_acts_between_microbatches(self, inbox):
        model, calls = classifier(), []
        made = program(model, microbatches=3)

        def hook(module, args):
            calls.append(1)
            if len(calls) == 4:  # the first microbatch of the second step
                inbox.post("abort")

        model.register_forward_pre_hook(hook)
        state = made.init(0)
        run = made.steps(state, labelled_batches(5))
        held = []
        with pytest.raises(Aborted) as aborted:
            toolz.pipe(run, ff.every(1, lambda tick: held.append(tick.state)), controlled(inbox), ff.last)
        assert (len(calls), aborted.value.step) == (4, 1)
        assert not held[0].consumed
        assert_equal(held[0], trained(classifier(), labelled_batches(1), microbatches=3))

    def test_abort_acts_between_batches_of_an_evaluation(self, made, inbox):
        def batches():
            for seed in range(5):
                if seed == 2:
                    inbox.post("abort")
                assert seed < 3
                yield labelled(6, seed=seed)

        class Once:
            __iter__ = lambda self: batches()  # noqa: E731

        with pytest.raises(Aborted):
            toolz.pipe(steps(made), ff.every(2, ff.evaluated(Once())), controlled(inbox), ff.last)

    def test_another_thread_is_not_aborted(self, made, inbox):
        states = []
        other = program(classifier(), microbatches=3)
        with contextlib.closing(iter(controlled(inbox)(steps(made)))) as run:
            next(run)
            inbox.post("abort")
            thread = threading.Thread(target=lambda: states.append(other.step(other.init(0), labelled(6))))
            thread.start()
            thread.join()
            assert len(states) == 1
            with pytest.raises(Aborted):
                next(run)

    def test_evaluate_gives_what_the_observers_find_and_stages_downstream_see_it(self, made, inbox):
        rows = []
        post, answers = posting(inbox, 2, "evaluate")
        data = labelled_batches(2)
        toolz.pipe(
            steps(made),
            ff.every(10**9, ff.evaluated(data), ff.evaluated(data[:1], name="short")),
            post,
            controlled(inbox),
            ff.every(1, ff.report(rows.append)),
            ff.last,
        )
        state = trained(classifier(), labelled_batches(2))
        expected = made.evaluate(state, data)["loss"]
        assert answers[0].result()["step"] == 2
        assert answers[0].result()["results"]["eval_loss"] == expected == rows[1].values["eval_loss"]
        assert rows[1].values["short_loss"] != expected
        assert "eval_loss" not in rows[2].values

    def test_evaluate_without_evaluations_is_refused(self, made, inbox):
        post, answers = posting(inbox, 2, "evaluate")
        assert toolz.pipe(steps(made), post, controlled(inbox), ff.last).step == 5
        with pytest.raises(ControlError, match="evaluate: this run evaluates nothing"):
            answers[0].result()

    def test_an_evaluation_that_fails_is_told_and_the_run_goes_on(self, made, inbox):
        post, answers = posting(inbox, 2, "evaluate")
        evaluated = ff.every(10**9, ff.evaluated([]))
        final = toolz.pipe(steps(made), evaluated, post, controlled(inbox), ff.last)
        assert_equal(final, trained(classifier(), labelled_batches(5)))
        with pytest.raises(ControlError, match="evaluate: ValueError: the evaluation data gave no batch"):
            answers[0].result()

    def test_commands_act_one_a_step_in_order(self, made, inbox, tmp_path):
        post, answers = posting(inbox, 1, "save", "save", "stop")
        assert toolz.pipe(steps(made), post, controlled(inbox), ff.last).step == 3
        assert [answer.result()["step"] for answer in answers] == [1, 2, 3]

    def test_the_run_is_the_one_that_nobody_controls(self, made, inbox, tmp_path):
        post, _ = posting(inbox, 2, "save", "evaluate")
        stages = (ff.every(10**9, ff.evaluated(labelled_batches(1))), post, controlled(inbox))
        assert_equal(toolz.pipe(steps(made), *stages, ff.last), trained(classifier(), labelled_batches(5)))


class TestTheEnd:
    def test_what_comes_too_late_is_told_so(self, made, inbox):
        post, answers = posting(inbox, 5, "save", "stop")
        final = toolz.pipe(steps(made), post, controlled(inbox), ff.last)
        assert final.step == 5
        assert answers[0].result()["step"] == 5
        with pytest.raises(ControlError, match="stop: the run ended at step 5 before it"):
            answers[1].result()

    def test_an_end_downstream_leaves_nothing_unanswered(self, made, inbox):
        post, answers = posting(inbox, 3, "save", "save")
        toolz.pipe(steps(made), post, controlled(inbox), ff.until(steps=3), ff.last)
        assert answers[0].result()["step"] == 3
        with pytest.raises(ControlError, match="the run ended at step 3"):
            answers[1].result()

    def test_a_run_that_breaks_says_why(self, made, inbox):
        def broken(tick):
            inbox.post("stop")
            answers.append(inbox.post("save"))
            raise RuntimeError("a bug")

        answers = []
        with pytest.raises(RuntimeError, match="a bug"):
            toolz.pipe(steps(made), ff.at(2, broken), controlled(inbox), ff.last)
        with pytest.raises(ControlError, match="save: the run ended at step 1 by RuntimeError: a bug"):
            answers[0].result()

    def test_a_save_at_the_end_that_fails_is_no_stop(self, made, inbox, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("forgather_fn.checkpoint.saving.commit", full)
        post, answers = posting(inbox, 2, "stop")
        with pytest.raises(RuntimeError, match="No space left"):
            toolz.pipe(steps(made), ff.every(10, ff.saved(tmp_path)), post, controlled(inbox), ff.last)
        with pytest.raises(ControlError, match="stop: the run ended at step 2 by SaveError"):
            answers[0].result()

    def test_an_inbox_that_has_ended_refuses(self, inbox):
        before = inbox.post("save")
        inbox.end("the run has ended")
        for answer in (before, inbox.post("stop")):
            with pytest.raises(ControlError, match="the run has ended"):
                answer.result(timeout=0)

    def test_what_is_no_command_is_refused(self, inbox):
        with pytest.raises(
            ControlError, match=r"'halt' is not a command; there are save, stop, save-stop, abort, eval"
        ):
            inbox.post("halt")


class TestWhatIsTold:
    def test_progress(self, made):
        now = itertools.count()
        inbox = Inbox(clock=lambda: float(next(now)))
        data = ff.batches(labelled(12), batch_size=3)
        toolz.pipe(made.steps(made.init(0), data), controlled(inbox), ff.until(steps=6), ff.last)
        progress = inbox.progress
        assert (progress.at[:2], progress.horizon, progress.epoch) == ((6, 18), 6, 1.5)
        assert (progress.rates, progress.remaining) == ((1.0, 3.0), 0.0)

    def test_rates_are_over_the_last_half_minute(self):
        progress = Progress(0, 1000, lambda samples: None, (0, 0, 0.0))
        for second in range(100):
            progress.advance(second * (1 if second < 60 else 2), 0, float(second))
        assert progress.rates == (2.0, 0.0)
        assert progress.remaining == (1000 - 198) / 2

    def test_nobody_looks_at_the_metrics_unless_asked(self, made, inbox):
        looked = []

        class Tracing(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func.__name__ in ("item", "__float__", "__int__"):
                    looked.append(func.__name__)
                return func(*args, **(kwargs or {}))

        run = iter(controlled(inbox)(steps(made)))
        next(run)
        control_only = ff.Tick(**{name: getattr(next(run), name) for name in ("state", "metrics", "batch", "run")})
        stream = controlled(inbox)(ff.Steps(control_only.state, [], lambda demand: iter([control_only])))
        with Tracing():
            list(stream.open(Demand()))
        assert looked == []
        wanted = inbox.look()
        with Tracing():
            list(stream.open(Demand()))
        assert looked
        assert wanted.result(timeout=0).values["loss"] == float(control_only.metrics["loss"])

    def test_looks_are_at_most_two_a_second(self, made):
        now = [0.0]
        inbox = Inbox(clock=lambda: now[0])
        run = iter(controlled(inbox)(steps(made)))
        first = inbox.look()
        next(run)
        assert first.result(timeout=0) is inbox.look().result(timeout=0)
        now[0] = 1.0
        second = inbox.look()
        assert not second.done()
        next(run)
        assert second.result(timeout=0).step == 2

    def test_saves_that_fail_on_their_schedule_are_told(self, made, inbox):
        toolz.pipe(steps(made), ff.at(2, lambda tick: {"save_failures": 2.0}), controlled(inbox), ff.last)
        assert inbox.last_error == "step 2: 2 saves in a row have failed"

    def test_metrics_that_are_no_numbers_are_left_out(self, made, inbox):
        run = iter(ff.every(1, ff.Observer(lambda tick: None, wants=frozenset({"gradient_norms"})))(steps(made)))
        tick = next(run)
        wanted = inbox.look()
        list(controlled(inbox)(ff.Steps(tick.state, [], lambda demand: iter([tick]))).open(Demand()))
        json.dumps(wanted.result(timeout=0).values, allow_nan=False)


def test_every_command_has_an_action():
    from forgather_fn.control.stage import _ACTIONS

    assert set(_ACTIONS) == set(Command)


def test_dropout_is_the_same_with_and_without(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    inbox = Inbox(tmp_path)
    made = program(model())
    post, _ = posting(inbox, 1, "evaluate", "save", "evaluate")
    stages = (ff.every(10**9, ff.evaluated(labelled_batches(1))), post, controlled(inbox))
    assert_equal(toolz.pipe(steps(made), *stages, ff.last), trained(model(), labelled_batches(5)))

"""Control of the class layer from outside: on a trainer of this process, and on processes of their own."""

import contextlib
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from forgather.ml.trainer import Trainer, TrainerCallback, TrainerControlCallback, TrainingArguments
from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.control import Aborted, Command, ControlError, jobs
from forgather_fn.control.client import RefusedError, ask, ask_status, target
from forgather_fn.testing.processes import processes


@pytest.fixture(autouse=True)
def state_home(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as home:
        monkeypatch.setenv("XDG_STATE_HOME", home)
        yield Path(home)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x, labels):
        self.calls += 1
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


ROWS = [{"x": torch.full((4,), float(i)), "labels": torch.tensor(i % 2)} for i in range(8)]


class Posting(TrainerCallback):
    """Asks at steps, as a client would that sees them; and paces the run."""

    def __init__(self, control, at, pace=0.0):
        self.control, self.at, self.pace, self.answers = control, at, pace, {}

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.pace)
        if state.global_step + 1 in self.at:
            command = self.at[state.global_step + 1]
            self.answers[command] = self.control.inbox.post(command)


def trainer(folder, *callbacks, **changes):
    given = {"max_steps": 6, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    given |= {"per_device_train_batch_size": 2, "report_to": "none"} | changes
    arguments = TrainingArguments(str(folder), **given)
    return Trainer(Model(), arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=list(callbacks))


def run(folder, at, **changes):
    """Train with commands at steps; give the trainer, and the answers."""
    control = TrainerControlCallback()
    posting = Posting(control, at)
    made = trainer(folder, control, posting, **changes)
    with contextlib.suppress(Aborted):
        made.train()
    return made, posting.answers


def saved_steps(folder):
    return [entry.step for entry in list_checkpoints(folder) if entry.whole]


class TestCommands:
    def test_save(self, tmp_path):
        made, answers = run(tmp_path / "a", {3: "save"})
        path = str(tmp_path / "a" / "checkpoint-3")
        assert answers["save"].result(0) == {"command": "save", "step": 3, "paths": [path]}
        assert (saved_steps(tmp_path / "a"), made.state.global_step) == ([3], 6)

    def test_evaluate(self, tmp_path):
        made, answers = run(tmp_path / "a", {3: "evaluate"}, eval_strategy="steps", eval_steps=100)
        answer = answers["evaluate"].result(0)
        assert answer["step"] == 3
        assert answer["results"]["eval_loss"] > 0
        assert made.state.global_step == 6

    def test_evaluate_without_evaluations_is_refused_and_the_training_goes_on(self, tmp_path):
        made, answers = run(tmp_path / "a", {3: "evaluate"})
        with pytest.raises(ControlError, match="evaluate: this training evaluates nothing"):
            answers["evaluate"].result(0)
        assert made.state.global_step == 6

    def test_an_earlier_prediction_is_no_set_to_evaluate_on(self, tmp_path):
        control = TrainerControlCallback()
        posting = Posting(control, {3: "evaluate"})
        made = trainer(tmp_path / "a", control, posting)
        made.predict(made.eval_dataset)
        made.eval_dataset = None
        made.train()
        with pytest.raises(ControlError, match="evaluate: the trainer has not done it"):
            posting.answers["evaluate"].result(0)
        assert made.state.global_step == 6

    @pytest.mark.parametrize(("strategy", "saved"), [("no", []), ("steps", [3]), ("epoch", [3])])
    def test_stop_saves_as_configured(self, tmp_path, strategy, saved):
        made, answers = run(tmp_path / "a", {3: "stop"}, save_strategy=strategy)
        assert made.state.global_step == 3
        assert saved_steps(tmp_path / "a") == saved
        checkpoint = str(tmp_path / "a" / "checkpoint-3") if saved else None
        assert answers["stop"].result(0) == {"command": "stop", "step": 3, "checkpoint": checkpoint}

    def test_save_stop(self, tmp_path):
        made, answers = run(tmp_path / "a", {3: "save-stop"})
        assert (made.state.global_step, saved_steps(tmp_path / "a")) == (3, [3])
        assert answers["save-stop"].result(0)["checkpoint"] == str(tmp_path / "a" / "checkpoint-3")

    @pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
    def test_abort_saves_nothing(self, tmp_path, strategy):
        control = TrainerControlCallback()
        posting = Posting(control, {3: "abort"})
        made = trainer(tmp_path / "a", control, posting, save_strategy=strategy, save_steps=2)
        with pytest.raises(Aborted) as aborted:
            made.train()
        before = {"no": [], "steps": [2], "epoch": []}[strategy]
        assert (aborted.value.code, saved_steps(tmp_path / "a")) == (3, before)
        assert answers_step(posting.answers["abort"]) in (2, 3)
        assert control.inbox is None

    def test_abort_acts_between_microbatches(self, tmp_path):
        control = TrainerControlCallback()
        made = trainer(tmp_path / "a", control, gradient_accumulation_steps=4, per_device_train_batch_size=1)
        model = made.model

        def hook(module, args, kwargs):
            if model.calls == 5:  # the first microbatch of the second step has been run
                control.inbox.post("abort")

        model.register_forward_pre_hook(hook, with_kwargs=True)
        with pytest.raises(Aborted) as aborted:
            made.train()
        assert (model.calls, aborted.value.step) == (6, 1)

    def test_a_save_that_the_trainer_does_not_do_is_told_so(self, tmp_path):
        class Unsaving(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_save = False

        control = TrainerControlCallback()
        posting = Posting(control, {3: "save"})
        trainer(tmp_path / "a", control, posting, Unsaving()).train()
        with pytest.raises(ControlError, match="save: the trainer has not done it"):
            posting.answers["save"].result(0)

    def test_what_comes_too_late_is_told_so(self, tmp_path):
        control = TrainerControlCallback()
        answers = []

        class Late(TrainerCallback):
            def on_epoch_end(self, args, state, trainer_control, **kwargs):
                if state.global_step == 6:
                    answers.append(control.inbox.post("save"))

        trainer(tmp_path / "a", control, Late()).train()
        with pytest.raises(ControlError, match="save: the training has ended"):
            answers[0].result(0)

    def test_the_training_is_the_one_that_nobody_controls(self, tmp_path):
        plain = trainer(tmp_path / "plain")
        plain.train()
        made, _ = run(tmp_path / "a", {2: "save", 3: "evaluate"}, eval_strategy="steps", eval_steps=100)
        for mine, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(mine, other)


def answers_step(answer):
    return answer.result(0)["step"]


class TestServing:
    def test_nothing_is_served_where_that_is_not_asked_for(self, tmp_path, state_home):
        seen = []

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.extend(state_home.iterdir())

        trainer(tmp_path / "a", TrainerControlCallback(enable_http=False), Look()).train()
        assert seen == []

    def test_a_server_that_cannot_start_is_one_warning(self, tmp_path, caplog):
        jobs.make_jobs_directory().chmod(0o777)
        made = trainer(tmp_path / "a", TrainerControlCallback())
        assert made.train().global_step == 6
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "goes on without" in warnings[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"job_id": "../x"}, "is no id"), ({"host": "10.0.0.1"}, "is reached by other machines")],
    )
    def test_what_is_not_safe_is_refused(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "a", TrainerControlCallback(**options)).train()

    def test_a_training_that_fails_is_let_go_by_the_next(self, tmp_path):
        control = TrainerControlCallback(job_id="mine")

        class Failing(TrainerCallback):
            def on_step_end(self, args, state, trainer_control, **kwargs):
                raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            trainer(tmp_path / "a", control, Failing()).train()
        assert trainer(tmp_path / "a", control).train().global_step == 6
        assert jobs.list_jobs() == []


def train(folder, options, changes):
    torch.set_num_threads(1)
    control = TrainerControlCallback(**options)
    trainer(folder, control, Posting(control, {}, pace=0.002), max_steps=10**6, **changes).train()
    os._exit(0)


@pytest.fixture
def process(tmp_path):
    started = []

    def start(options, **changes):
        context = multiprocessing.get_context("fork")
        started.append(context.Process(target=train, args=(tmp_path / "a", options, changes)))
        started[-1].start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = jobs.list_jobs()
            if found and ask_status(target(found[0].endpoint))["samples_per_second"]:
                return started[-1], target(found[0].endpoint)
            time.sleep(0.01)
        raise AssertionError("it did not begin")

    yield start
    for one in started:
        one.kill()
        one.join()


@pytest.mark.parametrize(
    ("options", "logs"), [({"job_id": "mine"}, "steps"), ({"job_id": "mine", "port": 0}, "no")], ids=["socket", "tcp"]
)
@pytest.mark.parametrize(("command", "code"), [("stop", 0), ("abort", 3)])
def test_the_commands_on_a_process_that_trains(process, tmp_path, options, logs, command, code):
    started, found = process(options, logging_strategy=logs, logging_steps=1, eval_strategy="steps", eval_steps=10**6)
    status = ask_status(found)
    assert (status["job"], status["horizon"], status["run"]) == ("mine", 10**6, str(tmp_path / "a"))
    assert (status["loss"] is None) == (logs == "no")
    assert 0 < status["learning_rate"] <= 5e-5
    assert status["samples"] == 2 * status["step"]
    saved = ask(found, Command.SAVE)
    assert saved_steps(tmp_path / "a") == [saved["step"]]
    assert ask(found, Command.EVALUATE)["results"]["eval_loss"] > 0
    assert ask_status(found)["checkpoint"]["step"] == saved["step"]
    answer = ask(found, Command(command))
    started.join(30)
    assert started.exitcode == code
    assert answer["step"] > saved["step"]
    assert jobs.list_jobs() == []


def test_a_client_that_is_refused_is_told_why(process):
    _, found = process({})
    with pytest.raises(RefusedError, match="evaluate: this training evaluates nothing"):
        ask(found, Command.EVALUATE)
    assert threading.active_count() < 20


def trained_by_two(home, folder, logs):
    from forgather.ml.trainer import AccelTrainer, AccelTrainingArguments

    os.environ["XDG_STATE_HOME"] = home
    torch.set_num_threads(1)
    given = {"max_steps": 10**6, "save_strategy": "no", "logging_strategy": logs, "logging_steps": 1, "use_cpu": True}
    given |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    arguments = AccelTrainingArguments(folder, **given, eval_strategy="steps", eval_steps=10**6)
    control = TrainerControlCallback()
    callbacks = [control, Posting(control, {}, pace=0.002)]
    made = AccelTrainer(Model(), arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)
    try:
        return made.train().global_step
    except Aborted as aborted:
        return -aborted.step


@pytest.fixture(scope="module")
def pair():
    with processes(2) as pool:
        yield pool


@pytest.mark.parametrize("logs", ["steps", "no"])
@pytest.mark.parametrize("command", ["stop", "save-stop", "abort"])
def test_two_processes_act_at_the_same_step(pair, tmp_path, state_home, command, logs):
    ends, arguments = [], (str(state_home), str(tmp_path / "a"), logs)
    thread = threading.Thread(target=lambda: ends.extend(pair.run(trained_by_two, *arguments)))
    thread.start()
    while not jobs.list_jobs():
        assert thread.is_alive()
        time.sleep(0.01)
    found = target(jobs.find("a"))
    saved = ask(found, Command.SAVE)
    assert ask(found, Command.EVALUATE)["results"]["eval_loss"] > 0
    status = ask_status(found)
    assert (status["world_size"], status["samples"]) == (2, 4 * status["step"])
    answer = ask(found, Command(command))
    thread.join(60)
    step = answer["step"]
    assert ends == [step * (-1 if command == "abort" else 1)] * 2
    assert saved_steps(tmp_path / "a") == ([saved["step"], step] if command == "save-stop" else [saved["step"]])
    assert jobs.list_jobs() == []

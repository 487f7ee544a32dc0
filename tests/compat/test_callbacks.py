"""Callbacks: how they are called, against transformers' own; and what each built-in one does."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import trainer_callback as theirs

import forgather.ml
from forgather.ml.trainer import callbacks as ours
from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.callbacks import dispatch, json_logger
from forgather.ml.trainer.callbacks.base import EVENTS
from forgather.ml.trainer.callbacks.progress import shown
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState
from tests.compat.test_checkpoints import trainer

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path / "run"), logging_steps=2, use_cpu=True)


def values(control: Any) -> dict[str, bool]:
    return {flag: getattr(control, flag) for flag in FLAGS}


class Recorder(ours.TrainerCallback):
    """Writes down each event, with the flags that it saw and the keyword arguments."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.seen.append((name, values(control), sorted(kwargs)))


def overridden(base: type) -> type:
    """A class that overrides each event, on either library's base."""

    def method(name: str) -> Any:
        def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append((name, values(control), sorted(kwargs)))

        return call

    return type("Overridden", (base,), {"seen": [], **{name: method(name) for name in EVENTS}})


EXTRA = {"on_log": {"logs": {}}, "on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}}


def test_the_events_are_those_of_transformers() -> None:
    assert set(EVENTS) == {name for name in vars(theirs.TrainerCallback) if name.startswith("on_")}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_gets_the_arguments_and_flags_that_it_gets_there(event: str, args: TrainingArguments) -> None:
    records = []
    for library, control in ((ours, TrainerControl()), (theirs, theirs.TrainerControl())):
        for flag in FLAGS:
            setattr(control, flag, True)
        callback = overridden(library.TrainerCallback)()
        handler = library.CallbackHandler([library.DefaultFlowCallback(), callback], nn.Linear(1, 1), None, None, None)
        state = library.TrainerState(max_steps=9, global_step=1)
        getattr(handler, event)(args, state, control, **EXTRA.get(event, {}))
        records.append((callback.seen, values(control)))
    assert records[0] == records[1]
    assert [name for name, _, _ in records[0][0]] == [event]


@pytest.mark.parametrize("event", EXTRA)
def test_logs_and_metrics_are_taken_by_position_too(event: str, args: TrainingArguments) -> None:
    callback = overridden(ours.TrainerCallback)()
    handler = ours.CallbackHandler([ours.DefaultFlowCallback, callback])
    getattr(handler, event)(args, TrainerState(), TrainerControl(), {"loss": 1.0})
    assert set(EXTRA[event]) <= set(callback.seen[0][2])


def test_only_what_is_overridden_is_called() -> None:
    class Mine(ours.TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None: ...

    class Derived(Mine):
        pass

    class Ducks:  # neither library's
        def on_save(self, *_: Any, **__: Any) -> None: ...

    class ForTheirs(theirs.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None: ...

    def listening(callback: Any) -> set[str]:
        return {event for event in EVENTS if dispatch.overrides(callback, event)}

    assert listening(Mine()) == listening(Derived()) == {"on_log"}
    assert listening(Ducks()) == {"on_save"}
    assert listening(ForTheirs()) == {"on_step_end"}
    assert listening(ours.TrainerCallback()) == listening(theirs.TrainerCallback()) == set()
    patched = Mine()
    patched.on_evaluate = lambda *_, **__: None  # type: ignore[method-assign,assignment]  # as tests do
    assert listening(patched) == {"on_log", "on_evaluate"}


def test_an_event_that_nobody_overrides_calls_nothing(args: TrainingArguments) -> None:
    class Strict(ours.TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None: ...

    handler = ours.CallbackHandler([ours.DefaultFlowCallback, Strict()])
    assert not handler.listens("on_substep_end")
    assert handler.listens("on_log")
    control = TrainerControl()
    # That the arguments are not even bound shows that nobody was called.
    assert handler.call_event("on_substep_end", args, None, control, metrics=object()) is control


def test_callbacks_come_and_go_by_class_and_by_instance(caplog: pytest.LogCaptureFixture) -> None:
    handler = ours.CallbackHandler([ours.DefaultFlowCallback])
    handler.add_callback(ours.PrinterCallback)
    assert handler.callback_list == "DefaultFlowCallback\nPrinterCallback"
    assert not caplog.records
    again = ours.PrinterCallback()
    handler.add_callback(again)
    assert "there is one already" in caplog.text
    assert handler.pop_callback(again) is again
    assert type(handler.pop_callback(ours.PrinterCallback)) is ours.PrinterCallback
    assert handler.pop_callback(ours.PrinterCallback) is None
    handler.remove_callback(ours.PrinterCallback)
    with pytest.raises(ValueError, match="is not among the callbacks"):
        handler.remove_callback(again)
    assert handler.callback_list == "DefaultFlowCallback"


def test_a_class_of_transformers_stands_for_its_counterpart(caplog: pytest.LogCaptureFixture) -> None:
    """Scripts remove transformers' PrinterCallback and the like, which finds what stands in its place here."""
    integrations = importlib.import_module("transformers.integrations")
    notebook = type("NotebookProgressCallback", (), {"__module__": "transformers.utils.notebook"})  # it needs IPython

    class Mine(theirs.ProgressCallback): ...  # type: ignore[misc]  # it has no types

    mine = Mine()
    handler = ours.CallbackHandler(
        [ours.DefaultFlowCallback, ours.TBLogger(), ours.ProgressCallback, ours.PrinterCallback, mine]
    )
    assert handler.pop_callback(Mine) is mine
    handler.remove_callback(integrations.TensorBoardCallback)
    assert isinstance(handler.pop_callback(theirs.PrinterCallback), ours.PrinterCallback)
    assert handler.pop_callback(theirs.EarlyStoppingCallback) is None
    assert handler.pop_callback(theirs.PrinterCallback) is None
    assert not caplog.records
    handler.add_callback(theirs.ProgressCallback)
    assert "there is one already" in caplog.text
    handler.remove_callback(notebook)
    assert isinstance(handler.pop_callback(theirs.ProgressCallback), theirs.ProgressCallback)
    handler.remove_callback(theirs.DefaultFlowCallback)
    assert not handler.callbacks


def test_a_callback_that_is_added_while_running_is_called(args: TrainingArguments) -> None:
    handler = ours.CallbackHandler([ours.DefaultFlowCallback])
    handler.on_save(args, TrainerState(), TrainerControl())
    late = overridden(ours.TrainerCallback)()
    handler.callbacks.append(late)  # not by add_callback
    handler.on_save(args, TrainerState(), TrainerControl())
    assert [name for name, _, _ in late.seen] == ["on_save"]


def test_without_a_default_flow_there_is_a_warning_and_theirs_counts(caplog: pytest.LogCaptureFixture) -> None:
    ours.CallbackHandler([theirs.DefaultFlowCallback()])
    assert not caplog.records
    ours.CallbackHandler([ours.PrinterCallback()])
    assert "Without a DefaultFlowCallback" in caplog.text


def test_the_control_that_a_callback_returns_is_what_the_next_one_gets(args: TrainingArguments) -> None:
    class Replaces(ours.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
            return TrainerControl(should_epoch_stop=True)

    after = overridden(ours.TrainerCallback)()
    handler = ours.CallbackHandler([ours.DefaultFlowCallback, Replaces, after])
    answer = handler.on_step_end(args, TrainerState(max_steps=9), TrainerControl())
    assert answer.should_epoch_stop
    assert after.seen[0][1]["should_epoch_stop"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), OSError(2, "boom")], ids=repr)
def test_a_callback_that_raises_is_named_and_the_error_stays_what_it_was(
    error: Exception, args: TrainingArguments
) -> None:
    class Fails(ours.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise error

    handler = ours.CallbackHandler([ours.DefaultFlowCallback, Fails])
    with pytest.raises(type(error), match="boom") as caught:
        handler.on_step_end(args, TrainerState(max_steps=9), TrainerControl())
    assert caught.value is error
    told = str(error) + "".join(getattr(error, "__notes__", ()))
    assert "in the callback Fails, on_step_end" in told


FLOWS: list[dict[str, Any]] = [
    {},
    {"logging_steps": 2, "logging_first_step": True},
    {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch", "eval_delay": 2},
    {"logging_strategy": "no", "save_strategy": "no"},
    {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 4, "save_steps": 5},
    {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 6},
    {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best", "eval_delay": 99},
]


@pytest.mark.parametrize("given", FLOWS, ids=str)
def test_the_flow_is_that_of_transformers(given: dict[str, Any]) -> None:
    args = TrainingArguments("x", **given)
    for step in range(1, 12):
        for event, state_of in (("on_step_end", {"epoch": step / 4}), ("on_epoch_end", {"epoch": step})):
            controls = []
            for library in (ours, theirs):
                state = library.TrainerState(global_step=step, max_steps=11, **state_of)
                state.compute_steps(args, 11)
                control = library.TrainerControl()
                getattr(library.DefaultFlowCallback(), event)(args, state, control)
                controls.append(values(control))
            assert controls[0] == controls[1], (step, event)


@pytest.mark.parametrize(("greater", "threshold"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)])
def test_early_stopping_counts_as_there(greater: bool, threshold: float, args: TrainingArguments) -> None:
    args.metric_for_best_model, args.greater_is_better, args.eval_strategy = "score", greater, "epoch"
    args.load_best_model_at_end = True
    counts = []
    for library, kind in ((ours, ours.EarlyStoppingCallback), (theirs, transformers.EarlyStoppingCallback)):
        callback, control, best, counted = kind(3, threshold), library.TrainerControl(), None, []
        callback.on_train_begin(args, library.TrainerState(), control)
        for metric in (1.0, 0.9, 0.5, 0.8, 1.2, float("nan"), 1.6, 1.65, 0.1):
            callback.on_evaluate(args, library.TrainerState(best_metric=best), control, metrics={"eval_score": metric})
            counted.append((callback.early_stopping_patience_counter, control.should_training_stop))
            if best is None or (metric > best if greater else metric < best):
                best = metric
        counts.append(counted)
    assert counts[0] == counts[1]
    assert any(stopped for _, stopped in counts[0])


def test_early_stopping_refuses_arguments_under_which_it_would_do_nothing(
    args: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    callback = ours.EarlyStoppingCallback()
    with pytest.raises(AssertionError, match="metric_for_best_model"):
        callback.on_train_begin(args, TrainerState(), TrainerControl())
    args.metric_for_best_model = "loss"
    with pytest.raises(AssertionError, match="IntervalStrategy"):
        callback.on_train_begin(args, TrainerState(), TrainerControl())
    assert "without load_best_model_at_end=True" in caplog.text
    callback.on_evaluate(args, TrainerState(), TrainerControl(), metrics={"eval_f1": 1.0})
    assert "did not find eval_loss so early stopping is disabled" in caplog.text


def test_the_printer_prints_as_there(capsys: pytest.CaptureFixture[str], args: TrainingArguments) -> None:
    logs = {"loss": 1.23456, "total_flos": 1.0, "note": "x" * 200, "epoch": 1}
    printed = []
    for library in (ours, theirs):
        given = dict(logs)
        library.PrinterCallback().on_log(args, library.TrainerState(), library.TrainerControl(), logs=given)
        printed.append(capsys.readouterr().out)
        assert "total_flos" not in given
    assert printed[0] == printed[1]


def test_progress_draws_bars_and_writes_logs(capsys: pytest.CaptureFixture[str], args: TrainingArguments) -> None:
    callback, state, control = ours.ProgressCallback(max_str_len=5), TrainerState(max_steps=4), TrainerControl()
    state.global_step = 1  # resumed
    callback.on_train_begin(args, state, control)
    state.global_step = 3
    callback.on_step_end(args, state, control)
    assert (callback.training_bar.n, callback.training_bar.total) == (3, 4)
    callback.on_log(args, state, control, logs={"loss": 1.23456, "total_flos": 1.0, "note": "x" * 9})
    callback.on_prediction_step(args, state, control, eval_dataloader=[1, 2])
    callback.on_prediction_step(args, state, control, eval_dataloader=[1, 2])
    assert (callback.prediction_bar.n, callback.prediction_bar.total) == (2, 2)
    callback.on_evaluate(args, state, control)
    callback.on_prediction_step(args, state, control, eval_dataloader=iter([1]))  # of no known length
    assert callback.prediction_bar is None
    callback.on_train_end(args, state, control)
    written = capsys.readouterr()
    assert "{'loss': '1.235', 'note': '[String too long to display, length: 9 > 5." in written.out + written.err
    assert "total_flos" not in written.out + written.err
    assert shown({"n": 1, "text": "abc", "x": 0.000123456}) == {"n": 1, "text": "abc", "x": "0.0001235"}


def test_other_processes_draw_and_print_nothing(capsys: pytest.CaptureFixture[str], args: TrainingArguments) -> None:
    state = TrainerState(max_steps=4, is_world_process_zero=False, is_local_process_zero=False)
    built_in = [ours.ProgressCallback(), ours.PrinterCallback(), ours.InfoCallback(), ours.TBLogger()]
    built_in += [ours.JsonLogger(), ours.ProfilerCallback(), ours.GradLogger(log_steps=1)]
    handler = ours.CallbackHandler([ours.DefaultFlowCallback(), *built_in], model=nn.Linear(1, 1))
    for event in ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_prediction_step", "on_train_end"):
        getattr(handler, event)(args, state, TrainerControl())
    handler.on_log(args, state, TrainerControl(), {"loss": 1.0})
    handler.on_evaluate(args, state, TrainerControl(), {"eval_loss": 1.0})
    assert capsys.readouterr() == ("", "")
    assert not Path(args.output_dir or "").exists()


def test_information_says_how_large_things_are(args: TrainingArguments) -> None:
    stream, model = io.StringIO(), nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 2))
    model[0].requires_grad_(False)
    loader = torch.utils.data.DataLoader(range(1234), batch_size=8)  # type: ignore[arg-type,var-annotated]  # a range
    args.gradient_accumulation_steps = 2
    state = TrainerState(max_steps=77, num_train_epochs=3)
    ours.InfoCallback(output_stream=stream).on_train_begin(
        args, state, TrainerControl(), model=model, train_dataloader=loader
    )
    lines = [line.split("  ") for line in stream.getvalue().splitlines()]
    told = {parts[0]: parts[-1].strip() for parts in lines}
    assert (told["parameters"], told["trained parameters"], told["training samples"]) == ("1,302", "202", "1,234")
    assert told["samples in an update"].startswith("16 = 8 a batch x 2 accumulated")
    ours.InfoCallback(verbose=True, output_stream=stream).on_train_begin(args, state, TrainerControl(), model=model)
    assert "Linear(in_features=10" in stream.getvalue()
    assert "learning_rate=5e-05" in stream.getvalue()
    assert "not known" in stream.getvalue()


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_tags_of_transformers(args: TrainingArguments, tmp_path: Path) -> None:
    callback, control = ours.TBLogger(job="a"), TrainerControl()
    args.logging_dir = str(tmp_path / "tb")
    callback.on_train_begin(args, TrainerState(), control, model=nn.Linear(1, 1))
    callback.on_log(args, TrainerState(global_step=2), control, logs={"loss": 0.0, "eval_f1": 0.5, "note": "text"})
    callback.on_log(args, TrainerState(global_step=4), control, logs={"loss": 1.0, "test_f1": 0.25})
    callback.on_train_end(args, TrainerState(), control)
    assert scalars(tmp_path / "tb") == {
        "train/loss": [(2, 0.0), (4, 1.0)],
        "eval/f1": [(2, 0.5)],
        "test/f1": [(4, 0.25)],
    }
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"args/text_summary", "job/text_summary", "train/note/text_summary"} <= set(events.Tags()["tensors"])
    # A run that is resumed at step 2 hides what came after it.
    callback.on_train_begin(args, TrainerState(global_step=2), control, model=None)
    callback.on_log(args, TrainerState(global_step=3), control, logs={"loss": 9.0})
    callback.on_train_end(args, TrainerState(), control)
    assert scalars(tmp_path / "tb")["train/loss"] == [(2, 0.0), (3, 9.0)]


def test_tensorboard_writes_what_it_is_told_to_and_leaves_a_given_writer_open(args: TrainingArguments) -> None:
    class Writer:
        def __init__(self) -> None:
            self.written: list[Any] = []

        def add_scalar(self, *one: Any) -> None:
            self.written.append(one)

        def add_text(self, *one: Any) -> None: ...

        def flush(self) -> None: ...

    writer = Writer()
    callback = ours.TBLogger(writer, scalars=[("loss", "L"), ("learning_rate", "LR x 1000", lambda rate: rate * 1000)])
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    logs = {"loss": 1.0, "learning_rate": 0.5, "epoch": 1.0}
    callback.on_log(args, TrainerState(global_step=3), TrainerControl(), logs=logs)
    callback.on_train_end(args, TrainerState(), TrainerControl())  # would fail: it has no close()
    assert writer.written == [("L", 1.0, 3), ("LR x 1000", 500.0, 3)]


def test_where_logs_go(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgather.ml.trainer.callbacks.place import logging_dir

    assert logging_dir(args).parent == Path(args.output_dir or "", "runs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    assert logging_dir(args) == Path("elsewhere")
    args.logging_dir = "here"
    assert logging_dir(args) == Path("here")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / json_logger.NAME


def append(log: Path, *steps: int, begin: int | None = None, **meta: Any) -> None:
    callback, args = ours.JsonLogger(log, clock=lambda: 5.0, **meta), TrainingArguments("x")
    if begin is not None:
        callback.on_train_begin(args, TrainerState(global_step=begin), TrainerControl())
    for step in steps:
        state = TrainerState(global_step=step, epoch=step / 4)
        callback.on_log(args, state, TrainerControl(), logs={"loss": 1.0 / step})


def logged(log: Path) -> list[int]:
    return [one["global_step"] for one in json.loads(log.read_text())]


def test_json_logs_are_a_list_that_is_whole_after_each_log(log: Path) -> None:
    append(log, begin=0, name="a")
    assert json.loads(log.read_text()) == [{"timestamp": 5.0, "global_step": 0, "epoch": 0, "name": "a"}]
    append(log, 1)
    append(log, 2, 4)
    assert logged(log) == [0, 1, 2, 4]
    assert json.loads(log.read_text())[-1] == {"timestamp": 5.0, "global_step": 4, "epoch": 1.0, "loss": 0.25}


def test_json_logs_begin_anew_or_where_a_run_is_resumed(log: Path) -> None:
    append(log, 2, 4, 6, begin=0)
    append(log, 5, begin=4)
    assert logged(log) == [2, 4, 5]
    append(log, 3, begin=0)
    assert logged(log) == [3]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_log_that_a_kill_cut_off_goes(log: Path, cut: int) -> None:
    append(log, 2, 4, begin=0)
    content = log.read_bytes()
    log.write_bytes(content[:-cut])
    append(log, 6)
    assert logged(log) in ([2, 4, 6], [2, 6])
    log.write_bytes(content[:-cut])
    append(log, 6, begin=4)
    assert logged(log)[0] == 2
    assert logged(log)[-1] == 6


def test_what_json_does_not_hold_becomes_text(log: Path) -> None:
    import numpy as np

    callback = ours.JsonLogger(log)
    logs = {"loss": float("nan"), "n": np.float32(0.5), "t": torch.tensor(2), "many": torch.ones(2), "o": {"a": (1, 2)}}
    callback.on_log(TrainingArguments("x"), TrainerState(), TrainerControl(), logs=logs)
    (found,) = json_logger.read(log)
    assert (found["loss"], found["n"], found["t"], found["o"]) == ("nan", 0.5, 2, {"a": [1, 2]})
    assert found["many"] == [1.0, 1.0]


def test_a_file_of_something_else_is_not_touched(log: Path) -> None:
    log.parent.mkdir()
    log.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="is no file of a JsonLogger"):
        append(log, 1)
    assert log.read_text() == '{"mine": 1}'


class Words:
    """A tokenizer of letters, as far as it is used."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[ord(letter) % 16 for letter in text]])
        return transformers.BatchEncoding({"input_ids": ids})

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return "".join(chr(97 + int(one)) for one in ids)


def test_text_is_generated_after_evaluations_and_nothing_of_the_run_is_changed(
    args: TrainingArguments, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    model.train()
    model.lm_head.eval()
    (tmp_path / "prompts.yaml").write_text("- ab\n- cde\n")
    sampled = {"do_sample": True, "pad_token_id": 0}
    callback = ours.TextgenCallback(None, tmp_path / "prompts.yaml", sampled, generation_steps=5, max_new_tokens=3)
    before = torch.random.get_rng_state()
    for step in (2, 4, 7):
        state = TrainerState(global_step=step)
        callback.on_evaluate(args, state, TrainerControl(), model=model, processing_class=Words())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (model.training, model.lm_head.training) == (True, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"step {step}, prompt {number}" for step in (2, 7) for number in (0, 1)
    ]
    assert [len(line.split(": ")[1]) for line in lines] == [5, 6, 5, 6]
    assert lines[0].split(": ")[1] == lines[2].split(": ")[1]  # the same model, the same seed
    with pytest.raises(ValueError, match=r"Trainer\(processing_class=tokenizer\)"):
        ours.TextgenCallback(prompts=["a"]).on_evaluate(args, TrainerState(), TrainerControl(), model=model)
    (tmp_path / "prompts.yaml").write_text("text: ab\n")
    with pytest.raises(ValueError, match="expected a YAML file with a list of texts"):
        ours.TextgenCallback(prompts=str(tmp_path / "prompts.yaml"))


def test_gradients_are_written_parameter_by_parameter(args: TrainingArguments, tmp_path: Path) -> None:
    args.logging_dir = str(tmp_path / "tb")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.LayerNorm(1))
    callback = ours.GradLogger(neg_re="bias", pos_re=r"^[02]")
    model(torch.ones(1, 2)).sum().backward()
    model[0].weight.data.fill_(3.0)
    model[0].weight.grad = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    for step in range(4):  # the first is update 1, and logging_steps is 2
        callback.on_pre_optimizer_step(
            args, TrainerState(global_step=step, logging_steps=2), TrainerControl(), model=model
        )
    callback.on_train_end(args, TrainerState(), TrainerControl())
    found = scalars(tmp_path / "tb")
    assert found.keys() == {f"{kind}_rms/{name}" for kind in ("weight", "grad") for name in ("0.weight", "2.weight")}
    assert found["weight_rms/0.weight"] == [(2, 3.0), (4, 3.0)]
    assert found["grad_rms/0.weight"] == [(2, 1.0), (4, 1.0)]


def test_memory_is_added_to_the_logs(args: TrainingArguments) -> None:
    callback, logs = ours.PeakMemory(), {"loss": 1.0}
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    callback.on_log(args, TrainerState(), TrainerControl(), logs=logs)
    assert logs["peak_mem_allocated"] > 2**20  # a process with torch in it


def test_the_profiler_writes_a_trace_of_the_steps_that_are_asked_for(args: TrainingArguments, tmp_path: Path) -> None:
    callback, state = ours.ProfilerCallback(tmp_path / "traces", wait=1, warmup=1, active=2), TrainerState()
    callback.on_train_begin(args, state, TrainerControl())
    for step in range(6):
        torch.ones(3).sum()
        state.global_step = step + 1
        callback.on_step_end(args, state, TrainerControl())
    callback.on_train_end(args, state, TrainerControl())
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "trace-4.json"
    assert any(event.get("name") == "aten::sum" for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.parametrize("action", ["stop", "abort"])
def test_a_loss_that_runs_away_stops_the_run(
    action: str, args: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    callback = ours.DivergenceDetector(threshold=2.0, action=action)
    control = TrainerControl(should_save=True)
    for step, loss in enumerate([5.0, 4.0, 3.0, 3.5, 3.0, 4.0, 5.0]):
        callback.on_log(args, TrainerState(global_step=step), control, logs={"loss": loss, "epoch": 1})
    callback.on_log(args, TrainerState(global_step=7), control, logs={"eval_loss": 99.0})
    assert not control.should_training_stop
    again = ours.DivergenceDetector.from_state(json.loads(json.dumps(callback.state())))
    assert vars(again) == vars(callback)
    again.on_log(args, TrainerState(global_step=8), control, logs={"loss": 12.0})
    assert (control.should_training_stop, control.should_save, again.diverged_at) == (True, action == "stop", 8)
    assert "step 8: loss=12.0: diverged" in caplog.text


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize(("action", "saved"), [("stop", ["checkpoint-2"]), ("abort", [])])
def test_an_abort_saves_nothing_at_the_end_of_the_epoch_either(
    action: str, saved: list[str], strategy: str, tmp_path: Path
) -> None:
    class Jumps(ours.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logs["loss"] = 9.0 if state.global_step == 2 else 1.0

    made = trainer(
        forgather.ml, tmp_path, callbacks=[Jumps(), ours.DivergenceDetector(action=action)],
        save_strategy=strategy, save_steps=2, max_steps=12,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved


def test_a_loss_that_is_not_finite_is_divergence(args: TrainingArguments) -> None:
    control = TrainerControl()
    ours.DivergenceDetector().on_log(args, TrainerState(), control, logs={"loss": float("nan")})
    assert control.should_training_stop


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"action": "pray"}, "action='pray' is not one of 'stop', 'abort'"),
        ({"long_alpha": 0.9}, "expected 0 < long_alpha"),
    ],
    ids=str,
)
def test_a_detector_that_could_not_work_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.DivergenceDetector(**given)


def test_transformers_own_callbacks_run_as_they_are(
    args: TrainingArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args.metric_for_best_model, args.greater_is_better, args.eval_strategy = "loss", False, "steps"
    args.load_best_model_at_end = True
    stopping = transformers.EarlyStoppingCallback(2)
    built_in = [theirs.DefaultFlowCallback(), TensorBoardCallback(), stopping, theirs.PrinterCallback()]
    handler = ours.CallbackHandler([*built_in, theirs.ProgressCallback()], model=nn.Linear(1, 1))
    handler.eval_dataloader = [1, 2]
    state, control = TrainerState(max_steps=9, eval_steps=1, best_metric=0.0), TrainerControl()
    handler.on_train_begin(args, state, control)
    for step in range(1, 4):
        state.global_step = step
        control = handler.on_step_begin(args, state, control)
        control = handler.on_step_end(args, state, control)
        assert control.should_evaluate
        control = handler.on_log(args, state, control, {"loss": 1.0 / step, "total_flos": 1.0})
        control = handler.on_prediction_step(args, state, control)
        control = handler.on_evaluate(args, state, control, {"eval_loss": 1.0})
    handler.on_train_end(args, state, control)
    assert (stopping.early_stopping_patience_counter, control.should_training_stop) == (3, True)
    assert [step for step, _ in scalars(tmp_path / "tb")["train/loss"]] == [1, 2, 3]
    assert "'loss': '0.3333'" in capsys.readouterr().out
    saved = TrainerState(stateful_callbacks=[stopping])  # type: ignore[arg-type]  # it is exported
    assert saved.stateful_callbacks["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 3}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        predicted = self.linear(x)[:, 0]
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def test_transformers_trainer_runs_our_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [{"x": torch.ones(2) * i, "labels": torch.tensor(float(i))} for i in range(8)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, eval_strategy="steps", save_strategy="no", use_cpu=True
    )
    args.metric_for_best_model, args.greater_is_better = "loss", False
    log = ours.JsonLogger(tmp_path / "log.json")
    built_in = [ours.PeakMemory(), log, ours.TBLogger(), ours.EarlyStoppingCallback(9), ours.DivergenceDetector()]
    built_in += [ours.InfoCallback(), ours.ProfilerCallback(), ours.GradLogger(log_steps=1)]
    trainer = transformers.Trainer(Regression(), args, train_dataset=data, eval_dataset=data, callbacks=built_in)
    trainer.train()
    logs = json_logger.read(tmp_path / "log.json")
    assert [one["loss"] for one in logs if "loss" in one] == [
        one["loss"] for one in trainer.state.log_history if "loss" in one
    ]
    assert all("peak_mem_allocated" in one for one in logs)
    assert "trained parameters" in capsys.readouterr().out

"""What is logged, and when: the values of transformers, and nan where there is nan."""

import io
import json
import logging

import pytest
import torch
import transformers
from torch import nn

import forgather.ml as ours
from forgather.ml.trainer.messages import LOGGERS
from forgather_fn.state import NonFiniteError
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import MODELS, Regression, gpt2, rows

BOTH = (ours, transformers)
PLAIN = {"save_strategy": "no"}
TIMES = ("runtime", "per_second")


def same_logs(tmp_path, kind="regression", rel=1e-5, **options):
    found = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, kind, **{**PLAIN, **options})
        output = made.train()
        found.append((made.state.log_history, output.metrics, made))
    (mine, metrics, one), (theirs, their_metrics, _) = found
    assert [set(log) for log in mine] == [set(log) for log in theirs]
    for a, b in zip([*mine, metrics], [*theirs, their_metrics], strict=True):
        assert set(a) == set(b)
        for name in a:
            if not any(word in name for word in TIMES):
                assert a[name] == pytest.approx(b[name], rel=rel), name
    return one


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 4},
        {"logging_steps": 0.5},
        {"logging_steps": 4, "logging_first_step": True},
        {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"logging_strategy": "no"},
        {"max_grad_norm": 0.0},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 2},
    ],
    ids=str,
)
def test_logs_are_those_of_transformers(options, tmp_path):
    same_logs(tmp_path, **options)


@pytest.mark.parametrize("kind", ["all", "non_padding", True])
def test_tokens_are_counted(kind, tmp_path):
    made = same_logs(tmp_path, "llama", include_num_input_tokens_seen=kind)
    assert made.state.num_input_tokens_seen == 6 * 4 * 7 - 2 * 7


def test_operations_are_counted(tmp_path):
    made = same_logs(tmp_path, "llama")
    assert made.state.total_flos > 0


def test_metrics_are_written_and_shown(tmp_path, capsys):
    texts = []
    for library in BOTH:
        made = trainer(library, tmp_path / library.__name__, **PLAIN)
        metrics = {"train_loss": 0.123456, "train_runtime": 61.5, "total_flos": 3.0e9, "epoch": 2.0, "samples": 7}
        made.save_metrics("train", metrics)
        made.save_metrics("eval", {"eval_loss": 1.0})
        capsys.readouterr()
        made.log_metrics("train", metrics)
        folder = tmp_path / library.__name__
        names = ("train_results.json", "eval_results.json", "all_results.json")
        texts.append((capsys.readouterr().out, [(folder / name).read_text() for name in names]))
    assert texts[0] == texts[1]
    assert json.loads(texts[0][1][2])["eval_loss"] == 1.0


class Breaks(Regression):
    """Gives nan at its third forward pass in training."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, labels=None):
        found = super().forward(x, labels)
        if self.training:
            self.calls += 1
            if self.calls == 3:
                found["loss"] = found["loss"] * torch.nan
        return found


def broken(library, folder, **options):
    torch.manual_seed(0)
    return trainer(library, folder, model=Breaks(), **{**PLAIN, **options})


def test_a_nan_is_shown_and_stops_the_run(tmp_path):
    made = broken(ours, tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 2 \(the 3rd\): ") as caught:
        made.train()
    assert 'give on_nonfinite="skip"' in "".join(caught.value.__notes__)
    last = made.state.log_history[-1]
    assert last["loss"] != last["loss"]
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


@pytest.mark.parametrize("filtered", [True, False])
def test_where_training_goes_on_the_filter_does_what_it_does_in_transformers(filtered, tmp_path):
    logs = []
    for library in BOTH:
        skips = {"on_nonfinite": "skip"} if library is ours else {}
        made = broken(library, tmp_path, logging_nan_inf_filter=filtered, logging_steps=1, **skips)
        made.train()
        assert made.state.global_step == 6
        logs.append([log["loss"] for log in made.state.log_history if "loss" in log])
    mine, theirs = logs
    assert mine[:2] == pytest.approx(theirs[:2], rel=1e-6)
    assert mine[2] == pytest.approx(theirs[2], nan_ok=True)
    # transformers goes on with weights that are nan; here the step is left out.
    assert all(loss == loss for loss in mine[3:])


def test_a_nan_in_halves_stops_the_run_as_well(tmp_path):
    class Looks(ours.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pass

    made = broken(ours, tmp_path)
    made.add_callback(Looks())
    with pytest.raises(NonFiniteError):
        made.train()
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


def test_the_dict_that_is_logged_is_the_one_that_is_returned(tmp_path):
    class Pops(ours.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs.pop("total_flos", None)
            assert "step" not in logs

    made = trainer(ours, tmp_path, callbacks=[Pops()], **PLAIN)
    assert "total_flos" not in made.train().metrics


class Words(nn.Module):
    """A language model that is given no number of items: its mean over no labels is nan."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(23, 23)

    def forward(self, input_ids, labels=None):
        logits = self.embed(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.reshape(-1, 23), labels.reshape(-1)), "logits": logits}


class Looks(ours.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass


def partly_labelled(folder, model, looks, accumulate, labelled, callbacks=(), **options):
    """Make a trainer whose samples after the first so many have no labels."""
    data = rows("llama", 8, ragged=False)
    for row in data[labelled:]:
        row["labels"] = torch.full((7,), -100)
    made = trainer(
        ours, folder, "llama", model=model, callbacks=[*([Looks()] if looks else []), *callbacks],
        train_sampling_strategy="sequential", per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate, **{**PLAIN, "max_steps": 2, **options},
    )  # fmt: skip
    made.train_dataset = made.eval_dataset = data
    return made


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
def test_a_step_without_labels_moves_nothing_where_its_loss_is_a_sum_of_none(looks, accumulate, tmp_path):
    class Sees(ours.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])

    seen = []
    made = partly_labelled(tmp_path, None, looks, accumulate, 4, callbacks=[Sees()], optim="sgd")
    made.train()
    first, second = (log["loss"] for log in made.state.log_history if "loss" in log)
    assert first > 0
    assert second == 0.0
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
def test_a_step_without_labels_is_refused_where_its_loss_is_a_mean_of_none(looks, accumulate, tmp_path):
    """Such a mean is nan, which must not be logged as 0 while weight decay goes on."""
    made = partly_labelled(tmp_path, Words(), looks, accumulate, 4)
    with pytest.raises(NonFiniteError, match=r"step 1 \(the 2nd\): "):
        made.train()
    first, last = (log["loss"] for log in made.state.log_history if "loss" in log)
    assert first > 0
    assert last != last
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
def test_a_microbatch_without_labels_counts_for_nothing(looks, tmp_path):
    found = []
    for accumulate in (1, 2):
        made = partly_labelled(tmp_path / str(accumulate), Words(), looks, accumulate, 2, max_steps=1)
        made.train()
        found.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("skips", [{}, {"on_nonfinite": "skip"}], ids=["raise", "skip"])
def test_an_evaluation_without_labels_gives_nan(skips, tmp_path):
    for kind, model in (("words", Words()), ("llama", None)):
        metrics = partly_labelled(tmp_path / kind, model, False, 1, 0, **skips).evaluate()
        assert metrics["eval_loss"] != metrics["eval_loss"]


def test_label_smoothing_is_that_of_transformers(tmp_path):
    same_logs(tmp_path, "llama", label_smoothing_factor=0.1)
    same_logs(tmp_path / "more", "bert", label_smoothing_factor=0.2)
    same_logs(
        tmp_path / "gpt2", "gpt2", label_smoothing_factor=0.1
    )  # no kind of loss is named, and labels are shifted all the same


def test_a_subclass_of_a_language_model_is_smoothed_as_one(tmp_path):
    """transformers looks at the name of the class alone, and trains one with a name of its own to copy its input."""

    class Own(transformers.GPT2LMHeadModel):
        pass

    found = []
    for kind in (transformers.GPT2LMHeadModel, Own):
        made = trainer(ours, tmp_path, model=kind(gpt2().config), label_smoothing_factor=0.1, **PLAIN)
        made.model.load_state_dict(gpt2().state_dict())
        made.train_dataset = rows("gpt2")
        made.train()
        found.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert found[0] == found[1]


@pytest.mark.parametrize("library", BOTH)
def test_labels_of_several_classes_are_not_smoothed(library, tmp_path):
    model = MODELS["bert"]()
    model.config.problem_type = "multi_label_classification"
    with pytest.warns(UserWarning, match="not compatible with multi-label classification"):
        made = trainer(library, tmp_path, "bert", model=model, label_smoothing_factor=0.1)
    assert made.label_smoother is None


def test_label_smoothing_accumulates_exactly(tmp_path):
    found = []
    for accumulate, batch in ((1, 8), (4, 2)):
        made = trainer(
            ours, tmp_path, "bert", label_smoothing_factor=0.1, gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=batch, **PLAIN,
        )  # fmt: skip
        made.train()
        found.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "polynomial"])
def test_schedules_are_those_of_transformers(kind, tmp_path):
    same_logs(tmp_path, lr_scheduler_type=kind, warmup_steps=2)


def test_reduce_on_plateau_is_that_of_transformers(tmp_path):
    same_logs(
        tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1, max_steps=12,
        learning_rate=1.0, lr_scheduler_kwargs={"patience": 1, "factor": 0.5}, metric_for_best_model="loss",
    )  # fmt: skip


def test_memory_that_runs_out_lowers_the_batch_size(tmp_path):
    class Hungry(Regression):
        def forward(self, x, labels=None):
            if len(x) > 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate more")
            return super().forward(x, labels)

    sizes = []
    for library in BOTH:
        made = trainer(
            library, tmp_path, model=Hungry(), auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=3,
            **PLAIN,
        )  # fmt: skip
        made.train()
        sizes.append(made.state.train_batch_size)
    assert sizes[0] == sizes[1] == 5
    made = trainer(ours, tmp_path, model=Hungry(), per_device_train_batch_size=8, **PLAIN)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.train()


def test_debugging_names_the_module_that_overflows(tmp_path):
    class Overflows(nn.Module):
        def forward(self, x):
            return x * torch.inf

    made = trainer(ours, tmp_path, debug="underflow_overflow", **PLAIN)
    made.model.norm = Overflows()
    with pytest.raises(ValueError, match=r"inf/nan detected in the output of norm \(Overflows\)"):
        made.train()
    assert not any(child._forward_hooks for child in made.model.modules())


@pytest.mark.parametrize("level", ["info", "passive"])
@pytest.mark.parametrize("own", [False, True], ids=["no logging set up", "logging set up"])
def test_messages_of_the_level_that_is_asked_for_are_seen(level, own, tmp_path, monkeypatch, capsys):
    root, kept = logging.getLogger(), {name: logging.getLogger(name).level for name in LOGGERS}
    written = io.StringIO()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(written)] if own else [])
    try:
        made = trainer(ours, tmp_path, log_level=level, **PLAIN)
        made.train()
        made.train()
    finally:
        for name, before in kept.items():
            logging.getLogger(name).setLevel(before)
            logging.getLogger(name).handlers.clear()
    line = "  Num examples = 22\n"
    shown, others = capsys.readouterr().err, written.getvalue()
    assert shown.count(f"[forgather] {line}") == (2 if level == "info" and not own else 0)
    assert others.count(line) == (2 if level == "info" and own else 0)

"""Evaluation and prediction give what transformers gives, and the right mean."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import forgather.ml as ours
from tests.compat.tiny import MODELS, Recorder, rows

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
TIMES = ("runtime", "per_second", "preparation_time")
BOTH = pytest.mark.parametrize("library", [ours, transformers], ids=["ours", "theirs"])


def trainer(library, folder, kind="bert", *, cls=None, metrics=None, evaluated=None, **options):
    more = {name: options.pop(name) for name in ("preprocess_logits_for_metrics", "callbacks") if name in options}
    args = library.TrainingArguments(str(folder), **{**QUIET, "per_device_eval_batch_size": 4, **options})
    made = (cls or library.Trainer)(
        model=MODELS[kind](), args=args, train_dataset=rows(kind), compute_metrics=metrics,
        eval_dataset=rows(kind, 10, seed=2) if evaluated is None else evaluated, **more,
    )  # fmt: skip
    made.pop_callback(library.PrinterCallback)
    return made


def accuracy(prediction):
    logits, labels = prediction
    return {"accuracy": (np.argmax(logits, -1) == labels).mean(), "number": np.float64(len(labels))}


def both(tmp_path, run, **options):
    """Do the same with both libraries, and compare the dicts of numbers that come out."""
    one, other = (run(trainer(library, tmp_path / library.__name__, **options)) for library in (ours, transformers))
    assert set(one) == set(other)
    for name in one:
        if not any(word in name for word in TIMES):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    return one


@pytest.mark.parametrize("kind", MODELS)
def test_evaluate_gives_what_transformers_gives(kind, tmp_path):
    # Rows of equal weight: only then is the mean of transformers that over all labels.
    data = rows(kind, 8, seed=2, ragged=False)
    both(tmp_path, lambda t: t.evaluate(), kind=kind, evaluated=data)
    both(tmp_path, lambda t: (t.evaluate(), t.evaluate(data[:5], metric_key_prefix="more"))[1], kind=kind)


def test_metrics_are_computed_of_predictions_and_labels(tmp_path):
    found = both(tmp_path, lambda t: t.evaluate(), metrics=accuracy)
    assert type(found["eval_accuracy"]) is float


def test_a_dict_of_sets_is_evaluated_one_by_one(tmp_path):
    sets = {"one": rows("bert", 8, seed=2), "two": rows("bert", 6, seed=3)}
    found = both(tmp_path, lambda t: t.evaluate(), metrics=accuracy, evaluated=sets)
    assert {"eval_one_loss", "eval_two_accuracy"} <= set(found)
    both(tmp_path, lambda t: t.evaluate(eval_dataset={"three": sets["one"]}))
    logs = []
    for library in (ours, transformers):
        made = trainer(library, tmp_path, evaluated=sets, eval_strategy="steps", eval_steps=2, max_steps=4)
        made.train()
        logs.append([set(log) for log in made.state.log_history])
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_accumulation_steps": 2},
        {"prediction_loss_only": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"eval_do_concat_batches": False},
    ],
    ids=str,
)
def test_predict_gives_what_transformers_gives(options, tmp_path):
    outputs = []
    for library in (ours, transformers):
        made = trainer(library, tmp_path, **options)
        outputs.append(made.predict(rows("bert", 9, seed=4)))
        assert made.state.log_history == []
    one, other = outputs
    assert set(one.metrics) == set(other.metrics)
    assert type(one.predictions) is type(other.predictions)
    if one.predictions is None:
        assert one.label_ids is other.label_ids is None
        return
    mine, theirs = (out.predictions if isinstance(out.predictions, list) else [out.predictions] for out in outputs)
    assert [part.shape for part in mine] == [part.shape for part in theirs]
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_equal(one.label_ids, other.label_ids)


def test_sequences_of_unequal_length_are_padded(tmp_path):
    def collate(samples):
        width = max(len(sample["input_ids"]) for sample in samples)
        pad = lambda row, value: nn.functional.pad(row, (0, width - len(row)), value=value)  # noqa: E731
        return {
            "input_ids": torch.stack([pad(sample["input_ids"], 0) for sample in samples]),
            "labels": torch.stack([pad(sample["labels"], -100) for sample in samples]),
        }

    data = [{name: value[: 3 + i % 4] for name, value in row.items()} for i, row in enumerate(rows("llama", 9))]
    outputs = []
    for library in (ours, transformers):
        made = trainer(library, tmp_path, "llama")
        made.data_collator = collate
        outputs.append(made.predict(data))
    assert outputs[0].predictions.shape == outputs[1].predictions.shape == (9, 6, 23)
    np.testing.assert_allclose(outputs[0].predictions, outputs[1].predictions, rtol=1e-5, atol=1e-6)
    np.testing.assert_equal(outputs[0].label_ids, outputs[1].label_ids)


def test_data_without_labels_are_predicted(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows("bert", 6)]
    outputs = [trainer(library, tmp_path).predict(data) for library in (ours, transformers)]
    assert outputs[0].label_ids is None
    assert set(outputs[0].metrics) == set(outputs[1].metrics)
    np.testing.assert_allclose(outputs[0].predictions, outputs[1].predictions, rtol=1e-5)


@BOTH
def test_metrics_may_want_inputs_and_losses(library, tmp_path):
    def metrics(prediction):
        predictions, labels, inputs, losses = prediction
        assert prediction.inputs is inputs
        assert predictions.shape[0] == labels.shape[0] == inputs.shape[0] == 10
        return {"inputs": inputs.shape[1], "losses": losses.mean()}

    made = trainer(library, tmp_path, metrics=metrics, include_for_metrics=["inputs", "loss"])
    assert made.evaluate()["eval_inputs"] == 7


@BOTH
def test_metrics_may_be_computed_batch_by_batch(library, tmp_path):
    seen = []

    def metrics(prediction, compute_result=False):
        seen.append((prediction.predictions.shape[0], compute_result))
        return {"batches": len(seen)} if compute_result else {}

    made = trainer(library, tmp_path, metrics=metrics, batch_eval_metrics=True)
    assert made.evaluate()["eval_batches"] == 3
    assert seen == [(4, False), (4, False), (2, True)]


@BOTH
def test_logits_may_be_reduced_first(library, tmp_path):
    made = trainer(
        library,
        tmp_path,
        metrics=lambda p: {"equal": (p.predictions == p.label_ids).mean()},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert 0 <= made.evaluate()["eval_equal"] <= 1


def test_the_loss_is_the_mean_over_labels_whatever_the_batch_size(tmp_path):
    found = [
        trainer(ours, tmp_path, "llama", per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for size in (1, 3, 4, 10)
    ]
    model = MODELS["llama"]().eval()
    data = rows("llama", 10, seed=2)
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in data])).logits[:, :-1]
    labels = torch.stack([row["labels"] for row in data])[:, 1:]
    expected = nn.functional.cross_entropy(logits.reshape(-1, 23), labels.reshape(-1)).item()
    assert found == pytest.approx([expected] * 4, rel=1e-6)


def test_events_of_evaluation_are_those_of_transformers(tmp_path):
    seen = []
    for library in (ours, transformers):
        recorder = Recorder()
        made = trainer(library, tmp_path, callbacks=[recorder])
        made.evaluate()
        made.predict(rows("bert", 5))
        made.train()
        made.evaluate()
        seen.append(recorder.seen)
        assert ("eval_model_preparation_time" in made.evaluate()) is True
    assert seen[0] == seen[1]


def test_the_time_to_prepare_is_told_where_nothing_was_trained(tmp_path):
    for library in (ours, transformers):
        made = trainer(library, tmp_path, max_steps=1)
        made.train()
        assert "eval_model_preparation_time" not in made.evaluate()


def test_predictions_are_not_kept_where_nothing_needs_them(tmp_path):
    class Looks(ours.Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            assert prediction_loss_only
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    trainer(ours, tmp_path, cls=Looks).evaluate()


def test_an_evaluation_may_be_cut_short(tmp_path):
    made = trainer(ours, tmp_path, metrics=accuracy, max_eval_steps=2)
    assert made.evaluate()["eval_number"] == 8


def test_metrics_that_are_no_dict_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics must return a dict"):
        trainer(ours, tmp_path, metrics=lambda prediction: 1.0).evaluate()


def test_an_override_that_takes_any_keyword_gets_the_number_of_items(tmp_path):
    def make(base):
        class Own(base):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                self.seen = float(kwargs["num_items_in_batch"])
                return super().compute_loss(model, inputs, return_outputs, **kwargs)

        return Own

    data, found = rows("gpt2", 8, seed=2, ragged=False), []
    for library in (ours, transformers):
        made = trainer(library, tmp_path, "gpt2", cls=make(library.Trainer), evaluated=data)
        found.append((made.evaluate()["eval_loss"], made.seen))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("looks", [False, True], ids=["whole", "halves"])
def test_the_model_stays_in_evaluation_mode_until_the_next_step(looks, tmp_path):
    """A callback that samples, and code after train(), must not get dropout; every step enters training mode."""
    events = ("on_evaluate", "on_log", "on_save", "on_step_begin", "on_step_end", "on_epoch_end", "on_train_end")

    def watched(library):
        seen = []

        class Looks(library.TrainerCallback):
            if looks:

                def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                    seen.append(("on_pre_optimizer_step", model.training, model.hidden.training))

        def look(event):
            def looked(self, args, state, control, model, **kwargs):
                seen.append((event, model.training, model.hidden.training))

            return looked

        for event in events:
            setattr(Looks, event, look(event))
        options = {
            "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "steps",
            "save_steps": 2,
        }  # fmt: skip
        made = trainer(library, tmp_path / library.__name__, "regression", callbacks=[Looks()], **options)
        made.model.register_forward_pre_hook(lambda model, inputs: seen.append(("forward", model.training)))
        made.train()
        return [*seen, ("afterwards", made.model.training)]

    one, other = (watched(library) for library in (ours, transformers))
    assert one == other
    assert ("on_evaluate", False, False) in one
    assert one[-1] == ("afterwards", False)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_metric_gives_the_mean_of_batch_means_that_transformers_gives(batch, tmp_path):
    """With batches of one sample, each row counts the same; the loss itself is the mean over labels."""

    def mean_of_means(prediction):
        return {"loss": prediction.losses.mean()}

    data, found = rows("llama", 10, seed=2), []
    for library, metrics in ((ours, mean_of_means), (transformers, None), (ours, None)):
        options = {"per_device_eval_batch_size": batch, "include_for_metrics": ["loss"] if metrics else []}
        made = trainer(library, tmp_path, "llama", metrics=metrics, evaluated=data, **options)
        found.append(made.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert abs(found[2] - found[0]) > 1e-4
    if batch == 1:
        each = [made.model(**{name: value[None] for name, value in row.items()}).loss.item() for row in data]
        assert found[0] == pytest.approx(np.mean(each), rel=1e-6)


@pytest.mark.parametrize("library", [ours, transformers], ids=["ours", "theirs"])
def test_a_model_that_names_no_kind_of_loss_is_divided_by_labels_that_it_does_not_predict(library, tmp_path):
    data = rows("gpt2", 8, ragged=False)  # of 7 labels, 6 are predicted
    options = {"evaluated": data, "max_steps": 1, "logging_steps": 1}
    made = trainer(library, tmp_path, "gpt2", **options)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    expected = made.model(**batch).loss.item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected * 6 / 7, rel=1e-5)
    model = MODELS["gpt2"]()
    model.loss_type = "ForCausalLM"
    args = library.TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, **QUIET)
    made = library.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)

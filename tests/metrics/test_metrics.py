"""Metrics against those of scikit-learn, in evaluations and beside losses."""

import math

import pytest
import torch
from torch.nn import functional as F

import forgather_fn as ff
from tests.toys import program

CLASSES = 5
DRAW = torch.Generator().manual_seed(1)
LOGITS = torch.randn(40, CLASSES, generator=DRAW)
LABELS = torch.randint(0, CLASSES - 1, (40,), generator=DRAW)  # the last class is never a target
LABELS[3:9] = -100
KEPT, TRUE = LOGITS[LABELS != -100], LABELS[LABELS != -100]
BATCHES = [(LOGITS[rows], LABELS[rows]) for rows in (slice(0, 7), slice(7, 8), slice(8, 40))]


def evaluated(*metrics, loss=ff.losses.cross_entropy, batches=None):
    made = program(torch.nn.Linear(CLASSES, CLASSES), loss=loss)
    with torch.no_grad():
        made.plan.model.weight.copy_(torch.eye(CLASSES))
        made.plan.model.bias.zero_()
    return made.evaluate(made.init(0), BATCHES if batches is None else batches, metrics=metrics)


def test_accuracy_is_that_of_scikit_learn():
    from sklearn.metrics import accuracy_score

    found = evaluated(ff.metrics.accuracy)
    assert found["accuracy"] == accuracy_score(TRUE, KEPT.argmax(-1))
    assert set(found) == {"loss", "accuracy"}


@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_top_k_is_that_of_scikit_learn(k):
    from sklearn.metrics import top_k_accuracy_score

    expected = top_k_accuracy_score(TRUE, KEPT, k=k, labels=range(CLASSES)) if k < CLASSES else 1.0
    assert evaluated(ff.metrics.top_k(k))[f"top_{k}_accuracy"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_is_that_of_scikit_learn(average):
    from sklearn.metrics import f1_score

    for classes_predicted in (CLASSES, 2):  # also where some class is neither target nor prediction
        logits = LOGITS.clone()
        logits[:, classes_predicted:] = -9.0
        batches = [(logits[rows], LABELS[rows]) for rows in (slice(0, 7), slice(7, 40))]
        expected = f1_score(TRUE, logits[LABELS != -100].argmax(-1), average=average)
        found = evaluated(ff.metrics.f1(classes=CLASSES), batches=batches)
        assert found[f"f1_{average}"] == pytest.approx(expected, rel=1e-12)


def test_confusion_is_that_of_scikit_learn():
    from sklearn.metrics import confusion_matrix

    expected = confusion_matrix(TRUE, KEPT.argmax(-1), labels=range(CLASSES))
    found = evaluated(ff.metrics.confusion(classes=CLASSES))
    assert all(found[f"confusion_{i}_{j}"] == expected[i, j] for i in range(CLASSES) for j in range(CLASSES))


def test_perplexity_is_of_the_cross_entropy_alone():
    expected = F.cross_entropy(KEPT.double(), TRUE).exp().item()
    loss = ff.losses.with_z_loss(ff.losses.smoothed(ff.losses.cross_entropy, epsilon=0.1))
    assert evaluated(ff.metrics.perplexity, loss=loss)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_nothing_is_nan():
    found = evaluated(ff.metrics.perplexity, batches=[(LOGITS[3:5], LABELS[3:5])])
    assert math.isnan(found["perplexity"])


def test_masks_of_the_loss_are_those_of_metrics():
    loss = ff.losses.ignoring(ff.losses.cross_entropy, index=2)
    keep = TRUE != 2
    expected = (KEPT.argmax(-1) == TRUE)[keep].double().mean().item()
    assert evaluated(ff.metrics.accuracy, loss=loss)["accuracy"] == pytest.approx(expected, rel=1e-12)


class TestNextToken:
    LOGITS = torch.randn(3, 6, CLASSES, generator=DRAW)
    LABELS = torch.randint(0, CLASSES, (3, 6), generator=DRAW)

    def test_labels_are_shifted_as_the_loss_shifts_them(self):
        loss = ff.losses.with_metrics(ff.losses.causal_lm, ff.metrics.accuracy, ff.metrics.top_k(2))
        found = loss(self.LOGITS, {"labels": self.LABELS})
        expected = (self.LOGITS[:, :-1].argmax(-1) == self.LABELS[:, 1:]).double().mean().item()
        assert float(found["accuracy"]) == pytest.approx(expected)
        assert float(found["loss"]) == float(ff.losses.causal_lm(self.LOGITS, {"labels": self.LABELS}))

    def test_bits_per_byte(self):
        sizes = torch.tensor([2.0, 5.0, 1.0])
        batch = {"labels": self.LABELS, "bytes": sizes}
        measure = ff.metrics.bits_per_byte(bytes="bytes").as_in(ff.losses.causal_lm)
        nats = ff.losses.causal_lm(self.LOGITS, batch).total.item()
        expected = nats / math.log(2) / 8
        assert float(measure(self.LOGITS, batch)["bits_per_byte"]) == pytest.approx(expected, rel=1e-6)

    def test_in_a_run(self):
        model = torch.nn.Sequential(torch.nn.Embedding(CLASSES, 4), torch.nn.Linear(4, CLASSES))
        loss = ff.losses.with_metrics(ff.losses.causal_lm, ff.metrics.accuracy)
        made = program(model, loss=loss, microbatches=2)
        state, metrics = made.step(made.init(0), (self.LABELS, self.LABELS))
        assert float(metrics["accuracy"].weight) == 15
        assert set(made.evaluate(state, [(self.LABELS, self.LABELS)])) == {"loss", "accuracy"}


def test_an_aggregate_of_ones_own():
    residual = ff.metrics.Aggregate(
        init=lambda: {"squares": torch.zeros(2, dtype=torch.float64), "n": torch.tensor(0)},
        add=lambda kept, outputs, batch: {
            "squares": kept["squares"] + torch.stack([outputs.square().sum(), batch[1].square().sum()]),
            "n": kept["n"] + len(outputs),
        },
        result=lambda kept: {"rms": math.sqrt(kept["squares"][0] / kept["n"])},
    )
    found = evaluated(residual)
    assert found["rms"] == pytest.approx(LOGITS.double().square().sum().div(40).sqrt().item(), rel=1e-6)


def test_observed_in_a_run():
    data = ff.batches((LOGITS, LABELS), batch_size=8)
    made = program(torch.nn.Linear(CLASSES, CLASSES))
    observer = ff.evaluated(data, metrics=(ff.metrics.accuracy, ff.metrics.f1(classes=CLASSES)))
    steps = ff.every(1, observer)(made.steps(made.init(0), data))
    tick = next(iter(ff.until(steps=1)(steps)))
    assert {"eval_loss", "eval_accuracy", "eval_f1_micro", "eval_f1_macro"} == set(tick.results)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((3,), "neither a function .* nor an Aggregate"),
        ((ff.metrics.accuracy, ff.metrics.accuracy), r"\['accuracy'\] is measured already"),
        ((lambda outputs, batch: {"loss": ff.Mean(outputs.sum(), 1)},), r"\['loss'\] is measured already"),
        ((lambda outputs, batch: 1.0,), "gave float; expected"),
        ((lambda outputs, batch: {"x": outputs.mean()},), "returned a tensor of shape"),
        ((ff.metrics.f1(classes=4),), "classes=4, but the model's logits are of 5 classes"),
        ((ff.metrics.f1(classes=5), ff.metrics.f1(classes=5)), r"\['f1_macro', 'f1_micro'\] is measured already"),
        ((ff.metrics.top_k(6),), "k=6, but there are 5 classes"),
        (
            (ff.metrics.Aggregate(lambda: {"n": torch.tensor(0)}, lambda k, o, b: {"n": o.sum()}, dict),),
            r"keeps counts and sums by name.*int64.*float32",
        ),
    ],
)
def test_refusals(metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluated(*metrics)


def test_one_metric_is_not_a_sequence():
    made = program(torch.nn.Linear(CLASSES, CLASSES))
    with pytest.raises(ValueError, match=r"metrics takes a sequence: metrics=\(accuracy,\)"):
        made.evaluate(made.init(0), BATCHES, metrics=ff.metrics.accuracy)


@pytest.mark.parametrize(
    ("loss", "batches", "message"),
    [
        (ff.losses.mse, [(LOGITS, LOGITS)], "compares classes, and the loss is one of values"),
        (ff.losses.cross_entropy, [(LOGITS, LOGITS.softmax(-1))], "the targets are probabilities"),
        (lambda o, b: ff.Mean(o.sum(), 1), BATCHES, r"does not tell which predictions.*as_in"),
    ],
)
def test_losses_that_compare_no_classes(loss, batches, message):
    with pytest.raises(ValueError, match=message):
        evaluated(ff.metrics.accuracy, loss=loss, batches=batches)


def test_an_aggregate_is_no_metric_of_a_step():
    with pytest.raises(ValueError, match=r"perplexity is not a function.*program.evaluate"):
        ff.losses.with_metrics(ff.losses.cross_entropy, ff.metrics.perplexity)
    loss = ff.losses.with_metrics(ff.losses.cross_entropy, ff.metrics.accuracy, ff.metrics.accuracy)
    with pytest.raises(ValueError, match=r"\['accuracy'\], which is named already"):
        loss(LOGITS, (None, LABELS))


def test_arguments_out_of_range():
    for make in (lambda: ff.metrics.top_k(0), lambda: ff.metrics.f1(classes=True)):
        with pytest.raises(ValueError, match="must be an integer"):
            make()

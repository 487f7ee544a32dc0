from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.losses import leading_dimension, logits_of, named_means, target_of
from tests.toys import classifier, labelled, program

LOGITS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(1))
LABELS[0, 3:] = -100
LABELS[2, :2] = -100
Outputs = namedtuple("Outputs", ["loss", "logits"])


class TestFinding:
    @pytest.mark.parametrize(
        "outputs",
        [
            LOGITS,
            {"logits": LOGITS, "loss": torch.tensor(1.0)},
            SimpleNamespace(logits=LOGITS),
            (LOGITS, None),
            (torch.tensor(1.0), LOGITS, torch.zeros(3)),
            Outputs(torch.tensor(1.0), LOGITS),
        ],
        ids=["tensor", "mapping", "object", "tuple", "loss_first", "namedtuple"],
    )
    def test_logits(self, outputs):
        assert logits_of(outputs) is LOGITS

    @pytest.mark.parametrize("outputs", [{"loss": 1, "hidden": 2}, object(), (torch.tensor(1.0),), None])
    def test_no_logits_are_an_error_that_says_what_there_is(self, outputs):
        with pytest.raises(ValueError, match=r"no logits.*got (\['hidden', 'loss'\]|object|tuple|NoneType)"):
            logits_of(outputs)

    @pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
    def test_targets_by_name(self, name):
        assert target_of({"x": 1, name: LABELS}) is LABELS

    def test_targets_by_position(self):
        assert target_of((1, 2, LABELS)) is LABELS
        assert target_of([1, LABELS]) is LABELS

    @pytest.mark.parametrize("batch", [{"x": 1}, LOGITS, (LOGITS,)])
    def test_no_target_is_an_error(self, batch):
        with pytest.raises(ValueError, match="no target"):
            target_of(batch)


def next_tokens(logits, labels, reduction="mean"):
    return F.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1), reduction=reduction)


class TestLosses:
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)])
    @pytest.mark.parametrize("batch", [{"labels": LABELS}, (LOGITS, LABELS)], ids=["dict", "tuple"])
    def test_causal_lm(self, wrap, batch):
        mean = ff.losses.causal_lm(wrap(LOGITS), batch)
        assert float(mean) == pytest.approx(next_tokens(LOGITS, LABELS).item(), rel=1e-6)
        assert int(mean.weight) == int((LABELS[:, 1:] != -100).sum())

    def test_causal_lm_does_not_sum_in_half_precision(self):
        low = LOGITS.bfloat16()
        expected = next_tokens(low.float(), LABELS, "sum")
        assert torch.equal(ff.losses.causal_lm(low, {"labels": LABELS}).total, expected)
        exact = next_tokens(LOGITS.double(), LABELS, "sum")
        assert torch.equal(ff.losses.causal_lm(LOGITS.double(), {"labels": LABELS}).total, exact)

    def test_cross_entropy_over_classes(self):
        mean = ff.losses.cross_entropy(LOGITS[0], (None, torch.tensor([1, -100, 0, 4, 2, -100])))
        expected = F.cross_entropy(LOGITS[0], torch.tensor([1, -100, 0, 4, 2, -100]))
        assert float(mean) == pytest.approx(expected.item(), rel=1e-6)
        assert int(mean.weight) == 4

    def test_cross_entropy_over_positions(self):
        # [batch, time, classes] against [batch, time], and torch's own [batch, classes, time].
        expected = F.cross_entropy(LOGITS.flatten(0, 1), LABELS.flatten())
        for logits in (LOGITS, LOGITS.transpose(1, 2)):
            mean = ff.losses.cross_entropy(logits, (None, LABELS))
            assert float(mean) == pytest.approx(expected.item(), rel=1e-6)
            assert int(mean.weight) == int((LABELS != -100).sum())

    def test_cross_entropy_takes_classes_last_where_both_layouts_fit(self):
        logits, target = torch.randn(4, 3, 3), torch.randint(0, 3, (4, 3))
        expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        mean = ff.losses.cross_entropy(logits, (None, target))
        assert float(mean) == pytest.approx(expected.item(), rel=1e-6)
        moved = ff.losses.cross_entropy(logits.movedim(1, -1), (None, target))
        assert float(moved) == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)

    def test_cross_entropy_over_images(self):
        logits, target = LOGITS.reshape(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
        mean = ff.losses.cross_entropy(logits, (None, target))
        assert float(mean) == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)

    @pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (2, 5, 3, 2)])
    def test_cross_entropy_against_probabilities(self, shape):
        generator = torch.Generator().manual_seed(0)
        logits, target = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator).softmax(1)
        mean = ff.losses.cross_entropy(logits, (None, target))
        assert float(mean) == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)

    def test_mse(self):
        prediction, target = LOGITS[0], LOGITS[1]
        mean = ff.losses.mse(prediction, (None, target))
        assert float(mean) == pytest.approx(F.mse_loss(prediction, target).item(), rel=1e-6)

    def test_mse_does_not_sum_in_half_precision(self):
        prediction, target = (tensor.bfloat16() for tensor in (LOGITS.repeat(9, 1, 1), LOGITS.roll(1).repeat(9, 1, 1)))
        expected = F.mse_loss(prediction.double(), target.double()).item()
        assert float(ff.losses.mse(prediction, (None, target))) == pytest.approx(expected, rel=1e-5)

    def test_mse_does_not_broadcast(self):
        with pytest.raises(
            ValueError, match=r"mse: the prediction's shape \(6, 1\) is not the target's \(6,\).*unsqueeze"
        ):
            ff.losses.mse(torch.zeros(6, 1), (None, torch.zeros(6)))

    @pytest.mark.parametrize("loss", [ff.losses.causal_lm, ff.losses.cross_entropy, ff.losses.mse], ids=repr)
    def test_the_weight_is_known_before_forward(self, loss):
        batch = (None, LABELS if loss is not ff.losses.mse else LOGITS)
        outputs = LOGITS
        assert float(loss.weight(batch)) == float(loss(outputs, batch).weight)

    @pytest.mark.parametrize("loss", [ff.losses.causal_lm, ff.losses.cross_entropy, ff.losses.mse], ids=repr)
    def test_parts_add_up_to_the_whole(self, loss):
        target = LABELS if loss is not ff.losses.mse else LOGITS.roll(1)
        whole = loss(LOGITS.double(), (None, target))
        parts = [loss(LOGITS[rows].double(), (None, target[rows])) for rows in (slice(0, 1), slice(1, 4))]
        assert float(parts[0] + parts[1]) == pytest.approx(float(whole), rel=1e-7)


class OwnLoss(nn.Module):
    """A model that returns its own mean loss, over the labels that are not -100, in one of torch's ways."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = classifier(torch.float64), wrap

    def forward(self, features, labels):
        logits = self.body(features)
        return self.wrap(F.cross_entropy(logits, labels), logits)


WRAPS = {
    "mapping": lambda loss, logits: {"loss": loss, "logits": logits},
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "tensor": lambda loss, logits: loss,
}


def ragged():
    features, labels = labelled(9, dtype=torch.float64)
    labels[:4] = -100
    return {"features": features, "labels": labels}


class TestFromOutput:
    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
    @pytest.mark.parametrize("microbatches", [1, 2, 4])
    def test_a_models_own_mean_counts_by_the_weight_that_is_named(self, wrap, microbatches):
        made = program(OwnLoss(wrap), loss=ff.losses.from_output(weight="tokens"), microbatches=microbatches)
        state, metrics = made.step(made.init(0), ragged())
        plain = program(classifier(torch.float64))
        expected, means = plain.step(plain.init(0), tuple(ragged().values()))
        assert float(metrics["loss"]) == pytest.approx(float(means["loss"]), rel=1e-12)
        for name, tensor in expected.params.items():
            torch.testing.assert_close(state.params[f"body.{name}"], tensor, atol=1e-12, rtol=0)
        assert state.tokens.item() == 5

    def test_an_evaluation_batch_without_labels_counts_as_nothing(self):
        made = program(OwnLoss(WRAPS["tuple"]), loss=ff.losses.from_output(weight="tokens"))
        state = made.init(0)
        rows = ragged()
        batches = [{name: column[a:b] for name, column in rows.items()} for a, b in ((0, 3), (3, 6), (6, 9))]
        assert made.evaluate(state, batches)["loss"] == pytest.approx(made.evaluate(state, [rows])["loss"], rel=1e-12)

    @pytest.mark.parametrize(
        ("weight", "expected"), [("samples", 4), ("tokens", 19), ("next_tokens", 16), (lambda batch: 2.5, 2.5)]
    )
    def test_weights(self, weight, expected):
        loss = ff.losses.from_output(weight=weight)
        batch = {"input_ids": LABELS, "labels": LABELS}
        assert float(loss.weight(batch)) == expected
        assert float(loss({"loss": torch.tensor(2.0)}, batch)) == 2.0

    def test_an_unknown_weight_is_refused(self):
        with pytest.raises(ValueError, match=r"weight='words' is not one of \['next_tokens', 'samples', 'tokens'\]"):
            ff.losses.from_output(weight="words")

    @pytest.mark.parametrize(
        "outputs", [{"logits": LOGITS}, SimpleNamespace(loss=None), (), (LOGITS,), LOGITS, {"loss": 1.0}]
    )
    def test_a_model_without_a_scalar_loss_is_an_error(self, outputs):
        with pytest.raises(ValueError, match=r"returned no scalar loss.*labels"):
            ff.losses.from_output(weight="samples")(outputs, {"x": LOGITS, "labels": LABELS})

    def test_it_prints_as_it_was_made(self):
        assert repr(ff.losses.from_output(weight="tokens")) == "from_output(weight='tokens')"


class TestCounting:
    @pytest.mark.parametrize(
        "batch",
        [
            torch.zeros(4),
            (torch.zeros(4, 2), torch.zeros(4)),
            {"scale": torch.tensor(2.0), "name": "x", "x": torch.zeros(4, 2)},
            [{"deep": (torch.zeros(4),)}],
        ],
    )
    def test_samples_are_the_leading_dimension_of_the_first_tensor(self, batch):
        assert leading_dimension(batch) == 4

    @pytest.mark.parametrize("batch", [{"name": "x"}, torch.tensor(1.0), 5, ()])
    def test_a_batch_without_tensors_cannot_be_counted(self, batch):
        with pytest.raises(ValueError, match=r"cannot count the samples.*Batch\(data, samples\)"):
            leading_dimension(batch)


class TestNamedMeans:
    def test_one_mean_is_the_objective(self):
        mean = ff.Mean(torch.tensor(1.0), 2)
        assert named_means(mean) == {"loss": mean}

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (torch.tensor(1.0), r"returned a tensor of shape \(\) for 'loss'; expected a Mean\(total, weight\)"),
            (1.0, r"returned float for 'loss'"),
            (None, r"returned NoneType for 'loss'"),
            ((torch.tensor(1.0), 2), r"returned tuple for 'loss'"),
            ({"loss": ff.Mean(torch.tensor(1.0), 1), "accuracy": 0.5}, "returned float for 'accuracy'"),
            ({"nll": ff.Mean(torch.tensor(1.0), 1)}, r"\['nll'\]; the objective must be named 'loss'"),
            (ff.Mean(torch.ones(3), 3), r"'loss': the total of a Mean must be a scalar, got shape \(3,\)"),
            (
                ff.Mean(torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)),
                "weight of the objective depends on the model",
            ),
        ],
    )
    def test_what_is_no_mean_is_refused(self, result, message):
        with pytest.raises(ValueError, match=message):
            named_means(result)

    @pytest.mark.parametrize(
        "weight",
        [torch.tensor([6.0]), torch.ones(6), None, -6.0, torch.ones(6, 1)],
        ids=["one", "six", "none", "negative", "column"],
    )
    def test_a_weight_that_is_no_number_is_refused_and_consumes_nothing(self, weight):
        def loss(outputs, batch):
            return ff.Mean(F.cross_entropy(outputs, batch[1], reduction="sum"), weight)

        made = program(classifier(), loss=loss)
        state = made.init(0)
        with pytest.raises(ValueError, match="weight"):
            made.step(state, labelled(6))
        assert not state.consumed

    @pytest.mark.parametrize(
        "weight", [6, 6.0, np.int64(6), np.float32(6), torch.tensor(6), torch.tensor(6.0).double()]
    )
    def test_any_number_may_be_a_weight(self, weight):
        def loss(outputs, batch):
            return ff.Mean(F.cross_entropy(outputs, batch[1], reduction="sum"), weight)

        made = program(classifier(), loss=loss)
        state, metrics = made.step(made.init(0), labelled(6))
        features, labels = labelled(6)
        assert float(metrics["loss"]) == pytest.approx(F.cross_entropy(classifier()(features), labels).item(), rel=1e-6)
        assert state.tokens.item() == 6

    def test_a_metric_whose_total_is_a_plain_number_is_refused_by_name(self):
        with pytest.raises(ValueError, match=r"'accuracy': the total of a Mean must be a scalar tensor, got 0\.5"):
            named_means({"loss": ff.Mean(torch.tensor(1.0), 1), "accuracy": ff.Mean(0.5, 1)})

    def test_the_fix_for_a_plain_tensor_is_shown(self):
        with pytest.raises(ValueError, match=r"Return Mean\(losses.sum\(\), losses.numel\(\)\)"):
            named_means(torch.tensor(1.0))

    def test_a_loss_that_is_cut_off_from_the_parameters_is_refused(self):
        made = program(classifier(), loss=lambda outputs, batch: ff.Mean(outputs.detach().sum(), 6))
        with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
            made.step(made.init(0), labelled(6))

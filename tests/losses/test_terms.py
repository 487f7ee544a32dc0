"""Losses that are sums over elements, against torch's own, and what is put on them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.losses import Objective
from tests.named import named
from tests.pieces import losses as rows
from tests.toys import program

DRAW = torch.Generator().manual_seed(3)
LOGITS = torch.randn(6, 5, 7, generator=DRAW, dtype=torch.float64)
LABELS = torch.randint(0, 7, (6, 5), generator=DRAW)
LABELS[0, 2:] = -100
LABELS[3] = -100
SHIFTED = (LOGITS[:, :-1].reshape(-1, 7), LABELS[:, 1:].reshape(-1))
SAMPLES = torch.rand(6, generator=DRAW, dtype=torch.float64)
TOKENS = torch.rand(6, 5, generator=DRAW, dtype=torch.float64)


def close(mean, expected):
    mean = mean["loss"] if isinstance(mean, dict) else mean
    torch.testing.assert_close(mean.value().double(), expected.double(), rtol=1e-12, atol=1e-12)


def batch(**beside):
    return {"labels": LABELS, **beside}


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_smoothing_is_torchs(epsilon):
    loss = ff.losses.smoothed(ff.losses.causal_lm, epsilon=epsilon)
    close(loss(LOGITS, batch()), F.cross_entropy(*SHIFTED, label_smoothing=epsilon))


def test_smoothing_of_probabilities_is_torchs():
    logits, target = LOGITS[:, 0], LOGITS[:, 1].softmax(-1)
    loss = ff.losses.smoothed(ff.losses.cross_entropy, epsilon=0.2)
    close(loss(logits, (None, target)), F.cross_entropy(logits, target, label_smoothing=0.2))


def test_z_loss_is_that_of_palm_and_is_reported():
    found = ff.losses.with_z_loss(ff.losses.causal_lm, coefficient=0.01)(LOGITS, batch())
    rows_, labels = SHIFTED[0][SHIFTED[1] != -100], SHIFTED[1][SHIFTED[1] != -100]
    z = 0.01 * rows_.exp().sum(-1).log().square()
    close(found["z_loss"], z.mean())
    close(found, (F.cross_entropy(rows_, labels, reduction="none") + z).mean())
    assert not found["z_loss"].total.requires_grad


def test_what_is_added_adds_up_in_any_order():
    one = ff.losses.with_z_loss(ff.losses.smoothed(ff.losses.causal_lm, epsilon=0.1))
    other = ff.losses.smoothed(ff.losses.with_z_loss(ff.losses.causal_lm), epsilon=0.1)
    close(one(LOGITS, batch()), other(LOGITS, batch())["loss"].value())


@pytest.mark.parametrize("weights", [SAMPLES, TOKENS], ids=["samples", "tokens"])
def test_weights_belong_to_their_targets(weights):
    loss = ff.losses.weighted(ff.losses.causal_lm, by="w")
    spread = (weights if weights.dim() == 2 else weights[:, None].expand(6, 5))[:, 1:].reshape(-1)
    spread = torch.where(SHIFTED[1] == -100, 0.0, spread)
    each = F.cross_entropy(*SHIFTED, reduction="none")
    close(loss(LOGITS, batch(w=weights)), (each * spread).sum() / spread.sum())
    assert "w" in loss.withheld
    assert "labels" in loss.withheld


def test_weights_multiply():
    twice = ff.losses.weighted(ff.losses.weighted(ff.losses.causal_lm, by="a"), by="b")
    once = ff.losses.weighted(ff.losses.causal_lm, by="c")
    given = batch(a=SAMPLES, b=TOKENS, c=SAMPLES[:, None] * TOKENS)
    close(twice(LOGITS, given), once(LOGITS, given).value())


def test_class_weights_are_torchs():
    weights = (0.5, 2.0, 0.0, 1.0, 1.0, 3.0, 0.1)
    loss = ff.losses.class_weighted(ff.losses.causal_lm, weights)
    close(loss(LOGITS, batch()), F.cross_entropy(*SHIFTED, weight=torch.tensor(weights, dtype=torch.float64)))


@pytest.mark.parametrize("index", [0, 2])
def test_ignoring_is_torchs(index):
    labels = LABELS.clamp(min=0)
    loss = ff.losses.ignoring(ff.losses.causal_lm, index=index)
    expected = F.cross_entropy(SHIFTED[0], labels[:, 1:].reshape(-1), ignore_index=index)
    close(loss(LOGITS, {"labels": labels}), expected)


def test_a_mask_is_of_the_target_at_its_place():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    expected = F.cross_entropy(SHIFTED[0], LABELS.masked_fill(~mask, -100)[:, 1:].reshape(-1))
    for kind in (mask, mask.long()):
        close(ff.losses.masked(ff.losses.causal_lm, by="m")(LOGITS, batch(m=kind)), expected)


def test_what_a_mask_leaves_out_may_be_anything():
    prediction = torch.tensor([1.0, 5.0, 2.0], requires_grad=True)
    target = {"y": torch.tensor([3.0, float("nan"), 2.0]), "m": torch.tensor([True, False, True])}
    mean = ff.losses.masked(ff.losses.mse, by="m")(prediction, target)
    mean.value().backward()
    assert mean.value().item() == 2.0
    assert prediction.grad.tolist() == [-2.0, 0.0, 0.0]


def test_focal_is_its_formula():
    p = SHIFTED[0].softmax(-1).gather(-1, SHIFTED[1].clamp(min=0)[:, None])[:, 0][SHIFTED[1] != -100]
    logits, labels = SHIFTED
    close(ff.losses.focal(gamma=1.5)(logits, (None, labels)), ((1 - p) ** 1.5 * -p.log()).mean())


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (ff.losses.l1, F.l1_loss),
        (ff.losses.mse, F.mse_loss),
        (ff.losses.huber(delta=0.7), lambda p, y: F.huber_loss(p, y, delta=0.7)),
        (ff.losses.weighted(ff.losses.mse, by="one"), F.mse_loss),
    ],
    ids=named,
)
def test_losses_of_values_are_torchs(loss, reference):
    close(loss(LOGITS[0], {"y": LOGITS[1], "one": torch.ones(5, dtype=torch.float64)}), reference(LOGITS[0], LOGITS[1]))


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float64])
def test_binary_cross_entropy_takes_any_answers(kind):
    answers = (LOGITS[1] > 0).to(kind)
    expected = F.binary_cross_entropy_with_logits(LOGITS[0], answers.double())
    close(ff.losses.binary_cross_entropy(LOGITS[0], (None, answers)), expected)


@pytest.mark.parametrize("name", sorted(rows.PIECES))
def test_the_weight_is_known_before_forward(name):
    piece = rows.PIECES[name]
    made = ff.single(piece.plan())
    state, data = made.init(0), piece.batch(6)
    _, metrics = made.step(state, data)
    assert float(made.plan.loss.weight(data)) == pytest.approx(float(metrics["loss"].weight), rel=1e-6)


def test_nothing_that_counts_moves_nothing():
    made = program(rows.specimens.mlp(), loss=ff.losses.masked(ff.losses.cross_entropy, by="mask"))
    data = rows.named_classes(4) | {"mask": torch.zeros(4, dtype=torch.bool)}
    gradients, _, _ = made.gradients(made.init(0), data)
    assert not any(gradient.any() for gradient in gradients.values())


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ff.losses.weighted(ff.losses.contrastive(), by="w"), r"weighted: the loss contrastive.*no"),
            (lambda: ff.losses.weighted(lambda o, b: None, by="w"), "not known to be a sum over elements"),
            (lambda: ff.losses.smoothed(ff.losses.mse, epsilon=0.1), "losses of classes, such as .*not for mse"),
            (lambda: ff.losses.smoothed(ff.losses.causal_lm, epsilon=1.5), "epsilon must be between 0 and 1, got 1.5"),
            (lambda: ff.losses.with_z_loss(ff.losses.causal_lm, coefficient=-1), "coefficient must be"),
            (lambda: ff.losses.with_z_loss(ff.losses.with_z_loss(ff.losses.causal_lm)), "has a z-loss already"),
            (lambda: ff.losses.class_weighted(ff.losses.causal_lm, (1.0, -1.0)), "at least 0, one for each class"),
            (lambda: ff.losses.focal(gamma=-1), "gamma must be"),
            (lambda: ff.losses.huber(delta=0), "delta must be a positive number"),
            (
                lambda: ff.losses.smoothed(ff.losses.chunked(ff.losses.causal_lm), epsilon=0.1),
                "put ff.losses.chunked around this",
            ),
            (
                lambda: ff.losses.smoothed(
                    ff.losses.with_metrics(ff.losses.causal_lm, ff.metrics.accuracy), epsilon=0.1
                ),
                "put ff.losses.with_metrics around this",
            ),
            (lambda: ff.losses.chunked(ff.losses.mse), "losses of classes"),
            (
                lambda: ff.losses.chunked(ff.losses.causal_lm, tokens=0),
                "tokens must be an integer of at least 1, got 0",
            ),
        ],
    )
    def test_when_made(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("loss", "data", "message"),
        [
            (ff.losses.weighted(ff.losses.causal_lm, by="w"), batch(), r"has no 'w'; it has \['labels'\]"),
            (ff.losses.weighted(ff.losses.causal_lm, by="w"), (None, LABELS), "is a key of a dict batch"),
            (ff.losses.weighted(ff.losses.causal_lm, by="w"), batch(w=2.0), "must be a tensor, got float"),
            (
                ff.losses.weighted(ff.losses.causal_lm, by="w"),
                batch(w=torch.ones(5)),
                r"has shape \(5,\); expected one number a sample, \(6,\), or one for each target, \(6, 5\)",
            ),
            (ff.losses.masked(ff.losses.causal_lm, by="m"), batch(m=SAMPLES), r"is floating; a mask is bool"),
            (ff.losses.causal_lm, {"labels": LABELS.float()}, r"class indices \(torch.long\), got torch.float32"),
            (ff.losses.causal_lm, {"labels": LABELS[:, :4]}, r"\(6, 5, 7\) do not fit labels of shape \(6, 4\)"),
            (ff.losses.cross_entropy, (None, LABELS[:, :4]), r"do not fit a target of shape \(6, 4\)"),
            (ff.losses.cross_entropy, (None, SAMPLES), r"class indices are integers: target.long\(\)"),
            (ff.losses.l1, (None, LABELS), r"l1: the prediction's shape .* is not the target's"),
        ],
    )
    def test_when_called(self, loss, data, message):
        with pytest.raises(ValueError, match=message):
            loss(LOGITS, data)


class TestDistilled:
    def test_it_is_hintons(self):
        taught = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        loss = ff.losses.distilled(ff.losses.causal_lm, teacher="t", temperature=3.0, share=0.7)
        keep = SHIFTED[1] != -100
        p = (taught[:, :-1].reshape(-1, 7)[keep] / 3).softmax(-1)
        q = (SHIFTED[0][keep] / 3).softmax(-1)
        soft = 9 * (p * (p / q).log()).sum(-1)
        expected = (0.3 * F.cross_entropy(SHIFTED[0][keep], SHIFTED[1][keep], reduction="none") + 0.7 * soft).mean()
        found = loss(LOGITS, batch(t=taught))
        close(found, expected)
        close(found["distillation"], 0.7 * soft.mean())
        assert "t" in loss.withheld

    def test_a_teacher_is_frozen_and_not_in_the_state(self):
        teacher = rows.teacher().train()
        before = [p.clone() for p in teacher.parameters()]
        made = program(rows.specimens.mlp(), loss=ff.losses.distilled(ff.losses.cross_entropy, teacher=teacher))
        state = made.init(0)
        names = set(state.params) | set(state.frozen) | set(state.buffers)
        state, metrics = made.step(state, rows.named_classes(5))
        assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert not teacher.training
        assert float(metrics["distillation"]) > 0
        for p, old in zip(teacher.parameters(), before, strict=True):
            assert p.grad is None
            assert torch.equal(p, old)

    def test_a_function_may_be_the_teacher(self):
        data = rows.named_classes(5)
        module = rows.teacher()
        one = ff.losses.distilled(ff.losses.cross_entropy, teacher=module)
        other = ff.losses.distilled(ff.losses.cross_entropy, teacher=lambda batch: module(batch["input"]))
        logits = torch.randn(5, 3)
        close(one(logits, data), other(logits, data)["loss"].value())

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [("no", "the batch has no 'no'"), (nn.Linear(5, 4), r"are \(5, 4\), and the model's \(5, 3\)")],
    )
    def test_refusals_when_called(self, teacher, message):
        with pytest.raises(ValueError, match=message):
            ff.losses.distilled(ff.losses.cross_entropy, teacher=teacher)(torch.zeros(5, 3), rows.named_classes(5))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"temperature": 0.0}, "temperature must be"),
            ({"share": 1.5}, "share must be"),
            ({"teacher": 3}, "no module, and no"),
        ],
    )
    def test_refusals_when_made(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ff.losses.distilled(ff.losses.cross_entropy, **{"teacher": "t"} | arguments)


class TestContrastive:
    def test_it_is_clips(self):
        from transformers.models.clip.modeling_clip import image_text_contrastive_loss

        one, other = (F.normalize(LOGITS[:, i], dim=-1) for i in (0, 1))
        found = ff.losses.contrastive(temperature=0.5)((LOGITS[:, 0], LOGITS[:, 1]), SAMPLES)
        close(found, image_text_contrastive_loss(one @ other.t() / 0.5))
        assert found.weight == 6

    def test_similarities_of_a_model_are_taken_as_they_are(self):
        from types import SimpleNamespace

        scores = LOGITS[:5, :, 0].clone()
        found = ff.losses.contrastive(temperature=None)(SimpleNamespace(logits_per_image=scores), SAMPLES[:5])
        own = torch.arange(5)
        close(found, (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2)

    def test_it_is_not_cut_into_microbatches_unless_told(self):
        with pytest.raises(ValueError, match=r"microbatches=2, but contrastive\(.*cannot be taken apart.*negatives"):
            program(rows.Twins(), loss=ff.losses.contrastive(), microbatches=2)
        program(rows.Twins(), loss=ff.losses.contrastive(negatives="microbatch"), microbatches=2)

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [(LOGITS, "expected a pair of embeddings"), ((LOGITS[:4, 0], LOGITS[:4, 1]), r"\(4, 4\) of 6 samples")],
    )
    def test_other_outputs_are_refused(self, outputs, message):
        with pytest.raises(ValueError, match=message):
            ff.losses.contrastive()(outputs, SAMPLES)


def test_descriptions_tell_losses_apart():
    made: list[Objective] = [piece.plan().loss for piece in rows.PIECES.values()]
    assert len({repr(loss) for loss in made}) == len(made)
    assert not any("0x" in repr(loss) for loss in made)

"""A loss in chunks is the loss."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import forgather_fn as ff
from forgather_fn.losses.deferred import Deferred
from tests.pieces.losses import composed
from tests.toys import program

WORDS = 37
DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, WORDS, (5, 9), generator=DRAW)
LABELS = torch.where(torch.arange(9) < torch.tensor([9, 3, 1, 7, 2])[:, None], TOKENS, -100)
BATCH = {"input_ids": TOKENS, "labels": LABELS}
PLAIN = {"input": TOKENS, "labels": LABELS, "importance": torch.rand(5, 9, generator=DRAW, dtype=torch.float64)}


def plain(tied=True, bias=False):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS, bias=bias)
    if tied:
        head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), head)


def hugging_face(kind):
    import transformers

    small = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    own = {
        "Llama": {"tie_word_embeddings": True},
        "Gemma2": {"final_logit_softcapping": 3.0},
        "Granite": {"logits_scaling": 2.0},
        "Cohere": {"logit_scale": 0.3},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small | own)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def taken(model, loss, batch, **fields):
    made = program(copy.deepcopy(model), loss=loss, precision=fields.pop("precision", "float64"), **fields)
    gradients, _, metrics = made.gradients(made.init(0), batch)
    return {name: float(mean) for name, mean in metrics.items()}, {name: g.clone() for name, g in gradients.items()}


def assert_same(one, other, tolerance=1e-12):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "Cohere"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_models_of_hugging_face(kind, microbatches):
    model = hugging_face(kind)
    loss = ff.losses.chunked(ff.losses.causal_lm, tokens=7)
    expected = taken(model, ff.losses.causal_lm, BATCH, microbatches=microbatches)
    assert_same(expected, taken(model, loss, BATCH, microbatches=microbatches))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_plain_models(tied, bias, tokens):
    model = plain(tied, bias)
    expected = taken(model, composed(), PLAIN)
    assert_same(expected, taken(model, ff.losses.chunked(composed(), tokens=tokens, head="2"), PLAIN))


def test_classes_of_the_same_position():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    data = torch.randn(11, 4, generator=DRAW), torch.randint(0, 5, (11,), generator=DRAW)
    expected = taken(model, ff.losses.cross_entropy, data)
    assert_same(expected, taken(model, ff.losses.chunked(ff.losses.cross_entropy, tokens=3, head="1"), data))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_under_autocast(precision):
    model, loss = hugging_face("Llama"), ff.losses.chunked(ff.losses.causal_lm, tokens=7)
    assert_same(
        taken(model, ff.losses.causal_lm, BATCH, precision=precision),
        taken(model, loss, BATCH, precision=precision),
        tolerance=2e-3,
    )


def test_in_bfloat16():
    model = plain(tied=False).to(torch.bfloat16)
    loss = ff.losses.chunked(ff.losses.causal_lm, tokens=7, head="2")
    assert_same(
        taken(model, ff.losses.causal_lm, PLAIN, precision="as_built"),
        taken(model, loss, PLAIN, precision="as_built"),
        tolerance=4e-3,
    )


@pytest.mark.parametrize("compile", [True, "model"])
def test_compiled(compile):
    model, loss = hugging_face("Gemma2"), ff.losses.chunked(ff.losses.causal_lm, tokens=20)
    expected = taken(model, ff.losses.causal_lm, BATCH)
    try:
        assert_same(expected, taken(model, loss, BATCH, compile=compile, backend="aot_eager"))
    finally:
        torch._dynamo.reset()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return found


def test_there_are_never_all_logits():
    tokens = torch.randint(0, WORDS, (8, 33), generator=DRAW)
    for loss, expected in (
        (ff.losses.causal_lm, 8 * 33 * WORDS),
        (ff.losses.chunked(ff.losses.causal_lm, tokens=16, head="2"), 8 * 33 * 8),
    ):
        made = program(plain(), loss=loss)
        state = made.init(0)
        with Largest() as largest:
            made.step(state, {"input": tokens, "labels": tokens})
        assert largest.elements <= expected
    assert 16 * WORDS < 8 * 33 * 8 < 8 * 33 * WORDS


def test_no_logits_are_kept_for_the_backward_pass():
    hidden, weight = torch.randn(8, 33, 4, requires_grad=True), torch.randn(WORDS, 4, requires_grad=True)
    tokens = torch.randint(0, WORDS, (8, 33), generator=DRAW)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ff.losses.chunked(ff.losses.causal_lm, tokens=16, head="2").total(
            Deferred(hidden, weight, None), {"labels": tokens}
        )
    assert max(kept, default=0) < 16 * WORDS


def test_evaluation_apply_and_export_are_as_ever():
    made = program(plain(), loss=ff.losses.chunked(ff.losses.causal_lm, tokens=7, head="2"))
    other = program(plain(), loss=ff.losses.causal_lm)
    state, same = made.init(0), other.init(0)
    data = [{name: column[rows] for name, column in PLAIN.items()} for rows in (slice(0, 2), slice(2, 5))]
    assert made.evaluate(state, data) == pytest.approx(other.evaluate(same, data), rel=1e-6)
    assert torch.equal(made.apply(state, TOKENS), other.apply(same, TOKENS))
    assert made.export(state)(TOKENS).shape == (5, 9, WORDS)


def test_a_failure_leaves_the_head_as_it_was():
    model = plain()
    made = program(model, loss=ff.losses.chunked(ff.losses.causal_lm, tokens=7, head="2"))
    state = made.init(0)
    with pytest.raises(IndexError):
        made.step(state, {"input": TOKENS + WORDS, "labels": LABELS})
    assert "forward" not in vars(model[2])


class Touching(nn.Module):
    """Does something to its logits."""

    def __init__(self, touch):
        super().__init__()
        self.embedding, self.head, self.touch = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), touch

    def forward(self, input):
        return self.touch(self.head(self.embedding(input)))


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        (torch.relu, "relu"),
        (lambda logits: logits[:, 1:], "an index"),
        (lambda logits: logits.softmax(-1), r"\.softmax"),
        (lambda logits: logits * torch.ones(WORDS), "mul"),
        (lambda logits: logits / torch.ones(WORDS), "a product with Tensor"),
    ],
)
def test_whatever_else_is_done_to_logits_is_refused(touch, what):
    made = program(Touching(touch), loss=ff.losses.chunked(ff.losses.causal_lm, head="head"))
    with pytest.raises(ValueError, match=rf"does more to its logits.*{what}"):
        made.gradients(made.init(0), PLAIN)


def test_products_with_numbers_are_honoured():
    def touch(logits):
        return torch.tanh(2 * logits / 3.0).float() * torch.tensor(1.5, dtype=torch.float64)

    model = Touching(lambda logits: touch(logits.double()) if isinstance(logits, torch.Tensor) else touch(logits))
    expected = taken(model, ff.losses.causal_lm, PLAIN, precision="float64")
    found = taken(model, ff.losses.chunked(ff.losses.causal_lm, tokens=7, head="head"), PLAIN, precision="float64")
    assert_same(expected, found, tolerance=1e-6)  # the model rounds to float32 on the way


class TestRefusals:
    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (None, r"Sequential does not tell which layer.*head=\.\.\. is one of \['2'\]"),
            ("3", r"head='3' is no module.*linear layers are \['2'\]"),
            ("0", "the head is Embedding"),
        ],
    )
    def test_the_head(self, head, message):
        made = program(plain(), loss=ff.losses.chunked(ff.losses.causal_lm, head=head))
        with pytest.raises(ValueError, match=message):
            made.gradients(made.init(0), PLAIN)

    def test_a_head_that_is_not_last(self):
        made = program(nn.Sequential(plain(), nn.Identity()), loss=ff.losses.chunked(ff.losses.causal_lm, head="0.2"))
        made.gradients(made.init(0), PLAIN)  # what passes it on does nothing to it
        made = program(
            nn.Sequential(plain(), nn.Linear(WORDS, 3)), loss=ff.losses.chunked(ff.losses.causal_lm, head="0.2")
        )
        with pytest.raises((ValueError, TypeError)):
            made.gradients(made.init(0), PLAIN)

    def test_metrics_beside_it(self):
        with pytest.raises(ValueError, match="never has all logits"):
            ff.losses.with_metrics(ff.losses.chunked(ff.losses.causal_lm), ff.metrics.accuracy)

    def test_metrics_of_an_evaluation(self):
        made = program(plain(), loss=ff.losses.chunked(ff.losses.causal_lm, head="2"))
        with pytest.raises(ValueError, match="logits"):
            made.evaluate(made.init(0), [PLAIN], metrics=(ff.metrics.accuracy,))

    def test_strategies_that_cannot(self):
        plan = program(plain(), loss=ff.losses.chunked(ff.losses.causal_lm, head="2")).plan
        with pytest.raises(ValueError, match="sharded: cannot be with chunked"):
            ff.accelerated(plan, sharded=True)
        with pytest.raises(ValueError, match=r"pipelined: .*loss"):
            ff.pipelined(plan, {"1": "end"})

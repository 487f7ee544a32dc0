"""Models of transformers train as they do in a plain loop."""

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import forgather_fn as ff
from tests.toys import VIEWED, by_hand, decaying, program

WORDS = 23
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])


def llama(*, tied=False):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt2(*, dropout=0.1):
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=16))


MODELS = {"llama": llama, "tied_llama": lambda: llama(tied=True), "gpt2": gpt2, "bert": bert}
KINDS = pytest.mark.parametrize("kind", MODELS)


def text(rows=6, *, seed=0, ragged=True):
    """Draw a batch of 7 words a row; with ``ragged``, the first row has no label, and others have few."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (rows, 7), generator=generator)
    labels = words.clone()
    if ragged:
        for row in range(rows):
            labels[row, (row * 2) % 8 :] = -100
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}


TEXTS = [text(seed=seed) for seed in range(4)]


def weight_of(kind):
    return "tokens" if kind == "bert" else "next_tokens"


def fused(model):
    """AdamW over every parameter once."""
    return torch.optim.AdamW(decaying(model, 0.1), lr=1e-2, fused=True)


def own_loss(model, batch):
    return model(**batch).loss


@STORAGES
@KINDS
def test_the_loss_of_the_model_trains_as_in_a_plain_loop(kind, viewed_elements):
    model = MODELS[kind]()
    by_hand(model, TEXTS, fused(model), loss=own_loss)
    made = program(MODELS[kind](), loss=ff.losses.from_output(weight=weight_of(kind)), viewed_elements=viewed_elements)
    state = ff.fold(made.step, made.init(0), TEXTS)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state.params[name], parameter.detach(), atol=0, rtol=0)
    torch.testing.assert_close(made.apply(state, **TEXTS[0]).logits, model.eval()(**TEXTS[0]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "tied_llama", "gpt2"])
def test_causal_lm_is_the_loss_of_the_model(kind):
    made = program(MODELS[kind](), loss=ff.losses.causal_lm)
    other = program(MODELS[kind](), loss=ff.losses.from_output(weight="next_tokens"))
    state, expected = made.init(0), other.init(0)
    found = made.evaluate(state, TEXTS)["loss"]
    assert found == pytest.approx(other.evaluate(expected, TEXTS)["loss"], rel=1e-6)
    gradients, _, means = made.gradients(state, TEXTS[0])
    others, _, theirs = other.gradients(expected, TEXTS[0])
    assert float(means["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-4)


@STORAGES
@pytest.mark.parametrize("loss", ["causal_lm", "from_output"])
@pytest.mark.parametrize("kind", ["llama", "tied_llama"])
def test_ragged_microbatches_equal_one_batch(kind, loss, viewed_elements):
    chosen = ff.losses.causal_lm if loss == "causal_lm" else ff.losses.from_output(weight="next_tokens")
    results = []
    for count in (1, 4):
        made = program(MODELS[kind](), loss=chosen, microbatches=count, viewed_elements=viewed_elements)
        results.append(made.gradients(made.init(0), text(6)))
    (one, _, first), (other, _, second) = results
    assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-6)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_number_of_items_reaches_a_model_that_takes_it():
    model, seen = llama(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("num_items_in_batch")), with_kwargs=True
    )
    made = program(model, loss=ff.losses.from_output(weight="next_tokens"), microbatches=2)
    state, _ = made.step(made.init(0), text(6, ragged=False))
    assert [int(items) for items in seen] == [18, 18]
    made.evaluate(state, [text(2, ragged=False)])
    assert int(seen[-1]) == 12
    # Not to one whose loss is not its own, nor to one that does not know it.
    plain = program(model, loss=ff.losses.causal_lm)
    plain.evaluate(plain.init(0), [text(2)])
    assert seen[-1] is None


def test_losses_of_ones_own_get_the_labels_and_the_output():
    def loss(outputs, batch):
        assert outputs.loss is not None
        count = (batch["labels"][:, 1:] != -100).sum()
        return {"loss": ff.Mean(outputs.loss * count, count), "perplexity": ff.Mean(outputs.loss.exp(), 1)}

    made = program(llama(), loss=loss)
    state = made.init(0)
    assert set(made.evaluate(state, TEXTS)) == {"loss", "perplexity"}


def test_a_model_as_it_comes_from_a_checkpoint_is_put_in_training_mode(tmp_path):
    gpt2(dropout=0.5).save_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not model.training
    made = program(model, loss=ff.losses.causal_lm)
    state = made.init(0)
    losses = [float(made.gradients(state, TEXTS[0])[2]["loss"]) for _ in range(2)]
    assert model.training
    assert losses[0] == losses[1] != pytest.approx(made.evaluate(state, [TEXTS[0]])["loss"], rel=1e-3)


@KINDS
def test_a_bound_model_can_be_saved_in_the_ways_of_the_library(kind, tmp_path):
    model = MODELS[kind]()
    made = program(model, loss=ff.losses.from_output(weight=weight_of(kind)))
    state = ff.fold(made.step, made.init(0), TEXTS[:2])
    model.save_pretrained(tmp_path)
    size = sum(tensor.numel() * 4 for tensor in state.params.values())
    assert (tmp_path / "model.safetensors").stat().st_size < size * 1.1 + 10_000
    read = type(model).from_pretrained(tmp_path)
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, state.params[name]), name
    if kind == "llama":
        safetensors.torch.save_file(model.state_dict(), tmp_path / "again.safetensors")


@pytest.mark.parametrize("kind", ["tied_llama", "gpt2", "bert"])
def test_tied_embeddings_are_one_parameter(kind):
    model = MODELS[kind]()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is head
    made = program(model, loss=ff.losses.from_output(weight=weight_of(kind)))
    state = ff.fold(made.step, made.init(0), TEXTS[:2])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(tensor.shape == (WORDS, 16) for tensor in state.params.values()) == 1
    exported = made.export(state)
    assert exported.get_input_embeddings().weight is exported.get_output_embeddings().weight


def test_new_words_in_a_bound_model_are_refused_by_name():
    model = llama()
    made = program(model, loss=ff.losses.causal_lm)
    state = made.init(0)
    model.resize_token_embeddings(WORDS + 5)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight of the bound module was replaced.*new program"):
        made.step(state, TEXTS[0])
    assert not state.consumed
    again = program(model, loss=ff.losses.causal_lm)
    fresh, _ = again.step(again.init(0), TEXTS[0])
    assert fresh.params["model.embed_tokens.weight"].shape == (WORDS + 5, 16)


@KINDS
def test_initialisation_by_name_depends_on_the_seed_alone(kind):
    def begun(seed, noise):
        def factory():
            model = MODELS[kind]()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(noise)
            return model

        return program(factory, loss=ff.losses.causal_lm, init="by_name").init(seed)

    one, same, other = begun(0, 1.0), begun(0, 2.0), begun(1, 1.0)
    for name, tensor in one.params.items():
        assert torch.equal(tensor, same.params[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other.params[name]), name
            assert tensor.std().item() < 0.05, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = gpt2(), gpt2()
    saving.gradient_checkpointing_enable()
    results = []
    for model in (plain, saving):
        made = program(model, loss=ff.losses.causal_lm)
        results.append(made.gradients(made.init(0), TEXTS[0])[0])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_head_that_is_frozen_with_the_embedding_it_is_tied_to():
    model = llama(tied=True)
    model.get_input_embeddings().requires_grad_(False)
    made = program(model, loss=ff.losses.causal_lm)
    state = made.init(0)
    before = state.frozen["model.embed_tokens.weight"].clone()
    state, _ = made.step(state, TEXTS[0])
    assert torch.equal(state.frozen["model.embed_tokens.weight"], before)
    assert isinstance(model.lm_head.weight, nn.Parameter)

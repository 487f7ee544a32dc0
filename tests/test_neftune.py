from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import neftune as theirs

from forgather_fn.neftune import noisy_embeddings

WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    return transformers.GPT2LMHeadModel(config)


def test_the_noise_is_that_of_transformers_under_the_same_seed() -> None:
    model = gpt2().train()
    handle = theirs.activate_neftune(model, 5.0)
    torch.manual_seed(1)
    expected = model(WORDS).logits
    theirs.deactivate_neftune(model, handle)
    with noisy_embeddings(model, alpha=5.0):
        torch.manual_seed(1)
        assert torch.allclose(model(WORDS).logits, expected, atol=1e-6)
    model.eval()
    assert not torch.allclose(model(WORDS).logits, expected, atol=1e-3)


def test_noise_stays_within_its_bound_and_reaches_for_it() -> None:
    embedding = nn.Embedding(8, 50)
    with noisy_embeddings(embedding, alpha=3.0):
        noise = (embedding(WORDS) - nn.functional.embedding(WORDS, embedding.weight)).detach().abs()
    bound = 3.0 / (3 * 50) ** 0.5
    assert 0.95 * bound < noise.max() <= bound
    assert noise.mean() == pytest.approx(bound / 2, rel=0.2)


def test_there_is_none_in_evaluation_nor_after_the_block_not_even_after_an_error() -> None:
    embedding = nn.Embedding(8, 4)
    quiet = embedding(WORDS)
    with noisy_embeddings(embedding, alpha=5.0):
        assert torch.equal(embedding.eval()(WORDS), quiet)
    embedding.train()

    def failing() -> None:
        with noisy_embeddings(embedding, alpha=5.0):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing()
    assert torch.equal(embedding(WORDS), quiet)


def test_what_has_no_embedding_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="Linear is no embedding and has no get_input_embeddings"),
        noisy_embeddings(nn.Linear(2, 2), alpha=1.0),
    ):
        pass
    with pytest.raises(ValueError, match="alpha=-1"), noisy_embeddings(nn.Embedding(2, 2), alpha=-1):
        pass

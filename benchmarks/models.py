"""The models that every arm trains: decoder transformers in plain torch, from few large to many small tensors."""

from collections.abc import Callable
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@attrs.frozen(kw_only=True)
class Shape:
    """How large a transformer is.

    Attributes:
        vocabulary: Distinct tokens.
        width: Of the residual stream; a multiple of ``heads``.
        layers: Blocks of 12 tensors each; six more are the embeddings, the last norm, and the head.
        heads: Of each attention.
        context: Tokens in a sequence.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int


SMALL = Shape(vocabulary=256, width=32, layers=2, heads=4, context=16)
"""43 k parameters in 30 tensors: what is not the model's arithmetic counts most."""

DEEP = Shape(vocabulary=256, width=30, layers=12, heads=3, context=16)
"""150 k parameters in 150 tensors: what is done tensor by tensor counts most."""

LARGE = Shape(vocabulary=256, width=256, layers=4, heads=4, context=32)
"""3.3 M parameters in 54 tensors: memory traffic counts most."""


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each on a normed residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.feed_norm = nn.LayerNorm(shape.width)
        self.feed_in = nn.Linear(shape.width, 4 * shape.width)
        self.feed_out = nn.Linear(4 * shape.width, shape.width)

    def forward(self, stream: Tensor) -> Tensor:
        """Map the residual stream, ``[batch, time, width]``, to the next."""
        batch, time, width = stream.shape
        parts = self.query_key_value(self.attention_norm(stream)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return stream + cast(Tensor, self.feed_out(F.gelu(self.feed_in(self.feed_norm(stream)))))


class Transformer(nn.Module):
    """A causal language model with learned positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens, int64 ``[batch, time]``, to the logits of the next, ``[batch, time, vocabulary]``."""
        stream = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return cast(Tensor, self.head(self.norm(stream)))


class Llama(nn.Module):
    """Hugging Face's Llama, called as the models here are."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                intermediate_size=4 * shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                max_position_embeddings=shape.context,
                use_cache=False,
            )
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens, int64 ``[batch, time]``, to the logits of the next, ``[batch, time, vocabulary]``."""
        return cast(Tensor, self.inner(input_ids=input_ids).logits)


class WithLoss(nn.Module):
    """A model as transformers.Trainer wants it: one that is given the labels and returns its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Give the mean loss and the logits."""
        logits = self.model(input_ids)
        return {"loss": next_token_loss(logits, labels), "logits": logits}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the cross-entropy over all predicted tokens."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def built(shape: Shape) -> nn.Module:
    """Build a transformer with the same initial weights every time."""
    return _drawn(Transformer, shape)


def llama(shape: Shape) -> nn.Module:
    """Do the same for Hugging Face's Llama."""
    return _drawn(Llama, shape)


def _drawn(model: Callable[[Shape], nn.Module], shape: Shape) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(shape)

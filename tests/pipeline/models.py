"""Small models that are cut into stages, with a batch for each and where it is cut."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import forgather_fn as ff

BLOCKS = 8
WORDS = 40


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lift = nn.Linear(width, 2 * width)
        self.lower = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        change = self.lower(torch.tanh(self.lift(self.norm(hidden))))
        if mask is not None:
            change = change * mask.unsqueeze(-1)
        return hidden + self.dropout(change)


class Plain(nn.Module):
    """A language model as one writes it by hand: keyword arguments, a parameter of the root, a loop over blocks."""

    def __init__(self, blocks: int = BLOCKS, width: int = 16, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.embed = nn.Embedding(WORDS, width)
        self.layer = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.float()
        hidden = self.embed(input_ids) * self.scale
        for layer in self.layer:
            hidden = layer(hidden, mask)
        return self.head(self.norm(hidden))


def llama(tied: bool = False, layers: int = BLOCKS) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=BLOCKS,
        n_head=2,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForMaskedLM(config)


def words(samples: int = 8, time: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of unequal length: padded, masked, and with as many labels as there are words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (samples, time), generator=generator)
    lengths = torch.randint(2, time + 1, (samples, 1), generator=generator)
    kept = torch.arange(time) < lengths
    return {"input_ids": ids, "attention_mask": kept.long(), "labels": ids.masked_fill(~kept, -100)}


@attrs.frozen
class Model:
    """A model to cut.

    Attributes:
        build: Builds it, from torch's default generator.
        blocks: The name of a block, but its number.
        loss: Its loss.
        tied: Whether two stages share a parameter.
    """

    build: Callable[[], nn.Module]
    blocks: str
    loss: Any
    tied: bool = False

    def module(self) -> nn.Module:
        torch.manual_seed(1)
        return self.build()

    def spec(self, stages: int, side: Any = "end") -> Mapping[str, Any]:
        """Cut it into so many equal stages."""
        each = BLOCKS // stages
        return {f"{self.blocks}.{each * i - (side == 'end')}": side for i in range(1, stages)}


MODELS = {
    "plain": Model(Plain, "layer", ff.losses.causal_lm),
    "plain_tied": Model(functools.partial(Plain, tied=True), "layer", ff.losses.causal_lm, tied=True),
    "llama": Model(llama, "model.layers", ff.losses.causal_lm),
    "llama_tied": Model(functools.partial(llama, tied=True), "model.layers", ff.losses.causal_lm, tied=True),
    "gpt2": Model(gpt2, "transformer.h", ff.losses.from_output(weight="next_tokens"), tied=True),
    "bert": Model(bert, "bert.encoder.layer", ff.losses.cross_entropy, tied=True),
}

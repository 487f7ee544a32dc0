"""Small models that between them have whatever makes a step hard, with their data and losses."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forgather_fn as ff

T = TypeVar("T")
WORDS = 11


def drawn(samples: int, draw: Callable[[torch.Generator], T]) -> T:
    """Draw data that depends on nothing but its size."""
    return draw(torch.Generator().manual_seed(samples))


def classes(samples: int) -> tuple[Tensor, Tensor]:
    return drawn(
        samples, lambda g: (torch.randn(samples, 5, generator=g), torch.randint(0, 3, (samples,), generator=g))
    )


def ragged_classes(samples: int) -> tuple[Tensor, Tensor]:
    """Every third label is left out, so that equal parts of a batch have unequal weights."""
    x, y = classes(samples)
    return x, torch.where(torch.arange(samples) % 3 == 1, -100, y)


def images(samples: int) -> tuple[Tensor, Tensor]:
    x, y = drawn(
        samples, lambda g: (torch.randn(samples, 2, 5, 5, generator=g), torch.randint(0, 3, (samples,), generator=g))
    )
    return x.to(memory_format=torch.channels_last), y


def values(samples: int) -> tuple[Tensor, Tensor]:
    return drawn(samples, lambda g: (torch.randn(samples, 5, generator=g), torch.randn(samples, 3, generator=g)))


def words(samples: int, time: int = 6) -> dict[str, Tensor]:
    """Token batches with labels of unequal length, the shape in which Hugging Face models take them."""
    tokens = drawn(samples, lambda g: torch.randint(0, WORDS, (samples, time), generator=g))
    lengths = 2 + torch.arange(samples) % (time - 1)
    labels = torch.where(torch.arange(time) < lengths[:, None], tokens, -100)
    return {"input_ids": tokens, "labels": labels}


def token_pairs(samples: int) -> tuple[Tensor, Tensor]:
    batch = words(samples)
    return batch["input_ids"], batch["labels"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def channels_last_cnn() -> nn.Module:
    return channels_last(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


def channels_last_groupnorm() -> nn.Module:
    return channels_last(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def channels_last(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def tied_by_object() -> nn.Module:
    embedding, head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), head)


def tied_by_storage() -> nn.Module:
    embedding, head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS, bias=False)
    head.weight = nn.Parameter(embedding.weight.data)
    return nn.Sequential(embedding, nn.Tanh(), head)


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    model[2].requires_grad_(False)
    return model


class Unused(nn.Module):
    """Has a parameter that takes no part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)
        self.body = mlp()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Intermittent(nn.Module):
    """Uses one of two branches, by the sign of the first input: gradients come and go, and differ by microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Any:
        positive = x[:, :1] > 0
        out = x.new_zeros(len(x), 3)
        for branch, chosen in zip(self.branches, (positive, ~positive), strict=True):
            if chosen.any():
                out = out + torch.where(chosen, branch(x), 0.0)
        return out


class TwoDtypes(nn.Module):
    """Has a float32 body and a float64 head; whatever it is converted to, it goes along."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.body(x)).to(self.head.weight.dtype))


class Half(nn.Module):
    """Has bfloat16 weights and a float32 norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        hidden = self.norm(self.body(x.to(self.body.weight.dtype)).to(self.norm.weight.dtype))
        return self.head(hidden.to(self.head.weight.dtype))


class Odd(nn.Module):
    """Has a module that is called twice, parameters without dimensions, without elements and not contiguous, and two
    buffers that are one tensor."""

    mean: Tensor
    same_mean: Tensor
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(5, 5)
        self.again = self.twice
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.crossed = nn.Parameter(torch.randn(5, 3).t())
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("same_mean", self.mean)
        self.register_buffer("grid", torch.ones(1).expand(5), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.normal_(self.crossed)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        hidden = self.again(torch.tanh(self.twice(x))) * self.scale + self.nothing.sum()
        return F.linear(hidden * self.grid, self.crossed)


class Reassigning(nn.Module):
    """Counts samples in a buffer that it makes anew in each forward pass; another it makes first, then enlarges."""

    seen: Tensor
    history: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("history", None)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.seen = self.seen + len(x)
            earlier = self.seen.new_zeros(0) if self.history is None else self.history
            self.history = torch.cat([earlier, self.seen.reshape(1)])[-3:]
        return self.body(x)


class Returning(nn.Module):
    """Returns its own mean loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))


def float64_causal_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """What transformers' own loss computes, but in the precision of the logits: that one is in float32 always."""
    total = F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), reduction="sum")
    return total / num_items_in_batch if num_items_in_batch is not None else total / (labels[:, 1:] != -100).sum()


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_function = float64_causal_loss
    return model


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(samples: int) -> dict[str, Tensor]:
    """Words, with a mask that hides the ends of some, and a class for each."""
    drawn_words = words(samples)["input_ids"]
    mask = torch.ones_like(drawn_words)
    mask[::2, 4:] = 0
    return {"input_ids": drawn_words, "attention_mask": mask, "labels": torch.arange(samples) % 3}


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def pictures(samples: int) -> dict[str, Tensor]:
    pixels = drawn(samples, lambda generator: torch.randn(samples, 3, 8, 8, generator=generator))
    return {"pixel_values": pixels, "labels": torch.arange(samples) % 3}


def named_losses(outputs: Tensor, batch: Any) -> Mapping[str, ff.Mean]:
    """A user's own function, whose weight is not known before the forward pass; with a metric beside the objective."""
    target = batch[-1]
    labelled = target != -100
    right = (outputs.argmax(-1) == target) & labelled
    return {
        "loss": ff.Mean(F.cross_entropy(outputs, target, reduction="sum"), labelled.sum()),
        "accuracy": ff.Mean(right.sum(), labelled.sum()),
    }


def pairs_by_name(samples: int) -> dict[str, Tensor]:
    x, y = classes(samples)
    return {"x": x, "y": y}

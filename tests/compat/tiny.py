"""Tiny models and data for the class layer, and the events that a trainer raises."""

import contextlib

import torch
import transformers
from torch import nn

WORDS = 23
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, vocab_size=WORDS, num_key_value_heads=1, tie_word_embeddings=True)
    )


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, vocab_size=WORDS, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **SMALL, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.ViTForImageClassification(config)


class Regression(nn.Module):
    """A plain module that returns its own loss."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 1)

    def forward(self, x, labels=None):
        found = self.out(self.norm(torch.tanh(self.hidden(x))))[:, 0]
        loss = None if labels is None else nn.functional.mse_loss(found, labels)
        return {"logits": found} if loss is None else {"loss": loss, "logits": found}


def regression():
    torch.manual_seed(0)
    return Regression()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "regression": regression}


def rows(kind, count=22, *, seed=1, ragged=True):
    """Draw samples for a model; causal ones have unequal numbers of labels."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *size):
        return torch.randint(high, size, generator=generator)

    if kind in ("llama", "gpt2"):
        made = []
        for i in range(count):
            words = integers(WORDS, 7)
            labels = words.clone()
            if ragged:
                labels[: i % 5] = -100
            made.append({"input_ids": words, "labels": labels})
        return made
    if kind == "bert":
        return [{"input_ids": integers(WORDS, 7), "labels": int(integers(3, 1))} for _ in range(count)]
    if kind == "vit":
        images = torch.randn(count, 3, 8, 8, generator=generator)
        return [{"pixel_values": image, "labels": int(integers(3, 1))} for image in images]
    return [
        {"x": torch.randn(3, generator=generator), "labels": torch.randn((), generator=generator)} for _ in range(count)
    ]


EVENTS = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin",
    "on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_step_end", "on_evaluate", "on_predict",
    "on_save", "on_log", "on_prediction_step",
)  # fmt: skip


class Recorder(transformers.TrainerCallback):
    """Writes down every event with what a user can see at it."""

    def __init__(self):
        self.seen = []


def _recording(event):
    def record(self, args, state, control, **kwargs):
        flags = tuple(sorted(name for name, on in vars(control).items() if on))
        self.seen.append((event, state.global_step, round(float(state.epoch), 9), flags, tuple(sorted(kwargs))))

    return record


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


@contextlib.contextmanager
def double():
    """Compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

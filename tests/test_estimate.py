"""The memory of a training, told before it, is what the allocator gives out when it runs."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import functools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from benchmarks.measure import most_held
from forgather_fn.activation_checkpointing import activation_checkpointed
from forgather_fn.tree import tensors
from tests import zoo
from tests.toys import Branches, branching, classifier, labelled

IDS = torch.arange(8 * 32).reshape(8, 32) % 64
WORDS = {"input_ids": IDS, "labels": IDS}
CLASSES = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.arange(8) % 2}
IMAGES = (torch.zeros(8, 3, 24, 24), torch.arange(8) % 10)


def llama(key_value_heads: int = 4) -> nn.Module:
    import transformers

    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_value_heads}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, use_cache=False))


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    import transformers

    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_attention_heads=4))


def images() -> nn.Module:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def plan(model: Any = llama, loss: Any = ff.losses.causal_lm, **fields: Any) -> ff.Plan:
    plain = {"optimizer": ff.adamw(weight_decay=0.1), "schedule": 1e-3, "transforms": (ff.clipped(1.0),)}
    return ff.Plan(model=model, loss=loss, **plain | fields)


def taken(make: Any, batch: Any) -> int:
    """Measure two steps, from building the model on."""

    def run() -> None:
        program = ff.single(make())
        state = program.init(0)
        for _ in range(2):
            state, _ = program.step(state, batch)

    return most_held(run)[0]


def recomputed() -> nn.Module:
    return activation_checkpointed(llama(), "model.layers.*")


CASES: dict[str, tuple[Any, Any]] = {
    "llama": (plan, WORDS),
    "gpt2": (functools.partial(plan, gpt2), WORDS),
    "gpt2_own_loss": (functools.partial(plan, gpt2, ff.losses.from_output(weight="next_tokens")), WORDS),
    "bert": (functools.partial(plan, bert, ff.losses.cross_entropy), CLASSES),
    "images": (functools.partial(plan, images, ff.losses.cross_entropy), IMAGES),
    "images_in_parts": (functools.partial(plan, images, ff.losses.cross_entropy, microbatches=4), IMAGES),
    "own_gradients": (functools.partial(plan, viewed_elements=0, microbatches=2), WORDS),
    "in_backward": (functools.partial(plan, update="in_backward", transforms=()), WORDS),
    "float64": (functools.partial(plan, precision="float64"), WORDS),
    "float16": (functools.partial(plan, precision="float16"), WORDS),
    "keeping": (functools.partial(plan, donate=False, average=ff.ema(0.9)), WORDS),
    "plain_sgd": (functools.partial(plan, optimizer=ff.sgd(), transforms=()), WORDS),
    "rmsprop": (functools.partial(plan, optimizer=ff.from_torch(torch.optim.RMSprop)), WORDS),
    "recomputed": (functools.partial(plan, recomputed), WORDS),
    "lora": (functools.partial(plan, ff.lora(llama, "*_proj.weight", rank=2, alpha=4)), WORDS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_is_measured(name):
    make, batch = CASES[name]
    expected = ff.memory(make(), batch)
    measured = taken(make, batch)
    assert expected.peak - expected.batch == pytest.approx(measured, rel=0.02)


def test_grouped_heads_are_counted_one_by_one():
    """Transformers takes tensors without values for a trace, and then repeats the heads that are shared."""
    make = functools.partial(plan, functools.partial(llama, 2))
    expected = ff.memory(make(), WORDS)
    measured = taken(make, WORDS)
    assert measured < expected.peak - expected.batch < 1.1 * measured


@pytest.mark.parametrize("name", sorted(set(zoo.SPECIMENS) - {"intermittent"}))
def test_parts_are_those_of_the_state(name):
    """Also of models with tied, frozen, unused and half-precision parameters."""
    chosen, batch = zoo.plan_of(name, average=ff.ema(0.5)), zoo.SPECIMENS[name].batch(4)
    told = ff.memory(chosen, batch)
    program = ff.single(chosen)
    state = program.init(0)

    def held(tree: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors(tree))

    assert told.parameters == held(state.params)
    assert told.averages == held(state.ema)
    assert told.frozen == held(dict(state.frozen))
    assert told.slots == held(state.opt)
    assert told.buffers == sum(tensor.numel() * tensor.element_size() for tensor in state.buffers.values())


def test_activations_are_fewer_where_blocks_run_again():
    kept, again = ff.memory(plan(), WORDS), ff.memory(plan(recomputed), WORDS)
    assert again.activations < kept.activations / 2
    assert (again.parameters, again.slots) == (kept.parameters, kept.slots)
    halves = ff.memory(plan(microbatches=2), WORDS)
    assert halves.activations == pytest.approx(kept.activations / 2, rel=0.05)


def test_nothing_is_allocated():
    def huge() -> nn.Module:
        return nn.Sequential(nn.Linear(2**18, 2**18), nn.ReLU(), nn.Linear(2**18, 16))

    with torch.device("meta"):
        batch = torch.empty(2**12, 2**18), torch.empty(2**12, 16)
    held, told = most_held(lambda: ff.memory(plan(huge, ff.losses.mse), batch))
    assert held < 2**20
    assert told.parameters > 2**38
    assert told.peak > told.parameters + told.gradients + told.slots + told.activations


def test_a_module_is_left_as_it_is():
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    told = ff.memory(plan(model, ff.losses.cross_entropy), labelled(6))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert told == ff.memory(plan(classifier, ff.losses.cross_entropy), labelled(6))


def test_it_prints_as_a_table():
    told = ff.memory(plan(classifier, ff.losses.cross_entropy), labelled(6))
    lines = str(told).splitlines()
    assert len(lines) == len(attrs.fields(type(told)))
    assert lines[0].split() == ["parameters", "0.0", "MiB"]


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.ones(1) * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Branches, branching(True, False), "the model or the loss looks at a value"),
        (Looking, labelled(6), "the model cannot be built on the meta device .*give the plan a module"),
        (classifier().requires_grad_(False), labelled(6), "Sequential has no parameter that is trained"),
    ],
)
def test_what_cannot_be_told_without_values_is_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        ff.memory(plan(model, ff.losses.cross_entropy), batch)

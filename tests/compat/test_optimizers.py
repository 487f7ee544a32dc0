"""The optimizers that arguments name, and which parameters decay: as transformers has them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer
from transformers import TrainingArguments as TheirArguments
from transformers.optimization import Adafactor as TheirAdafactor

import forgather_fn as ff
from forgather.ml.trainer.adafactor import Adafactor
from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.live_optimizer import adopted
from forgather.ml.trainer.optimizers import decay_parameter_names, optimizer_class_and_kwargs

CASES: list[dict[str, Any]] = [
    {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_epsilon": 1e-6},
    {"optim": "adamw_torch_fused"},
    {"optim": "sgd"},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
    {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
    {"optim": "rmsprop", "optim_args": "momentum=0.9,alpha=0.5,centered=true"},
    {"optim": "adafactor"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_class_and_arguments_are_those_of_transformers(case: dict[str, Any]) -> None:
    theirs = TheirArguments("x", learning_rate=0.01, **case)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(theirs)
    ours, own = optimizer_class_and_kwargs(TrainingArguments("x", learning_rate=0.01, **case))
    assert own == kwargs
    assert (ours.__name__, issubclass(ours, torch.optim.Optimizer)) == (kind.__name__, True)


@pytest.mark.parametrize(
    ("optim", "text", "message"),
    [
        ("sgd", "momentun=0.9", "'momentun=0.9' is not one: sgd takes momentum"),
        ("sgd", "momentum=much", "'momentum=much' has no number"),
        ("adamw_torch", "momentum=0.9", "takes none; see adam_beta1"),
        ("rmsprop", "alpha", "'alpha' is not one"),
    ],
)
def test_optim_args_that_an_optimizer_does_not_take_are_refused(optim: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingArguments("x", optim=optim, optim_args=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": 0.01, "scale_parameter": False, "relative_step": False, "weight_decay": 0.1},
        {"lr": 0.01, "scale_parameter": True, "relative_step": False, "beta1": 0.9, "clip_threshold": 0.5},
        {"warmup_init": True},
        {},
    ],
    ids=str,
)
def test_adafactor_is_that_of_transformers_bit_for_bit(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(5, 3), (7,), (2, 3, 4), ()]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizers = Adafactor(ours, **kwargs), TheirAdafactor(theirs, **kwargs)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(dtype)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    if dtype == torch.float32:  # in bfloat16 small steps are lost
        assert not any(torch.equal(one, value) for one, value in zip(ours, start, strict=True))
    for one, other in zip(ours, theirs, strict=True):
        state, expected = optimizers[0].state[one], optimizers[1].state[other]
        assert state.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(expected[name])) for name in state)


def test_adafactor_refuses_a_rate_that_is_given_and_found() -> None:
    with pytest.raises(ValueError, match="Cannot combine manual `lr`"):
        Adafactor([nn.Parameter(torch.zeros(2))], lr=0.1)


class Named(nn.Module):
    """Names that a pattern might take wrongly: ``bias`` anywhere, ``norm`` only as a whole word or at an end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(2, 2, bias=False)
        self.input_norm = nn.Linear(2, 2, bias=False)
        self.normal = nn.Linear(2, 2, bias=False)
        self.normed = nn.ModuleDict({"rmsnorm_a": nn.Linear(2, 2), "b": nn.LayerNorm(2)})
        self.unbiased = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.zeros(2))


def models() -> list[nn.Module]:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return [
        Named(),
        nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2))),
        BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **small)),
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **small)),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_the_parameters_that_decay_are_those_of_transformers(model: nn.Module) -> None:
    expected = Trainer.get_decay_parameter_names(None, model)  # it does not look at itself
    assert sorted(decay_parameter_names(model)) == sorted(expected)
    assert 0 < len(expected) < len(list(model.parameters()))


def test_rates_that_change_lay_nothing_out_anew() -> None:
    """A schedule changes the rates of all groups at every step: what is derived of the layout must stay."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    groups = [{"params": list(layer.parameters()), "lr": 0.1 * (i + 1)} for i, layer in enumerate(model)]
    optimizer = torch.optim.AdamW(groups)
    held = adopted(optimizer, model)
    program = ff.single(ff.Plan(model=model, loss=ff.losses.cross_entropy, optimizer=held.as_optimizer(), schedule=1.0))
    state, batch = program.init(0), (torch.randn(6, 4), torch.arange(6) % 3)
    seen: list[Any] = []
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] /= 2.0
        state, _ = program.step(state, batch)
        params = state.read().params
        seen.append((params, [calls for _, calls in params.kept["kernel calls"].values()]))
    assert all(params is seen[0][0] for params, _ in seen)
    assert all(calls[0] is seen[0][1][0] and len(calls) == 1 for _, calls in seen)

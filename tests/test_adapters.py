"""Low-rank adapters: the model's numbers at first, those of peft afterwards, and a plain model in the end."""

import copy
from typing import Any

import attrs
import peft
import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn import adapters
from forgather_fn.activation_checkpointing import activation_checkpointed
from tests import specimens, zoo
from tests.toys import assert_equal, classifier, decaying, labelled, labelled_batches, program

MATCHES = {"llama": "*.[qv]_proj.weight", "gpt2": "*.c_attn.weight", "bert": "*.query.weight", "mlp": "*weight"}


def adapted(name: str, **options: Any) -> nn.Module:
    given: dict[str, Any] = {"rank": 2, "alpha": 3.0} | options
    return ff.lora(zoo.instance(name), given.pop("match", MATCHES.get(name, "*weight")), **given)


def drawn(module: nn.Module) -> nn.Module:
    """Give every factor values, as after some training."""
    generator = torch.Generator().manual_seed(7)
    for adapter in adapters.adapters_of(module).values():
        for factor in (adapter.A, adapter.B):
            factor.data = 0.1 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    return module


def embedder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Flatten(), nn.Linear(24, 5))


TOKENS = torch.tensor([[1, 2, 0, 3], [4, 4, 10, 0], [9, 8, 7, 6]])


@pytest.mark.parametrize("name", sorted(MATCHES))
def test_the_first_outputs_are_the_models(name):
    batch = zoo.SPECIMENS[name].batch(4)
    plain, made = (
        ff.single(zoo.plan_of(name, model=zoo.instance(name))),
        ff.single(zoo.plan_of(name, model=adapted(name))),
    )
    assert plain.evaluate(plain.init(0), [batch]) == made.evaluate(made.init(0), [batch])


@pytest.mark.parametrize("name", sorted(MATCHES))
def test_adapters_alone_are_trained_and_the_rest_is_shared(name):
    made = ff.single(zoo.plan_of(name, model=adapted(name)))
    state = made.init(0)
    before, frozen = state.copy(), dict(state.frozen)
    state = ff.fold(made.step, state, [zoo.SPECIMENS[name].batch(4)] * 2)
    assert {parameter.rpartition(".")[0].rpartition(".")[2] for parameter in state.params} == {"lora"}
    assert all(not torch.equal(before.params[n], tensor) for n, tensor in state.params.items())
    assert all(state.frozen[n] is tensor and torch.equal(before.frozen[n], tensor) for n, tensor in frozen.items())


@pytest.mark.parametrize(
    ("build", "options", "match", "batch"),
    [
        (
            lambda: zoo.instance("llama"),
            {"target_modules": ["q_proj", "v_proj"]},
            "*.[qv]_proj.weight",
            specimens.words(4),
        ),
        (
            lambda: zoo.instance("gpt2"),
            {"target_modules": ["c_attn"], "fan_in_fan_out": True},
            "*.c_attn.weight",
            specimens.words(4),
        ),
        (embedder, {"target_modules": ["0", "2"]}, "*weight", (TOKENS, torch.tensor([0, 4, 2]))),
    ],
    ids=["llama", "gpt2", "embedder"],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_step_is_that_of_peft(build, options, match, batch):
    """The same first factors, and from there the same updates by torch's AdamW."""
    config = peft.LoraConfig(r=2, lora_alpha=3, **options)
    theirs = peft.get_peft_model(build(), config)
    ours = ff.lora(build(), match, rank=2, alpha=3)
    named = dict(theirs.named_parameters())
    pairs = {}
    for name, adapter in adapters.adapters_of(ours).items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        for factor, mine in (("A", adapter.A), ("B", adapter.B)):
            kinds = (f"{layer}.lora_{factor}.default.weight", f"{layer}.lora_embedding_{factor}.default")
            found = next(kind for kind in kinds if kind in named)
            mine.data.copy_(named[found])
            pairs[f"{name.removesuffix('weight')}lora.{factor}"] = named[found]
    assert len(pairs) == sum(p.requires_grad for p in named.values())
    loss = ff.losses.cross_entropy if isinstance(batch, tuple) else ff.losses.causal_lm
    made = program(ours, loss=loss)
    state = made.init(0)
    optimizer = torch.optim.AdamW(decaying(theirs, 0.1), lr=1e-2, fused=True)
    theirs.train()
    for _ in range(4):
        state, metrics = made.step(state, batch)
        optimizer.zero_grad()
        inputs = {"input_ids": batch["input_ids"]} if isinstance(batch, dict) else None
        found = loss(theirs(**inputs) if inputs else theirs(batch[0]), batch).value()
        found.backward()
        optimizer.step()
        assert float(metrics["loss"].value()) == pytest.approx(float(found.detach()), rel=1e-6)
        for name, tensor in pairs.items():
            torch.testing.assert_close(
                state.params[name], tensor.detach(), rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", sorted(MATCHES))
def test_a_merged_model_is_plain_and_says_the_same(name):
    made = ff.single(zoo.plan_of(name, model=drawn(adapted(name))))
    state, batch = made.init(0), zoo.SPECIMENS[name].batch(4)
    model = adapters.merged(made.export(state))
    plain = zoo.instance(name)
    assert type(model) is type(plain)
    assert not [child for child in model.modules() if "forward" in vars(child)]
    plain.load_state_dict(model.state_dict())  # strictly
    after = ff.single(zoo.plan_of(name, model=plain))
    expected, found = made.evaluate(state, [batch]), after.evaluate(after.init(0), [batch])
    assert found == pytest.approx(expected, rel=1e-5)
    assert made.evaluate(state, [batch]) == expected  # the program's own module still has its adapters
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("build", [embedder, lambda: zoo.instance("gpt2")])
def test_unmerged_is_the_inverse_up_to_the_stated_rounding(build, dtype):
    def fresh(model: nn.Module) -> nn.Module:
        return ff.lora(model, "*weight" if isinstance(model, nn.Sequential) else "*.c_*.weight", rank=2, alpha=3)

    model = drawn(fresh(build().to(dtype)))
    before = copy.deepcopy(model.state_dict())
    again = adapters.unmerged(fresh(adapters.merged(model)), before)
    u = torch.finfo(dtype).eps / 2
    changed = 0
    for name, adapter in adapters.adapters_of(again).items():
        old, new = before[name].double(), again.state_dict()[name].double()
        sums = (old + adapter.delta(adapter.A.detach(), adapter.B.detach()).double()).abs()
        assert ((new - old).abs() <= u * (sums + new.abs()) * (1 + 4 * u)).all(), name
        changed += int((new != old).sum())
    assert (changed > 0) or dtype == torch.float64
    for name, tensor in before.items():
        if "lora" in name:
            assert torch.equal(again.state_dict()[name], tensor)


def test_folding_keeps_the_outputs_and_begins_the_adapters_anew():
    model = embedder()
    made = program(lambda: drawn(ff.lora(copy.deepcopy(model), "*weight", rank=2, alpha=3)), average=ff.ema(0.5))
    state = made.init(0)
    kept = state.copy()
    expected = made.apply(state, TOKENS)
    restarted = adapters.restarted(made, state)
    torch.testing.assert_close(made.apply(restarted, TOKENS), expected, rtol=1e-5, atol=1e-6)
    assert not restarted.params["0.lora.A"].any()
    assert not restarted.params["2.lora.B"].any()
    assert not restarted.ema["2.lora.B"].any()
    assert not torch.equal(restarted.frozen["2.weight"], state.frozen["2.weight"])
    assert_equal(state, kept)
    plain = program(lambda: copy.deepcopy(model))
    whole = made.convert(restarted, plain, dropping=["*.lora.*"])
    assert torch.equal(plain.apply(whole, TOKENS), made.apply(restarted, TOKENS))


@pytest.mark.parametrize(
    "optimizer",
    [
        ff.optim.schedule_free_adamw(),
        ff.optim.partitioned({"all": ("*", ff.optim.lookahead(ff.sgd(), steps=2))}),
        ff.optim.master_weights(ff.optim.lookahead(ff.sgd(), steps=2)),
    ],
    ids=["schedule_free", "lookahead", "master_weights"],
)
def test_optimizers_that_keep_parameters_do_not_undo_a_folding(optimizer):
    """With a rate of 0 the next updates leave what was begun anew at zero."""
    made = program(
        ff.lora(lambda: classifier().bfloat16(), "*weight", rank=2, alpha=4),
        optimizer=optimizer,
        schedule=ff.schedules.piecewise(boundaries=(3,), values=(0.1, 0.0)),
    )
    batches = [(x.bfloat16(), y) for x, y in labelled_batches(5)]
    restarted = adapters.restarted(made, ff.fold(made.step, made.init(0), batches[:3]))
    expected = made.evaluate(restarted, batches)
    final = ff.fold(made.step, restarted, batches[3:])
    assert not final.params["2.lora.B"].any()
    assert made.evaluate(final, batches) == expected


def test_a_state_of_the_plain_model_is_converted():
    plain = program(classifier)
    state = ff.fold(plain.step, plain.init(0), labelled_batches(3))
    made = program(ff.lora(classifier, "*weight", rank=2, alpha=4))
    moved = plain.convert(state, made)
    batch = labelled(6, seed=9)
    assert made.evaluate(moved, [batch]) == plain.evaluate(state, [batch])
    assert set(moved.params) == {f"{layer}.lora.{factor}" for layer in (0, 2) for factor in "AB"}
    moved = ff.fold(made.step, moved, labelled_batches(3))
    assert moved.step == 6


def test_what_else_is_trained():
    made = program(ff.lora(classifier, "0.weight", rank=2, alpha=4, also="2.*"))
    assert set(made.init(0).params) == {"0.lora.A", "0.lora.B", "2.weight", "2.bias"}


def test_factories_say_what_they_make():
    factory = ff.lora(classifier, "*weight", rank=2, alpha=4)
    text = program(factory).plan.describe()["model"]
    assert text == "lora(tests.toys.classifier, match='*weight', rank=2, alpha=4, dropout=0.0, also='')"


def test_dropout_is_of_what_adapters_are_given():
    model = drawn(ff.lora(classifier(), "0.weight", rank=2, alpha=4, dropout=0.5))
    made = program(model)
    state = made.init(0)
    one, two = (made.gradients(state, labelled(6))[0].views["0.lora.A"].clone() for _ in range(2))
    assert torch.equal(one, two)
    other = made.gradients(attrs.evolve(state, step=1), labelled(6))[0].views["0.lora.A"]
    assert not torch.equal(one, other)


def test_checkpointed_blocks_have_adapters():
    states = []
    for wrap in (lambda model: model, lambda model: activation_checkpointed(model, "model.layers.*")):
        made = ff.single(zoo.plan_of("llama", model=wrap(drawn(adapted("llama", dropout=0.5)))))
        states.append(ff.fold(made.step, made.init(0), [specimens.words(4)] * 2))
    assert_equal(*states)


def test_adapters_on_the_meta_device_and_by_name():
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return ff.lora(specimens.llama(), "*.q_proj.weight", rank=2, alpha=4)

    def on_host() -> nn.Module:
        return ff.lora(specimens.llama(), "*.q_proj.weight", rank=2, alpha=4)

    states = [ff.single(zoo.plan_of("llama", model=build, init="by_name")).init(0) for build in (on_meta, on_host)]
    assert_equal(*states)
    assert all(tensor.any() == name.endswith("A") for name, tensor in states[0].params.items())


def test_a_compiled_step_agrees():
    states = []
    for fields in ({}, {"compile": True, "backend": "aot_eager"}):
        made = program(ff.lora(classifier, "*weight", rank=2, alpha=4), **fields)
        states.append(ff.fold(made.step, made.init(0), labelled_batches(2)))
    for name, weight in states[0].params.items():
        torch.testing.assert_close(states[1].params[name], weight, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.block = nn.TransformerEncoderLayer(4, 2, 8)
        self.conv = nn.Conv1d(4, 4, 1)
        self.scaled = Scaled(4, 4)
        self.tied = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.tied.weight


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("attention.out_proj.*", r"attention\.out_proj\.weight is read by its MultiheadAttention past"),
        ("attention.in_proj_weight", "in_proj_weight is of a MultiheadAttention; there are adapters for"),
        ("block.linear1.weight", r"block\.linear1\.weight is read by its TransformerEncoderLayer past"),
        ("conv.*", r"conv\.weight is of a Conv1d; there are adapters for the weights of nn\.Linear"),
        ("scaled.*", r"scaled\.weight is of a Scaled; there are adapters"),
        ("tied.weight", r"tied\.weight is also 'twin\.weight'; an adapter would change one use"),
        ("head.*", r"match='head\.\*' chooses nothing of 'attention\.in_proj_weight', "),
        ("tied.bias", "match='tied.bias' chooses nothing"),
        (lambda name, tensor: name == "tied.bias", "tied.bias is of a Linear; there are adapters for the weights"),
    ],
)
def test_weights_that_an_adapter_cannot_stand_for_are_refused(match, message):
    with pytest.raises(ValueError, match=message):
        ff.lora(Attending(), match, rank=1, alpha=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"also": "head.*"}, r"also='head\.\*' chooses nothing"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ff.lora(classifier(), "0.weight", **({"rank": 2, "alpha": 4.0} | options))


def test_modules_in_use_are_refused():
    made = program(classifier())
    state = made.init(0)
    with pytest.raises(ValueError, match="lora: the module stands on a state of a program"):
        ff.lora(made.module(), "0.weight", rank=1, alpha=1)
    twice = ff.lora(made.export(state), "0.weight", rank=1, alpha=1)
    with pytest.raises(ValueError, match=r"has adapters already: '0\.weight'"):
        ff.lora(twice, "2.weight", rank=1, alpha=1)
    with pytest.raises(ValueError, match="merged: Sequential has no adapters"):
        adapters.merged(made.export(state))
    with pytest.raises(ValueError, match=r"unmerged: 0\.lora\.A is missing"):
        adapters.unmerged(twice, {})
    with pytest.raises(ValueError, match=r"merged: the layer of 0\.weight was wrapped by something else"):
        adapters.merged(activation_checkpointed(twice, "0"))

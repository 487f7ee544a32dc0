import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forgather_fn.activation_checkpointing import activation_checkpointed
from forgather_fn.pipeline.cuts import SplitError, cuts_of, registered
from forgather_fn.pipeline.freeing import filled, free
from forgather_fn.pipeline.probe import Flow, probe
from forgather_fn.pipeline.stage import cut_stage
from tests.pipeline.models import MODELS, Block, Plain, words

CPU = torch.device("cpu")


def inputs(masked: bool, **sizes: int) -> dict[str, Tensor]:
    batch = words(**sizes)
    return {name: batch[name] for name in (["input_ids", "attention_mask"] if masked else ["input_ids"])}


def logits(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def stage_of(whole: nn.Module, flow: Flow, stage: int) -> nn.Module:
    own = copy.deepcopy(whole)
    free(own, lambda name: stage not in flow.assignment.params[name], CPU)
    return own


def chained(whole: nn.Module, flow: Flow, given: dict[str, Tensor]) -> Any:
    """Run stage after stage, each on a copy of the model that has the parameters of that stage only."""
    hidden = None
    for stage in range(flow.assignment.stages):
        own = stage_of(whole, flow, stage)
        hidden = cut_stage(own, flow, stage).run(hidden, lambda own=own: own(**given))  # type: ignore[misc]
    return hidden


@pytest.mark.parametrize("side", ["end", "beginning"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_stages_one_after_the_other_are_the_model(name: str, masked: bool, side: str) -> None:
    model = MODELS[name]
    whole = model.module()
    cuts = cuts_of(whole, model.spec(4, side))
    flow = probe(whole, cuts, lambda: whole(**inputs(masked, samples=1)))
    assert flow.assignment.params == registered(whole, cuts).params
    for other in (inputs(masked), inputs(masked, samples=3, time=9)):
        torch.testing.assert_close(logits(chained(whole, flow, other)), logits(whole(**other)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_stage_is_probed_as_the_whole_is(name: str) -> None:
    model = MODELS[name]
    whole = model.module()
    cuts = cuts_of(whole, model.spec(2))
    flow = probe(whole, cuts, lambda: whole(**inputs(True)))
    own = stage_of(whole, flow, 1)
    again = probe(own, cuts, lambda: own(**inputs(True)))
    assert again.assignment == flow.assignment
    assert [c.cut for c in again.crossings] == [c.cut for c in flow.crossings]
    assert [set(one) for one in again.skipped] == [set(one) for one in flow.skipped]


def test_a_stage_has_its_parameters_under_their_names_and_no_memory_of_others() -> None:
    whole = MODELS["llama_tied"].module()
    flow = probe(whole, cuts_of(whole, {"model.layers.3": "end"}), lambda: whole(**inputs(False)))
    own = stage_of(whole, flow, 1)
    names = set(dict(own.named_parameters()))
    assert names == {"model.embed_tokens.weight", "model.norm.weight"} | {
        name for name in dict(whole.named_parameters()) if any(f"layers.{i}." in name for i in range(4, 8))
    }
    stand = own.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    assert stand.untyped_storage().nbytes() == 4
    there = dict(whole.named_parameters(remove_duplicate=False))
    filled(own, lambda place, instead: there[place])
    assert own.state_dict().keys() == whole.state_dict().keys()


def test_the_model_is_left_as_it_was() -> None:
    whole = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    whole[0].eval()
    before = copy.deepcopy(whole.state_dict())
    generator = torch.get_rng_state()
    flow = probe(whole, cuts_of(whole, {"1": "end"}), lambda: whole(torch.randn(4, 3)))
    cut_stage(whole, flow, 1).run(torch.zeros(4, 3), lambda: whole(torch.randn(4, 3)))
    torch.testing.assert_close(whole.state_dict(), before, rtol=0, atol=0)
    assert not whole[0].training
    assert whole[1].training
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in whole.modules())
    assert all("forward" not in vars(child) for child in whole.modules())
    del generator


def test_modules_before_a_stage_do_not_run() -> None:
    whole = Plain()
    flow = probe(whole, cuts_of(whole, {"layer.3": "end"}), lambda: whole(**inputs(True)))
    ran = []
    for name, child in whole.named_modules():
        child.register_forward_hook(lambda *args, name=name: ran.append(name))  # type: ignore[misc]
    cut_stage(whole, flow, 1).run(torch.zeros(8, 6, 16), lambda: whole(**inputs(True)))
    assert not [name for name in ran if name.startswith("layer.0.")]
    assert "layer.4.lift" in ran


def test_hooks_of_users_act_once_on_what_crosses() -> None:
    whole = Plain()
    whole.layer[3].register_forward_hook(lambda module, args, output: output * 2)
    flow = probe(whole, cuts_of(whole, {"layer.3": "end"}), lambda: whole(**inputs(True)))
    torch.testing.assert_close(chained(whole, flow, inputs(True)), whole(**inputs(True)), rtol=0, atol=0)


class Skipping(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        first = hidden = self.embed(input_ids) * self.scale
        for layer in self.layer:
            hidden = layer(hidden)
        return self.head(self.norm(hidden + first))


class Deciding(Plain):
    """What crosses is no gradient, but a choice made from a hidden state."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        chosen = hidden.sum(-1, keepdim=True) > 0
        for layer in self.layer:
            hidden = layer(hidden)
        return self.head(self.norm(torch.where(chosen, hidden, -hidden)))


@pytest.mark.parametrize(
    ("model", "spec", "said"),
    [
        (
            Skipping(),
            {"layer.3": "end"},
            "the model itself, after the cut, reads what the model itself has made before",
        ),
        (Deciding(), {"layer.3": "end"}, "reads what the model itself has made"),
        (
            Plain(),
            {"layer.3.lower": "end"},
            r"'layer.3', after the cut, reads what 'embed|the model itself has made|'layer.2'",
        ),
        (Plain(), {"layer.3.lift": "beginning"}, "after the cut, reads what 'layer.2"),
        (Plain(), {"layer.3.norm": "beginning", "layer.3.norm": "end"}, "after the cut"),  # noqa: F601 - meant
    ],
)
def test_connections_over_a_cut_are_refused_with_both_modules(model: nn.Module, spec: Any, said: str) -> None:
    with pytest.raises(SplitError, match=said):
        probe(model, cuts_of(model, spec), lambda: model(**inputs(True)))


def test_the_modules_of_a_connection_are_named() -> None:
    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle, self.up = nn.Linear(3, 3), nn.Linear(3, 3), nn.Bilinear(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            down = self.down(x)
            return self.up(self.middle(down), down)

    model = Unet()
    with pytest.raises(SplitError, match="'up', after the cut, reads what 'down' has made before it"):
        probe(model, cuts_of(model, {"middle": "end"}), lambda: model(torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "expected a mapping"),
        ({"layer.3": "middle"}, "not at 'middle'"),
        ({"layers.3": "end"}, "no module 'layers.3'; it has 'layer.3'"),
        ({"head": "end"}, "after the end of 'head' no module is left for the last stage"),
        ({"embed": "beginning"}, "before the beginning of 'embed' no module is left for the first stage"),
        ({"layer.3": "end", "layer.4": "beginning"}, "one place"),
        ({"layer.3": "end", "layer.3.dropout": "end"}, "one place"),
    ],
)
def test_specs_that_cannot_be(spec: Any, said: str) -> None:
    with pytest.raises(SplitError, match=said):
        cuts_of(Plain(), spec)


def test_cuts_are_in_the_order_of_the_model() -> None:
    assert [cut.name for cut in cuts_of(Plain(), {"layer.5": "end", "layer.2": "beginning"})] == ["layer.2", "layer.5"]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, x: m[0](x), "passed not at all"),
        (lambda m, x: m[1](m[1](m[0](x))), "passed 2 times|have done nothing|side by side"),
        (lambda m, x: m[2](m[1](x)), "no parameter|not at all"),
    ],
)
def test_models_that_do_not_run_through_their_cuts(run: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(SplitError, match=said):
        probe(model, cuts_of(model, {"0": "end", "1": "end"}), lambda: run(model, torch.ones(2, 3)))


class Recomputing(Block):
    """As blocks of transformers do it: around the call, hooks and all."""

    def __call__(self, *args: Any) -> Any:
        return checkpoint(super().__call__, *args, use_reentrant=False)


class Recomputed(Plain):
    def __init__(self, glue: float) -> None:
        super().__init__()
        self.glue = glue
        self.layer = nn.ModuleList(Recomputing(16, 0.0) for _ in range(8))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layer:
            hidden = layer(hidden + self.glue if self.glue else hidden)
        return self.head(hidden)


def test_a_beginning_is_the_end_of_the_module_before_where_there_is_nothing_between() -> None:
    model = Recomputed(glue=0)
    flow = probe(model, cuts_of(model, {"layer.3": "beginning"}), lambda: model(**inputs(True)))
    assert str(flow.crossings[0].cut) == "the end of 'layer.2'"
    hidden = torch.zeros(8, 6, 16, requires_grad=True)
    cut_stage(model, flow, 1).run(hidden, lambda: model(**inputs(True))).sum().backward()
    assert hidden.grad is not None


def test_a_beginning_that_would_be_recomputed_without_its_hidden_state_is_refused() -> None:
    model = Recomputed(glue=1)
    flow = probe(model, cuts_of(model, {"layer.3": "beginning"}), lambda: model(**inputs(True)))
    with pytest.raises(SplitError, match="activation checkpointing"):
        cut_stage(model, flow, 1).run(torch.zeros(8, 6, 16, requires_grad=True), lambda: model(**inputs(True)))


@pytest.mark.parametrize("recompute", ["blocks", "hugging_face"])
def test_stages_with_activation_checkpointing_have_the_gradients_of_the_model(recompute: str) -> None:
    model = MODELS["llama" if recompute == "hugging_face" else "plain"]
    whole = model.module()
    logits(whole(**inputs(True))).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    flow = probe(whole, cuts_of(whole, model.spec(2)), lambda: whole(**inputs(True)))
    whole.zero_grad()
    if recompute == "blocks":
        activation_checkpointed(whole, Block)
    else:
        whole.activation_checkpointing_enable()  # type: ignore[operator]
    first = cut_stage(whole, flow, 0).run(None, lambda: whole(**inputs(True)))
    second = cut_stage(whole, flow, 1).run(first, lambda: whole(**inputs(True)))
    logits(second).square().sum().backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)

"""Law 7: a compiled step does what the step does that is not compiled."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import toolz
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import list_backends, register_backend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

import forgather_fn as ff
from forgather_fn import testing, tree
from forgather_fn.compiler import CompileError
from forgather_fn.demo.model import Transformer
from forgather_fn.gradient import Gradients
from forgather_fn.plan import Plan
from tests import specimens, toys
from tests.zoo import SPECIMENS, plan_of

STEPS = 4
compiled = functools.partial(plan_of, compile=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget the graphs of other tests, which hold their models."""
    yield
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """Count the graphs that were made so far."""
    return counters["stats"]["unique_graphs"]


def trained(plan: Plan, batch: Any, steps: int = STEPS) -> tuple[ff.TrainState, list[Mapping[str, float]]]:
    program = ff.single(plan)
    state, seen = program.init(0), []
    for _ in range(steps):
        state, metrics = program.step(state, batch)
        seen.append({name: float(metric) for name, metric in metrics.items()})
    return state, seen


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    ones, others = dict(tree.walk(one.as_tree())), dict(tree.walk(other.as_tree()))
    assert ones.keys() == others.keys()
    for path, leaf in ones.items():
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(
                others[path], leaf, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}"
            )
        else:
            assert others[path] == leaf, path


FEATURES: dict[str, dict[str, Any]] = {
    "clipped": {"transforms": (ff.clipped(0.1),)},
    "average": {"average": ff.ema(0.9), "optimizer": ff.adam(weight_decay=0.1)},
    "microbatches": {"microbatches": 3, "transforms": (ff.clipped(0.1),)},
    "unrolled": {"microbatches": 3, "unroll": True, "transforms": (ff.stateless(torch.tanh),)},
    "large": {"viewed_elements": 0, "donate": False, "transforms": (ff.clipped(0.1),)},
    "large_microbatches": {"viewed_elements": 0, "microbatches": 2, "average": ff.ema(0.5)},
    "groups": {
        "optimizer": ff.adamw(groups=[ff.group("*bias", learning_rate=3.0, weight_decay=0.2)]),
        "on_nonfinite": "skip",
        "transforms": (ff.chain(ff.stateless(torch.tanh), ff.clipped(0.1)),),
    },
    "momentum": {"optimizer": ff.sgd(momentum=0.9, nesterov=True, weight_decay=0.1), "donate": False},
    "plain": {"optimizer": ff.sgd(groups=[ff.group("*weight", learning_rate=0.3)])},
}

MATRIX = [
    ("mlp", "clipped"),
    ("mlp_mse", "momentum"),
    ("mlp_function", "microbatches"),
    ("mlp_own_loss", "plain"),
    ("batchnorm", "large_microbatches"),
    ("tied_by_object", "unrolled"),
    ("tied_by_storage", "large"),
    ("partly_frozen", "average"),
    ("unused", "large"),
    ("odd", "microbatches"),
    ("two_dtypes", "average"),
    ("dropout", "microbatches"),
    ("llama", "clipped"),
    ("gpt2_dropout", "average"),
    ("bert", "groups"),
    ("vit", "average"),
]
"""Every model and every feature, not all of their pairs."""


@pytest.mark.parametrize(("name", "feature"), MATRIX)
def test_compiled_equals_eager(name: str, feature: str) -> None:
    exact = {} if name == "two_dtypes" else {"precision": "float64"}
    fields = {**exact, "schedule": lambda step: 1e-2 / (1 + step), **FEATURES[feature]}
    eager = {**fields, "unroll": False}
    batch = SPECIMENS[name].batch(7)  # which 2 and 3 microbatches do not divide
    expected, wanted = trained(plan_of(name, **eager), batch)
    state, seen = trained(compiled(name, **fields), batch)
    tolerance = 1e-6 if name == "two_dtypes" else 1e-10
    assert_close(expected, state, tolerance)
    for ours, theirs in zip(seen, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_every_model_and_feature_is_tested() -> None:
    outside = {"intermittent", "reassigning", "half", "groupnorm", "gpt2"}
    assert {name for name, _ in MATRIX} == set(SPECIMENS) - outside
    assert {feature for _, feature in MATRIX} == set(FEATURES)


@pytest.mark.parametrize("viewed_elements", [0, toys.VIEWED])
def test_counts_of_updates_may_differ(viewed_elements: int) -> None:
    """A parameter that was left out for some steps has a bias correction of its own."""
    batch = SPECIMENS["mlp"].batch(6)
    states = []
    for change in ({}, {"compile": True, "backend": "aot_eager"}):
        program = ff.single(plan_of("mlp", precision="float64", viewed_elements=viewed_elements, **change))
        state = program.init(0)
        for step in range(4):
            gradients, buffers, _ = program.gradients(state, batch)
            if step < 2:
                kept = {name: view for name, view in gradients.views.items() if name != "0.bias"}
                active = tuple(name in kept for name in gradients.layout.index)
                gradients = Gradients(
                    gradients.layout, active, kept, gradients.flat, gradients.samples, gradients.weight
                )
            state, _ = program.update(state, gradients, buffers)
        states.append(state)
    assert_close(*states, 1e-12)
    assert states[1].opt["count"].tolist() == [4, 2, 4, 4]


class TestGraphs:
    """How many there are."""

    def test_one_for_all_steps(self) -> None:
        program = ff.single(
            compiled("batchnorm", schedule=lambda step: 0.1 / (step + 1), transforms=(ff.clipped(1.0),))
        )
        state = program.init(0)
        for size in (8, 8, 8):
            state, _ = program.step(state, specimens.images(size))
        assert graphs() == 1
        state, _ = program.step(state.copy(), specimens.images(8))
        program.step(program.init(5), specimens.images(8))
        state, _ = program.step(state, specimens.images(8))
        assert graphs() == 1

    def test_a_ragged_end_of_an_epoch_needs_none_of_its_own(self) -> None:
        x, y = specimens.classes(22)
        stream = ff.batches((x, y), batch_size=8, last="ragged")  # 8, 8, 6
        program = ff.single(compiled("mlp"))
        sizes = [tick.batch.samples for tick in ff.until(steps=7)(program.steps(program.init(0), stream))]
        assert sizes == [8, 8, 6, 8, 8, 6, 8]
        assert graphs() == 1

    def test_microbatches_of_unequal_size_share_theirs(self) -> None:
        trained(compiled("dropout", microbatches=3), specimens.classes(8))  # 3, 3, 2
        assert graphs() == 2  # of a gradient, of the update

    def test_evaluations_between_need_none(self) -> None:
        program = ff.single(compiled("batchnorm"))
        state, _ = program.step(program.init(0), specimens.images(8))
        program.evaluate(state, [specimens.images(8)])
        before = graphs()
        state, _ = program.step(state, specimens.images(8))
        program.evaluate(state, [specimens.images(8)])
        state, _ = program.step(state, specimens.images(8))
        assert graphs() == before

    def test_lengths_of_sequences_need_two(self) -> None:
        program = ff.single(compiled("tied_by_object"))
        state = program.init(0)
        for time in (6, 5, 8, 4, 7, 3):
            words = specimens.words(4, time)
            state, _ = program.step(state, (words["input_ids"], words["labels"]))
        assert graphs() <= 2

    def test_too_many_graphs_are_told(self) -> None:
        program = ff.single(compiled("mlp"))
        state = program.init(0)
        x, y = specimens.classes(4)
        with torch._dynamo.config.patch(recompile_limit=1):
            state, _ = program.step(state, (x, y))
            with pytest.raises(CompileError):
                program.step(state, {"input": x, "labels": y, "more": x})
        assert not state.consumed

    def test_programs_do_not_share_a_limit(self) -> None:
        with torch._dynamo.config.patch(recompile_limit=2):
            for _ in range(3):
                trained(compiled("mlp"), specimens.classes(4), steps=1)


class TestRefused:
    """What cannot be compiled whole."""

    def test_the_line_that_breaks_the_graph_is_named(self) -> None:
        class Looking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = specimens.mlp()

            def forward(self, x: Tensor) -> Tensor:
                if x.sum() > 0:  # the line
                    x = -x
                out: Tensor = self.body(x)
                return out

        program = ff.single(compiled("mlp", model=Looking))
        state = program.init(0)
        with toys.unchanged(state), pytest.raises(CompileError) as caught:
            program.step(state, specimens.classes(4))
        message = str(caught.value)
        assert "branching" in message
        assert __file__ in message
        assert "if x.sum() > 0:  # the line" in message
        assert 'compile="model"' in message
        assert "TORCH" not in message

    @pytest.mark.parametrize(
        "change",
        [
            {"transforms": (ff.noise(0.1),)},
            {"transforms": (ff.chain(ff.clipped(1.0), ff.noise(0.1)),)},
            {"optimizer": ff.from_torch(lambda groups: torch.optim.RMSprop(groups))},
        ],
    )
    def test_parts_that_work_on_the_host(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r'works on the host.*compile="model"'):
            compiled("mlp", **change)

    def test_transforms_that_look_at_a_value(self) -> None:
        looking = ff.stateless(lambda gradient: gradient / float(gradient.abs().max()))
        program = ff.single(compiled("mlp", transforms=(looking,)))
        state = program.init(0)
        with toys.unchanged(state), pytest.raises(CompileError, match=r"test_compiled\.py"):
            program.step(state, specimens.classes(4))

    def test_states_of_optimizers_that_are_numbers(self) -> None:
        def update(gradients: Any, state: Any, params: Any, context: Any) -> Any:
            return {"steps": state["steps"] + 1}

        counting = ff.Optimizer(lambda params: {"steps": 0}, update, ff.sgd().groups)
        program = ff.single(compiled("mlp", optimizer=counting))
        with pytest.raises(ValueError, match="opt/steps is 0"):
            program.step(program.init(0), specimens.classes(4))

    def test_buffers_that_are_made_in_forward(self) -> None:
        program = ff.single(compiled("reassigning"))
        with pytest.raises(ValueError, match="makes or reshapes buffers"):
            program.step(program.init(0), SPECIMENS["reassigning"].batch(4))

    def test_hooks_of_parameters(self) -> None:
        model = specimens.mlp()
        model[0].weight.register_hook(torch.sign)
        program = ff.single(compiled("mlp", model=model))
        with pytest.raises(ValueError, match=r"0\.weight has a gradient hook"):
            program.step(program.init(0), specimens.classes(4))

    def test_unrolled_microbatches_that_draw_random_numbers(self) -> None:
        program = ff.single(compiled("dropout", microbatches=2, unroll=True))
        with pytest.raises(ValueError, match="draws random numbers"):
            program.step(program.init(0), specimens.classes(4))

    def test_unrolling_what_is_not_compiled(self) -> None:
        with pytest.raises(ValueError, match="needs compile=True"):
            plan_of("mlp", unroll=True)

    @pytest.mark.parametrize("value", [1, "whole", "True", None])
    def test_other_spellings(self, value: Any) -> None:
        with pytest.raises(ValueError, match="compile"):
            plan_of("mlp", compile=value)

    def test_mistakes_are_told_in_the_words_of_the_library(self) -> None:
        program = ff.single(compiled("mlp_mse"))
        state = program.init(0)
        with toys.unchanged(state), pytest.raises(ValueError, match="the prediction's shape"):
            program.step(state, (torch.randn(4, 5), torch.randn(4, 2)))


class TestNonFinite:
    """A step whose loss is not finite changes nothing."""

    batch = (torch.tensor([[math.inf] * 5] * 4), torch.zeros(4, dtype=torch.int64))

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_raise(self, microbatches: int) -> None:
        program = ff.single(compiled("mlp", average=ff.ema(0.5), microbatches=microbatches))
        state, _ = program.step(program.init(0), specimens.classes(4))
        with toys.unchanged(state), pytest.raises(ff.NonFiniteError, match="step 1"):
            program.step(state, self.batch)
        state, _ = program.step(state, specimens.classes(4))
        assert int(state.updates) == 2

    def test_skip(self) -> None:
        program = ff.single(compiled("mlp", average=ff.ema(0.5), on_nonfinite="skip"))
        state, _ = program.step(program.init(0), specimens.classes(4))
        before = state.copy()
        state, _ = program.step(state, self.batch)
        assert (int(state.skipped), int(state.updates), state.step) == (1, 1, 2)
        for held in ("params", "ema", "opt"):
            assert tree.difference(getattr(before, held), getattr(state, held)) is None


class TestLaws:
    """The laws hold of compiled steps."""

    batch = staticmethod(specimens.classes)

    @pytest.mark.parametrize("check", [testing.check_purity, testing.check_checkpoint])
    def test_purity_and_checkpoints(self, check: Callable[..., None]) -> None:
        check(compiled("dropout", average=ff.ema(0.5), transforms=(ff.clipped(1.0),)), self.batch(6))

    def test_resume(self) -> None:
        stream = ff.batches(self.batch(11), batch_size=4)
        testing.check_resume(compiled("dropout", microbatches=2), stream, steps=3)

    def test_a_step_is_gradients_and_update(self) -> None:
        program = ff.single(compiled("batchnorm", precision="float64", donate=False, transforms=(ff.clipped(0.1),)))
        state, batch = program.init(0), specimens.images(6)
        whole, metrics = program.step(state, batch, wants=frozenset({"gradient_norms"}))
        gradients, buffers, _ = program.gradients(state, batch)
        halves, _ = program.update(state, gradients, buffers)
        assert_close(whole, halves, 1e-12)
        for name, gradient in gradients.items():
            assert float(metrics[f"grad_norm/{name}"]) == pytest.approx(float(gradient.norm()), rel=1e-9, abs=1e-12)


def test_the_model_alone() -> None:
    """``compile="model"`` gives what the model gives that is not compiled, and graphs may break."""

    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = specimens.mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(-x if x.sum() > 0 else x)
            return out

    fields = {"model": Breaking, "precision": "float64", "optimizer": ff.from_torch(lambda g: torch.optim.RMSprop(g))}
    batch = specimens.ragged_classes(6)
    expected, _ = trained(plan_of("mlp", microbatches=2, **fields), batch)
    state, _ = trained(plan_of("mlp", microbatches=2, compile="model", backend="aot_eager", **fields), batch)
    assert graphs() > 1
    assert_close(expected, state, 1e-12)


def noting(seen: list[Any]) -> str:
    """Register a compiler that compiles nothing and notes the operations of each graph, writes made explicit."""

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    name = f"noting_{len(list_backends())}"
    register_backend(aot_autograd(fw_compiler=note, keep_inference_input_mutations=True), name=name)
    return name


LARGE: dict[str, Any] = {
    "adamw": lambda: ff.adamw(weight_decay=0.1),
    "sgd": lambda: ff.sgd(momentum=0.9),
    "lion": lambda: ff.optim.lion(),
    "schedule_free": lambda: ff.optim.schedule_free_adamw(),
    "muon": lambda: ff.optim.muon(),
    "partitioned": lambda: ff.optim.partitioned(
        {"matrices": ("*weight", ff.optim.lion()), "rest": ("*", ff.adamw(weight_decay=0.1))}
    ),
}


@pytest.mark.parametrize("optimizer", LARGE)
def test_a_large_model_is_updated_where_it_lies(optimizer: str) -> None:
    """A compiler writes to a slice of a buffer by going over all of the buffer, once for each parameter."""
    seen: list[Any] = []
    changes = {"optimizer": LARGE[optimizer](), "viewed_elements": 0, "transforms": (ff.clipped(0.1),)}
    expected, _ = trained(plan_of("mlp", **changes), specimens.classes(6))
    state, _ = trained(plan_of("mlp", compile=True, backend=noting(seen), **changes), specimens.classes(6))
    assert_close(expected, state, 1e-5)
    assert torch.ops.aten.as_strided_scatter.default in seen  # what is written to in place
    assert torch.ops.aten.slice_scatter.default not in seen


def transformer() -> nn.Module:
    return Transformer(width=16, layers=2, heads=2)


def tracked(plan: Plan, data: Any, start: Any = None) -> tuple[ff.TrainState, list[float]]:
    """Run 20 steps, or the rest of them; give the last state and all losses."""
    program = ff.single(plan)
    state = program.init(0) if start is None else program.restore(start)
    losses = []
    for tick in ff.until(steps=20)(program.steps(state, ff.batches(data, batch_size=8))):
        losses.append(float(tick.metrics["loss"]))
        state = tick.state
    return state, losses


INDUCTOR: dict[str, Any] = {"transforms": (ff.clipped(0.5),), "average": ff.ema(0.9), "schedule": 3e-3}


def test_inductor_equals_eager() -> None:
    fields, data = INDUCTOR | {"model": transformer, "loss": ff.losses.causal_lm}, specimens.words(40, 8)
    _, eager = tracked(plan_of("mlp", **fields), data)
    _, losses = tracked(plan_of("mlp", compile=True, **fields), data)
    assert losses == pytest.approx(eager, rel=1e-5)


def test_inductor_gives_the_same_bits_again_and_after_a_restart(tmp_path: Any) -> None:
    data = specimens.classes(40)
    _, eager = tracked(plan_of("mlp", **INDUCTOR), data)
    final, losses = tracked(plan_of("mlp", compile=True, **INDUCTOR), data)
    assert losses == pytest.approx(eager, rel=1e-5)
    left = ff.single(plan_of("mlp", compile=True, **INDUCTOR))
    ticks = left.steps(left.init(0), ff.batches(data, batch_size=8))
    toolz.pipe(ticks, ff.at_end(ff.saved(tmp_path)), ff.until(steps=9), ff.last)
    resumed, rest = tracked(plan_of("mlp", compile=True, **INDUCTOR), data, start=tmp_path)
    assert rest == losses[9:]
    toys.assert_equal(final, resumed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    """The whole step as a CUDA graph."""

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_equals_eager(self, microbatches: int) -> None:
        fields: dict[str, Any] = {"device": "cuda", "microbatches": microbatches, "average": ff.ema(0.9)}
        fields |= {"model": transformer, "loss": ff.losses.causal_lm, "transforms": (ff.clipped(0.5),)}
        batch = specimens.words(8, 8)
        _, expected = trained(plan_of("mlp", **fields), batch, steps=20)
        _, seen = trained(plan_of("mlp", compile=True, **fields), batch, steps=20)
        for ours, theirs in zip(seen, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)

    def test_other_states_may_be_stepped_in_between(self) -> None:
        program = ff.single(plan_of("mlp", compile=True, device="cuda"))
        batch = specimens.classes(8)
        one, other = program.init(0), program.init(1)
        for _ in range(4):
            one, _ = program.step(one, batch)
            other, _ = program.step(other, batch)
        alone, _ = trained(plan_of("mlp", compile=True, device="cuda"), batch)
        toys.assert_equal(alone, one)

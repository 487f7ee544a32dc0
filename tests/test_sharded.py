"""Sharded runs: the numbers of one process, with every tensor cut among several."""

from typing import Any

import pytest
import toolz
import torch
import torch._dynamo
import torch.distributed.fsdp  # both in the parent of all processes, since each would take seconds for it
from torch import nn

import forgather_fn as ff
from forgather_fn import fsdp
from forgather_fn.checkpoint.saving import save
from forgather_fn.data import Batch
from forgather_fn.mean import of
from forgather_fn.sharded import in_step
from forgather_fn.share import Share
from forgather_fn.testing.processes import processes
from forgather_fn.world import World
from tests.ragged import plan_of, rows


class Block(nn.Module):
    """A residual block whose sizes divide by no number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Dropout(0.3))
        self.down = nn.Linear(13, 7)
        self.scale = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(self.up(x))


class Tokens(nn.Module):
    """A small language model: blocks, a tied head, and a part that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.rare = nn.Linear(7, 11)
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self) -> None:
        self.seen.zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.fill_(1.0)
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return self.head(hidden) + (self.rare(hidden) if (ids[:, 0] == 0).all() else 0.0)


def plan(**changes: Any) -> ff.Plan:
    return plan_of(**{"model": Tokens} | changes)


def last_is_frozen(**changes: Any) -> ff.Optimizer:
    return ff.adamw(groups=[ff.group("layers.1.*", frozen=True), ff.group("norm.*", learning_rate=3.0)], **changes)


def without_values() -> Tokens:
    with torch.device("meta"):
        return Tokens()


class Entangled(Tokens):
    """Draws values of its blocks anew when all of them have theirs, as some models of Hugging Face do."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in self.layers:
            nn.init.normal_(layer.down.weight.data, std=0.1)


def entangled() -> Entangled:
    with torch.device("meta"):
        return Entangled()


CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "blocks in float64": (True, {}, 1e-12),
    "parts of blocks, some frozen": (["layers.*", "layers.*.up"], {"optimizer": last_is_frozen()}, 1e-12),
    "momentum, initialised by name": (
        True,
        {"optimizer": ff.sgd(momentum=0.9), "init": "by_name"},
        1e-12,
    ),
    "without values": (True, {"model": without_values, "init": "by_name", "optimizer": last_is_frozen()}, 1e-12),
    "without values, entangled": (True, {"model": entangled, "init": "by_name"}, 1e-12),
    "lion": (True, {"optimizer": ff.optim.lion(weight_decay=lambda step: 0.1 / (1 + step))}, 1e-12),
    "schedule-free": (True, {"optimizer": ff.optim.schedule_free_adamw(weight_decay=0.1)}, 1e-12),
    "lookahead": (True, {"optimizer": ff.optim.lookahead(ff.sgd(), steps=2)}, 1e-12),
    "bfloat16": (True, {"precision": "bfloat16"}, 1e-5),
    "float16": (True, {"precision": "float16"}, 1e-5),
}


SIZED = [(4 if case in ("blocks in float64", "parts of blocks, some frozen") else 2, case) for case in CASES]


def recorded(state: ff.TrainState | None, metrics: list[dict[str, float]]) -> dict[str, Any] | None:
    """Take what a run has come to; of a state in shards, that is known on the first process."""
    if state is None:
        return None
    arrays = state.read()
    flats = {"params": arrays.params, "ema": arrays.ema, "buffers": arrays.buffers, "frozen": arrays.frozen}
    flats |= {f"opt/{name}": slot for name, slot in arrays.opt.items() if not isinstance(slot, torch.Tensor)}
    tensors = {f"{kind}/{n}": t.clone() for kind, flat in flats.items() if flat is not None for n, t in flat.items()}
    tensors |= {f"opt/{name}": slot for name, slot in arrays.opt.items() if isinstance(slot, torch.Tensor)}
    tensors |= {f"metrics/{i}/{n}": torch.tensor(v).double() for i, row in enumerate(metrics) for n, v in row.items()}
    return {"tensors": tensors, "place": (state.step, state.samples, int(state.tokens), int(state.updates))}


def run(program: ff.Program, steps: int = 6) -> dict[str, Any] | None:
    """Train over batches of 10 out of 22 samples, the last of an epoch ragged: 10, 10, 2 samples for 8 microbatches."""
    data = ff.batches(rows(), batch_size=10, last="ragged")
    found = []
    program.init(seed=2)
    state = program.init(seed=1)  # a second one is another state, on the same module
    for tick in ff.until(steps=steps)(program.steps(state, data)):
        state = tick.state
        found.append({name: float(value) for name, value in tick.metrics.items()})
    found.append(program.evaluate(state, ff.batches(rows(7), batch_size=2)))
    return recorded(program.whole(state), found)


def trained(case: str) -> dict[str, Any] | None:
    sharded, changes, _ = CASES[case]
    return run(ff.accelerated(plan(**changes), sharded=sharded))


@pytest.fixture(scope="module")
def pools():
    with processes(2) as two, processes(4) as four:
        yield {2: two.run, 4: four.run}


def unlike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> list[str]:
    mine, others = one["tensors"], other["tensors"]
    assert mine.keys() == others.keys()
    assert one["place"] == other["place"]
    return [
        n for n, t in mine.items() if not torch.allclose(t, others[n], rtol=tolerance, atol=tolerance, equal_nan=True)
    ]


@pytest.mark.parametrize(("size", "case"), [(2, "blocks in float64"), *SIZED])
def test_shards_train_as_one_process(pools, case, size):
    _, changes, tolerance = CASES[case]
    first, *others = pools[size](trained, case)
    assert others == [None] * (size - 1)
    strategy = ff.single if tolerance == 1e-12 else ff.accelerated  # which in half precision rounds at other places
    assert unlike(run(strategy(plan(**changes))), first, tolerance) == []


def test_units_are_the_outermost_members_of_lists_that_can_be_called():
    inner = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleDict({"a": Block()})])
    experts = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    model = nn.ModuleDict({"layers": inner, "heads": nn.ModuleList([experts]), "rest": nn.Linear(1, 1)})
    assert {name for name, _ in fsdp.units_of(model, None)} == {"layers.0.0", "layers.0.1", "heads.0"}
    chosen = [name for name, _ in fsdp.units_of(model, ["layers.0.*", "layers.*.*.up", "rest"])]
    assert chosen == ["rest", "layers.1.a.up", "layers.0.1.up", "layers.0.1", "layers.0.0.up", "layers.0.0"]


@pytest.mark.parametrize(("samples", "numbers"), [(8, [4, 5, 6, 7]), (6, [4, 5, None, None]), (2, [None, None])])
def test_every_process_runs_as_many_microbatches_as_the_fullest(samples, numbers):
    data = torch.arange(samples)
    share = Share(8, rank=1, size=2)
    given = in_step(Batch(data, samples, None, ragged=True), share, World(rank=1, size=2))
    assert [number for number, _ in given] == numbers
    assert [part.tolist() for number, part in given if number is None] == [[0]] * numbers.count(None)
    first = in_step(Batch(data, samples, None, ragged=True), Share(8, rank=0, size=2), World(rank=0, size=2))
    assert len(first) == len(given)


def frozen_plan() -> ff.Plan:
    return plan(optimizer=last_is_frozen())


def continued(strategy: str, path: str, begun: bool) -> dict[str, Any] | None:
    """Train for three steps and save, or go on from there for three more."""
    program = STRATEGIES[strategy](frozen_plan())
    data = ff.batches(rows(), batch_size=10, last="ragged")
    state = program.init(seed=1) if begun else program.restore(path)
    stages = (ff.every(2, ff.saved(path)), ff.until(steps=3 if begun else 6))
    return recorded(program.whole(toolz.pipe(program.steps(state, data), *stages, ff.last)), [])


def sharded(plan: ff.Plan) -> ff.Program:
    return ff.accelerated(plan, sharded=True)


STRATEGIES = {"single": ff.single, "replicated": ff.accelerated, "sharded": sharded}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    program = ff.single(frozen_plan())
    state = program.init(seed=1)
    steps = program.steps(state, ff.batches(rows(), batch_size=10, last="ragged"))
    return recorded(ff.last(ff.until(steps=6)(steps)), [])


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        ((2, "sharded"), (1, "single")),
        ((2, "sharded"), (4, "sharded")),
        ((4, "sharded"), (2, "replicated")),
        ((1, "single"), (4, "sharded")),
    ],
)
def test_a_run_goes_on_in_other_shards_or_whole(pools, tmp_path, whole, saved_by, resumed_by):
    pools = {1: lambda function, *args: [function(*args)], **pools}
    for (size, strategy), begun in ((saved_by, True), (resumed_by, False)):
        found = pools[size](continued, strategy, str(tmp_path), begun)
    assert unlike(whole, found[0], 1e-12) == []


def parts_of_a_step(strategy: str) -> dict[str, Any]:
    """Do by hand what a step does, call the model, and take it out."""
    program = STRATEGIES[strategy](frozen_plan())
    state = program.init(seed=1)
    batch = {name: tensor[:10] for name, tensor in rows().items()}
    gradients, buffers, means = program.gradients(state, batch)
    state, metrics = program.update(state, gradients, buffers)
    norm, loss = float(metrics["grad_norm"]), float(means["loss"])
    wants = frozenset({"gradient_norms", "parameter_norms", "update_norms"})
    state, metrics = program.step(state, batch, wants=wants)
    outputs = {which: program.apply(state, batch["ids"], params=which) for which in ("params", "ema")}
    exported = {which: program.export(state, params=which) for which in ("params", "ema")}
    state, after = program.step(state, batch)
    return {
        "numbers": [norm, loss, float(after["loss"])],
        "norms": {name: float(value) for name, value in metrics.items() if "_norm/" in name},
        "outputs": outputs,
        "weights": {which: module.state_dict() for which, module in exported.items()},
        "again": {which: module.eval()(batch["ids"]).detach() for which, module in exported.items()},
        "tied": [module.head.weight is module.embedding.weight for module in exported.values()],
        "kinds": [type(module) is Tokens for module in exported.values()],
        "asked": [p.requires_grad for p in exported["params"].parameters()],
    }


def test_a_program_in_shards_gives_what_others_give(pools):
    expected = parts_of_a_step("single")
    for one in pools[4](parts_of_a_step, "sharded"):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one["again"], one["outputs"], rtol=1e-12, atol=1e-12)


def memory() -> tuple[int, list[int], dict[str, tuple[int, ...]]]:
    """Count the elements that a process has, after a step, and those of its model's parameters."""
    program = sharded(plan())
    state = program.init(seed=1)
    state, _ = program.step(state, rows(16))
    arrays = state.read()
    held = [arrays.params, arrays.ema, arrays.opt["exp_avg"], arrays.opt["exp_avg_sq"]]
    stored = [sum(buffer.numel() for buffer in flat.buffers) for flat in held]
    local = sum(p.to_local().numel() for p in program.module().parameters())
    return local, stored, {name: tuple(tensor.shape) for name, tensor in state.params.items()}


def test_each_process_has_its_part(pools):
    whole = {name: tuple(p.shape) for name, p in Tokens().named_parameters()}
    elements = sum(p.numel() for p in Tokens().parameters())
    for size in (2, 4):
        found = pools[size](memory)
        assert sum(local for local, _, _ in found) == elements
        assert all(len(set(stored)) == 1 for _, stored, _ in found)
        for name, shape in whole.items():
            assert sum(shapes[name][0] for _, _, shapes in found) == shape[0]
            assert {shapes[name][1:] for _, _, shapes in found} == {shape[1:]}


class Bad(nn.Module):
    """Fails, in its backward pass, on a batch of sevens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, x = x, self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if (given == 7).all():
                x.register_hook(fail)
        return x * 1.0


def fail(gradient: torch.Tensor) -> None:
    raise ValueError("no backward pass for this")


def bad_plan(**changes: Any) -> ff.Plan:
    given: dict[str, Any] = {
        "model": Bad,
        "loss": lambda outputs, batch: of(outputs.square()),
        "optimizer": ff.adam(),
        "schedule": 0.1,
        "microbatches": 4,
        "init": "by_name",
    }
    return ff.Plan(**given | changes)


def skipping() -> tuple[list[int], float]:
    """Leave out a step that is not finite on the last process alone."""
    program = sharded(bad_plan(on_nonfinite="skip"))
    state = program.init()
    x = torch.ones(4, 3)
    x[3] = torch.nan
    state, _ = program.step(state, (x, x))
    state, metrics = program.step(state, (torch.ones(4, 3), torch.ones(4, 3)))
    return [int(state.skipped), int(state.updates)], float(metrics["loss"])


def raising() -> list[str]:
    """Try again after a step that was not finite on one process, and after one that failed on all."""
    program = sharded(bad_plan())
    state = program.init()
    good = (torch.ones(4, 3), torch.ones(4, 3))
    x = torch.ones(4, 3)
    x[3] = torch.nan
    said = []
    for batch in ((x, x), (torch.full((4, 3), 7.0), x)):
        try:
            program.step(state, batch)
        except ValueError as error:
            said.append(type(error).__name__)
    state, _ = program.step(state, good)
    _, metrics = program.step(state, good)
    return [*said, f"{float(metrics['loss']):.6f}"]


def test_processes_agree_on_steps_that_are_not_finite(pools):
    program = ff.single(bad_plan())
    state, first = program.step(program.init(), (torch.ones(4, 3), torch.ones(4, 3)))
    _, second = program.step(state, (torch.ones(4, 3), torch.ones(4, 3)))
    assert pools[2](skipping) == [([1, 1], pytest.approx(float(first["loss"])))] * 2
    assert pools[2](raising) == [["NonFiniteError", "ValueError", f"{float(second['loss']):.6f}"]] * 2


def given_a_module(path: str) -> list[Any]:
    """Train a module that is given, and begin again from what it has come to."""
    torch.manual_seed(torch.distributed.get_rank())  # so that processes build other values
    model = Bad()
    program = sharded(bad_plan(model=model, init="as_built"))
    batch = (torch.ones(4, 3), torch.ones(4, 3))
    state, _ = program.step(program.init(), batch)
    save(program, state, path)
    again = program.init()
    assert all(torch.equal(again.params[name], state.params[name]) for name in state.params)
    other = sharded(bad_plan(model=model, init="as_built"))
    return [program.plan.describe()["model"], refusal(other.init), float(program.step(again, batch)[1]["loss"])]


def refusal(function: Any, *args: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        function(*args)
    return str(caught.value)


def test_a_module_that_is_given_is_cut_in_place(pools, tmp_path):
    found = pools[2](given_a_module, str(tmp_path))
    assert found[0] == found[1]
    described, refused, loss = found[0]
    assert described.endswith(".Bad")
    assert "cut by fully_shard already" in refused
    program = ff.single(bad_plan(model=Bad(), init="as_built"))
    state = program.restore(str(tmp_path))
    _, metrics = program.step(state, (torch.ones(4, 3), torch.ones(4, 3)))
    assert float(metrics["loss"]) == pytest.approx(loss)


class Odd(nn.Module):
    """Has what cannot be cut, as asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        if kind == "scalar":
            self.scale = nn.Parameter(torch.ones(()))
        if kind == "shared":
            self.layers[1].weight = self.layers[0].weight
        if kind == "types":
            self.half = nn.Linear(2, 2, dtype=torch.float16)
            self.float = nn.Linear(2, 2)
        if kind == "last":
            self.conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)


def refused() -> dict[str, str]:
    said = {kind: refusal(sharded(bad_plan(model=lambda k=kind: Odd(k), init="as_built")).init) for kind in KINDS}
    said["unit"] = refusal(ff.accelerated(bad_plan(), sharded=["blocks.*"]).init)
    return said


class Experts(nn.Module):
    """Runs another unit for ones than for other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layers[int((x == 1).all())](x))


def mixed() -> str:
    program = sharded(bad_plan(model=Experts))
    state = program.init()
    x = torch.tensor([[1.0], [1.0], [2.0], [2.0]]).expand(4, 3)
    said = refusal(program.step, state, (x, x))
    program.step(state, (torch.ones(4, 3), x))
    return said


def test_units_that_run_on_some_processes_only_are_found(pools):
    for said in pools[2](mixed):
        assert "ran in another order on some processes" in said


KINDS = {
    "scalar": "'scale' have no dimension to cut along",
    "shared": "layers.0.weight is shared by the units",
    "types": "has parameters of several data types (half.weight torch.float16",
    "last": "'conv.weight' are not contiguous",
}


def test_models_that_cannot_be_cut_are_refused(pools):
    for said in pools[2](refused):
        for kind, expected in (KINDS | {"unit": "'blocks.*' matches no module; there are 'first', 'layers'"}).items():
            assert expected in said[kind], kind


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"optimizer": ff.from_torch(torch.optim.RMSprop)}, {}, "from_torch"),
        ({"transforms": (ff.chain(ff.clipped(1.0), ff.noise(0.1)),)}, {}, "noise"),
        ({"compile": "model"}, {}, "compile"),
        ({"compile": True}, {}, "compile"),
        ({"update": "in_backward", "transforms": (), "microbatches": 1}, {}, "in_backward"),
        ({}, {"reduction": "tree"}, "tree"),
        ({}, {"overlap_bytes": 1}, "overlap_bytes"),
    ],
)
def test_what_needs_whole_tensors_is_refused_on_any_number_of_processes(changes, options, expected):
    with pytest.raises(ValueError, match=expected):
        ff.accelerated(plan(**changes), sharded=True, **options)


def test_another_version_of_torch_is_refused():
    fsdp.check_version(torch.__version__)
    with pytest.raises(RuntimeError, match=r"torch is 2\.14\.0, and its fully_shard is known here as of 2\.13 only"):
        fsdp.check_version("2.14.0")


def moved_by_hand(sharded: bool) -> tuple[float, dict[str, torch.Tensor]]:
    given = plan(transforms=(ff.clipped(0.5),))
    program = ff.accelerated(given, sharded=True) if sharded else ff.single(given)
    state = program.init(seed=1)
    gradients = {name: torch.ones_like(rows) for name, rows in state.params.items()}
    state, metrics = program.update(state, gradients, batch=torch.zeros(4, 2))
    return float(metrics["grad_norm"]), dict(program.export(state).named_parameters())


def test_gradients_of_ones_own_are_clipped_by_the_norm_of_all_shards(pools):
    norm, params = moved_by_hand(False)
    for found, whole in pools[2](moved_by_hand, True):
        assert found == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(whole, params, rtol=0, atol=1e-12)

"""Law 11: bugs that look like results, planted one by one in the library, are each caught by the check for them."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import forgather_fn as ff
from forgather_fn import evaluation, step, testing
from forgather_fn.batch import as_batch, microbatches
from forgather_fn.binding import Binding
from forgather_fn.data import IndexedStream, fetch, order
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.mean import summed
from forgather_fn.model import Modes
from forgather_fn.random import key
from forgather_fn.state import Ownership
from tests import zoo

Patch = pytest.MonkeyPatch


def mean_of_means(patch: Patch) -> None:
    """The gradient of a batch is the mean of those of its microbatches, whatever they weigh."""
    take = step.take_gradients

    def planted(built: Any, state: Any, batch: Any) -> Any:
        once = attrs.evolve(built, plan=attrs.evolve(built.plan, microbatches=1))
        gradients, results = [], []
        for part in microbatches(attrs.evolve(batch, data=built.place(batch.data)), built.plan.microbatches):
            results.append(take(once, state, as_batch(part)))
            gradients.append(results[-1][0].copy())
        _, buffers, _ = results[-1]
        means = {name: summed(found[name] for *_, found in results) for name in results[0][2]}
        average = {name: torch.stack([one[name] for one in gradients]).mean(0) for name in gradients[0]}
        return attrs.evolve(gradients[0].replaced(average, by="plant"), samples=batch.samples), buffers, means

    patch.setattr(step, "take_gradients", planted)


def uncloned_buffers(patch: Patch) -> None:
    """What buffers are restored from after a forward pass is what the forward pass has changed."""
    patch.setattr(Flat, "assign", lambda self, other: None)


def buffers_not_bound_again(patch: Patch) -> None:
    """What a failed forward pass has put in the place of a buffer stays in the module."""
    bind = Binding.bind_buffers
    patch.setattr(Binding, "bind_buffers", lambda self, new: None if new is self.buffers else bind(self, new))


def rank_in_the_seed(patch: Patch) -> None:
    patch.setattr(step, "key", lambda seed, *path: key(seed + int(os.environ.get("RANK", "0")), *path))


def clock_in_the_seed(patch: Patch) -> None:
    patch.setattr(step, "key", lambda seed, *path: key(seed + int(time.time()), *path))


def counter_in_the_seed(patch: Patch) -> None:
    """Masks depend on how many were drawn before in this process."""
    counter = itertools.count()
    patch.setattr(step, "key", lambda seed, *path: key(seed, next(counter), *path))


def generator_not_restored(patch: Patch) -> None:
    @contextlib.contextmanager
    def planted(value: int, device: torch.device) -> Iterator[None]:
        del device
        torch.default_generator.manual_seed(value)
        yield

    patch.setattr(step, "seeded", planted)


def position_off_by_one(patch: Patch) -> None:
    """A step counts one sample less than it has consumed."""
    advance = step.advance

    def planted(*args: Any, **kwargs: Any) -> Any:
        following, metrics = advance(*args, **kwargs)
        return attrs.evolve(following, samples=following.samples - 1), metrics

    patch.setattr(step, "advance", planted)


def start_off_by_one(patch: Patch) -> None:
    """A stream that is not started at its beginning starts one sample late."""
    start = IndexedStream.start

    def planted(self: IndexedStream, seed: int, samples: int, *share: Any, **cursor: Any) -> Any:
        return start(self, seed, samples + (samples > 0), *share, **cursor)

    patch.setattr(IndexedStream, "start", planted)


def drawn_with_replacement(patch: Patch) -> None:
    def planted(offsets: Any, /, *, n: int, seed: int, epoch: int) -> Any:
        return np.random.default_rng(key(seed, epoch)).integers(0, n, size=n)[offsets]

    patch.setitem(order.ORDERS, "shuffled", planted)


def sorted_in_the_batch(patch: Patch) -> None:
    """The samples of a batch come in the order of the dataset, which reads a file faster."""
    patch.setattr(fetch, "_taken", lambda column, index: column[index.sort().values])


def in_place_without_donation(patch: Patch) -> None:
    """``donate=False`` copies the record of a state, but not its tensors."""
    patch.setattr(ff.TrainState, "copy", lambda self: attrs.evolve(self, ownership=Ownership()))


def consumed_without_donation(patch: Patch) -> None:
    """``donate=False`` does not copy at all."""
    patch.setattr(ff.TrainState, "copy", lambda self: self)


def readable_after_consumption(patch: Patch) -> None:
    patch.setattr(ff.TrainState, "consume", lambda self, where: self.read())


def consumed_too_early(patch: Patch) -> None:
    take = step.take_gradients

    def planted(built: Any, state: Any, batch: Any) -> Any:
        try:
            return take(built, state, batch)
        except BaseException:
            state.consume("a failed step")
            raise

    patch.setattr(step, "take_gradients", planted)


def gradients_left_behind(patch: Patch) -> None:
    """A backward pass that fails leaves what it has added up until then."""
    take = step.take_gradients

    def planted(built: Any, state: Any, batch: Any) -> Any:
        built.workspace.clear()
        kept = attrs.evolve(built.workspace, clear=lambda: None)
        return take(attrs.evolve(built, workspace=kept), state, batch)

    patch.setattr(step, "take_gradients", planted)


def stale_binding(patch: Patch) -> None:
    """A module that is bound to one state is not bound to the next one that is stepped."""
    patch.setattr(Binding, "ensure", lambda self, params, frozen, buffers: None)


def rounded_in_between(patch: Patch) -> None:
    """A gradient that is taken out of a step loses some bits on the way."""
    copy = Gradients.copy

    def planted(self: Gradients) -> Gradients:
        return copy(self).replaced({name: self[name].bfloat16().to(self[name].dtype) for name in self}, by="plant")

    patch.setattr(Gradients, "copy", planted)


def mean_of_batch_means(patch: Patch) -> None:
    """An evaluation is the mean of the batches' results, whatever they weigh."""
    evaluate = evaluation.evaluate

    def planted(built: Any, state: Any, data: Any, params: Any, metrics: Any, **world: Any) -> dict[str, float]:
        batches = data.one_pass() if isinstance(data, ff.Stream) else data
        results = [evaluate(built, state, [batch], params, metrics, **world) for batch in batches]
        return {name: sum(result[name] for result in results) / len(results) for name in results[0]}

    patch.setattr(evaluation, "evaluate", planted)


def left_in_evaluation_mode(patch: Patch) -> None:
    patch.setattr(Modes, "restore", lambda self: None)


def evaluated_in_training_mode(patch: Patch) -> None:
    patch.setattr(evaluation, "evaluation_mode", lambda module: Modes(()))


def purity(name: str, storage: str) -> None:
    testing.check_purity(plan_of(name, storage), zoo.SPECIMENS[name].batch(5))


def donation(name: str, storage: str) -> None:
    testing.check_donation(plan_of(name, storage), zoo.SPECIMENS[name].batch(5))


def accumulation(name: str, storage: str) -> None:
    testing.check_accumulation(plan_of(name, storage), zoo.SPECIMENS[name].batch(5))


def evaluated(name: str, storage: str) -> None:
    testing.check_evaluation(plan_of(name, storage), zoo.SPECIMENS[name].batch(5))


def data(name: str, storage: str) -> None:
    testing.check_data(ff.batches(zoo.SPECIMENS[name].batch(7), batch_size=3))


def resumed(name: str, storage: str) -> None:
    testing.check_data(ff.batches(zoo.SPECIMENS[name].batch(7), batch_size=3), plan=plan_of(name, storage))


def whole_step(name: str, storage: str) -> None:
    testing.check_step(plan_of(name, storage), zoo.SPECIMENS[name].batch(5))


def plan_of(name: str, storage: str) -> ff.Plan:
    return zoo.plan_of(name, viewed_elements=zoo.STORAGES[storage], microbatches=2, average=ff.ema(0.5))


STEP = r"step [01] \(a batch of 5 samples, microbatches=2"

PLANTED: list[tuple[Callable[[Patch], None], Callable[[str, str], None], str, str]] = [
    (
        mean_of_means,
        accumulation,
        "mlp",
        r"2 microbatches of 3, 2 samples \(weights 2, 1\).* gradient of 0.weight differs",
    ),
    (mean_of_means, whole_step, "mlp_function", r"accumulation: 2 microbatches of 3, 2 samples do not give"),
    (uncloned_buffers, donation, "batchnorm", rf"{STEP}\), which failed in forward, changed its state: buffers/1.run"),
    (uncloned_buffers, whole_step, "batchnorm", r"changed its state: buffers/1.run"),
    (buffers_not_bound_again, donation, "reassigning", rf"{STEP}.* failed in forward, left the module unlike.*seen"),
    (
        rank_in_the_seed,
        purity,
        "dropout",
        rf"{STEP}, donate=False\), taken a second time, gave other bits: params/0.weight",
    ),
    (clock_in_the_seed, purity, "dropout", rf"{STEP}, donate=False\), taken a second time, gave other bits"),
    (counter_in_the_seed, purity, "dropout", rf"{STEP}, donate=False\), taken a second time, gave other bits"),
    (counter_in_the_seed, whole_step, "dropout", "taken a second time, gave other bits"),
    (generator_not_restored, purity, "mlp", rf"{STEP}.* another state \(torch's CPU generator\)"),
    (
        position_off_by_one,
        resumed,
        "mlp",
        "taken up at step 1 by a state that has seen 2 samples, the batch of 3 samples at sample 3 of the job",
    ),
    (start_off_by_one, data, "mlp", "started again there, the batch of 3 samples at sample 3"),
    (drawn_with_replacement, data, "mlp", "epoch 0 is not a permutation: it gives sample . more than once"),
    (
        sorted_in_the_batch,
        data,
        "mlp",
        "in batches of 1 samples, the first 15 samples of the job are others.*: sample 1/0",
    ),
    (in_place_without_donation, purity, "mlp", rf"{STEP}, donate=False\) changed the state .*: updates: 1 of 1"),
    (consumed_without_donation, purity, "mlp", rf"{STEP}, donate=False\) consumed its state"),
    (
        readable_after_consumption,
        donation,
        "mlp",
        "the state that step 0 consumed could still be read by its field 'updates'",
    ),
    (consumed_too_early, donation, "mlp", rf"{STEP}\), which failed in forward, consumed its state"),
    (gradients_left_behind, donation, "mlp", rf"{STEP}\), which failed in forward, left a gradient in 0.weight.grad"),
    (stale_binding, donation, "mlp", rf"{STEP}\) gave other bits with donate=True"),
    (
        rounded_in_between,
        whole_step,
        "mlp",
        rf"composition: {STEP}\): step \(first\) and update of gradients .* in bits",
    ),
    (
        mean_of_batch_means,
        evaluated,
        "mlp",
        "5 samples in batches of 2 do not give what they give in batches of 5: 'loss'",
    ),
    (mean_of_batch_means, whole_step, "mlp", "evaluation: at step 0, with params='params', 5 samples in . batches"),
    (left_in_evaluation_mode, evaluated, "mlp", "left a module in another mode"),
    (evaluated_in_training_mode, evaluated, "dropout", "5 samples in batches of . do not give"),
]


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize(
    ("plant", "check", "name", "message"), PLANTED, ids=[f"{p.__name__}-{c.__name__}" for p, c, *_ in PLANTED]
)
def test_a_planted_bug_is_caught(
    plant: Callable[[Patch], None],
    check: Callable[[str, str], None],
    name: str,
    message: str,
    storage: str,
    monkeypatch: Patch,
) -> None:
    check(name, storage)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        check(name, storage)

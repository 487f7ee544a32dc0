"""The law of resuming: a run that was saved at any step, and gone on with in another process, ends in the same bits.

``fold(a ++ b) == fold(b) after fold(a)``, with the disk and the end of a process between the two folds.
"""

import functools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.checkpoint import latest, save, saved
from tests import specimens, zoo
from tests.checkpoint.faults import assert_same, forked, leaves
from tests.checkpoint.subjects import drawing, everything, run_to
from tests.toys import Branches, assert_equal, branching, labelled

STEPS = 12


def elsewhere():
    """Draw from the global generators, so that nothing can depend on where they were."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def saved_everywhere(run: Path, program: ff.Program, data: ff.Stream, *, async_: bool = True) -> ff.TrainState:
    """Train to the end and save every state, the first one too."""
    first = program.init(0)
    save(program, first, run)
    return run_to(STEPS, program, first, data, ff.every(1, saved(run, async_=async_)))


def resumed(run: Path, step: int, program: ff.Program, data: ff.Stream, *stages) -> dict:
    """Go on from a step to the end, in this process."""
    state = program.restore(run / "checkpoints" / f"checkpoint-{step}")
    assert state.step == step
    return leaves(run_to(STEPS, program, state, data, *stages))


@functools.cache
def uninterrupted(**data):
    """Give the final state of a run that was never stopped or saved."""
    program = everything()
    return leaves(run_to(STEPS, program, program.init(0), drawing(**data)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("everything")
    program = everything()
    final = saved_everywhere(path, program, drawing())
    assert_same(leaves(final), uninterrupted())
    return path


class TestEveryStep:
    """Epochs end within steps 4, 8 and 12; where batches do not span them, after these steps, or those before."""

    @pytest.mark.parametrize("step", range(STEPS + 1))
    def test_in_a_fresh_process(self, run, step):
        def child():
            elsewhere()
            return resumed(run, step, everything(), drawing())

        assert_same(forked(child).value, uninterrupted())

    @pytest.mark.parametrize("step", [1, 5, 6, 8])
    def test_with_worker_processes(self, run, step):
        def child():
            elsewhere()
            return resumed(run, step, everything(), drawing(workers=2))

        assert_same(forked(child).value, uninterrupted())

    @pytest.mark.parametrize("last", ["span", "ragged", "drop"])
    @pytest.mark.parametrize("order", ["shuffled", "torch", "sequential"])
    def test_in_every_order_and_at_every_end_of_an_epoch(self, tmp_path, last, order):
        data = {"last": last, "order": order}
        saved_everywhere(tmp_path, everything(), drawing(**data))

        def child():
            elsewhere()
            return [resumed(tmp_path, step, everything(), drawing(**data)) for step in range(1, STEPS)]

        for found in forked(child).value:
            assert_same(found, uninterrupted(**data))

    def test_by_workers_and_gone_on_with_by_others(self, tmp_path):
        """Two workers, then none, then one; each stage in a process of its own."""
        for stop, workers in ((3, 2), (7, 0), (STEPS, 1)):

            def child(stop=stop, workers=workers):
                program = everything()
                state = program.restore(tmp_path) if latest(tmp_path) else program.init(0)
                return leaves(run_to(stop, program, state, drawing(workers=workers), ff.every(99, saved(tmp_path))))

            final = forked(child).value
        assert_same(final, uninterrupted())

    @pytest.mark.parametrize("interval", [1, 2, 5, 7])
    def test_whatever_the_intervals(self, tmp_path, interval):
        """Save and look at other steps before and after, one step at a time in each process at the worst."""
        rows = []
        for stop in range(interval, STEPS + interval, interval):
            program = everything()
            state = program.restore(tmp_path) if latest(tmp_path) else program.init(0)
            evaluated = ff.every(3, ff.evaluated(drawing(), params="ema"), ff.report(rows.append))
            stages = evaluated, ff.every(interval, saved(tmp_path, keep=1))
            final = run_to(min(stop, STEPS), program, state, drawing(), *stages)
        assert_same(leaves(final), uninterrupted())

    def test_again_and_again_from_the_same_one(self, run):
        program = everything()
        assert_same(resumed(run, 4, program, drawing()), uninterrupted())
        assert_same(resumed(run, 4, program, drawing()), uninterrupted())

    def test_of_a_copy_of_the_run(self, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "copy")
        assert_same(resumed(copy, 7, everything(), drawing()), uninterrupted())


IN_A_NEW_INTERPRETER = """
import sys, torch
from pathlib import Path
from tests.checkpoint.test_resume import drawing, everything, resumed
if __name__ == "__main__":
    run, step, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(resumed(Path(run), int(step), everything(), drawing()), out)
"""


def test_in_a_new_interpreter(run, tmp_path, monkeypatch):
    """In a process that has nothing of this one: other addresses, and other hashes of strings."""
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    command = [sys.executable, "-c", IN_A_NEW_INTERPRETER, str(run), "5", str(tmp_path / "final")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert_same(torch.load(tmp_path / "final", weights_only=False), uninterrupted())


def momentum(factor: float) -> ff.Transform:
    """Make a transform whose state is a tree of all that a tree may hold."""

    def init(params):
        sums = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        return {"sums": sums, "counts": (0, 0.5, "a", None, True), "seen": [torch.tensor(0)]}

    def update(gradients, state, *, params, step, seed):
        sums = {name: factor * state["sums"][name] + gradient for name, gradient in gradients.items()}
        count, half, *rest = state["counts"]
        seen = [state["seen"][0] + 1]
        return sums, {"sums": {**state["sums"], **sums}, "counts": (count + 1, half / 3, *rest), "seen": seen}

    return ff.Transform(init, update, f"momentum({factor})")


OPTIMIZERS = {
    "adamw": lambda: ff.adamw(weight_decay=0.1),
    "adam": lambda: ff.adam(weight_decay=0.01),
    "sgd": lambda: ff.sgd(momentum=0.9, nesterov=True),
    "plain sgd": lambda: ff.sgd(),
    "groups": lambda: ff.adamw(groups=[ff.group("*.bias", learning_rate=3.0), ff.group("0.*", weight_decay=0.5)]),
    "RMSprop": lambda: ff.from_torch(lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True)),
    "Adagrad": lambda: ff.from_torch(lambda groups: torch.optim.Adagrad(groups, lr_decay=0.1)),
    "AMSGrad": lambda: ff.from_torch(lambda groups: torch.optim.AdamW(groups, amsgrad=True)),
    "Rprop": lambda: ff.from_torch(torch.optim.Rprop),
    "NAdam": lambda: ff.from_torch(torch.optim.NAdam),
    "ASGD": lambda: ff.from_torch(lambda groups: torch.optim.ASGD(groups, t0=2)),
}


def check_resume(run, made, batches):
    """Save after every batch; go on from each in another process with a new program, and compare the last states."""
    program = made()
    state = program.init(0)
    for batch in batches:
        save(program, state, run)
        state, _ = program.step(state, batch)

    def child():
        elsewhere()
        finals = []
        for step in range(len(batches)):
            other = made()
            restored = other.restore(run / "checkpoints" / f"checkpoint-{step}")
            finals.append(leaves(ff.fold(other.step, restored, batches[step:])))
        return finals

    for found in forked(child).value:
        assert_same(found, leaves(state))


def classes(count=6, size=5):
    return [labelled(size, seed=seed) for seed in range(count)]


class TestEveryPart:
    @pytest.mark.parametrize("storage", zoo.STORAGES)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_optimizers(self, tmp_path, name, storage):
        check_resume(
            tmp_path,
            lambda: everything(
                model=specimens.dropout_mlp, optimizer=OPTIMIZERS[name](), viewed_elements=zoo.STORAGES[storage]
            ),
            classes(),
        )

    @pytest.mark.parametrize("name", sorted(set(zoo.SPECIMENS)))
    def test_models(self, tmp_path, name):
        """Tied and frozen parameters, several data types, buffers of all kinds, strides, models of Hugging Face."""
        specimen = zoo.SPECIMENS[name]
        check_resume(
            tmp_path,
            lambda: everything(model=specimen.model, loss=specimen.loss, init="as_built"),
            [specimen.batch(samples) for samples in (4, 5, 6, 5)],
        )

    @pytest.mark.parametrize("precision", ["as_built", "float32", "float64", "bfloat16", "float16"])
    def test_precisions(self, tmp_path, precision):
        check_resume(tmp_path, lambda: everything(model=specimens.TwoDtypes, precision=precision), classes())

    @pytest.mark.parametrize("where", ["alone", "in a chain"])
    def test_transforms_with_a_state(self, tmp_path, where):
        one = momentum(0.9)
        transforms = (one,) if where == "alone" else (ff.clipped(1.0), ff.chain(ff.noise(0.1), one))
        check_resume(tmp_path, lambda: everything(model=specimens.mlp, transforms=transforms), classes())

    @pytest.mark.parametrize("storage", zoo.STORAGES)
    def test_parameters_whose_gradients_come_and_go(self, tmp_path, storage):
        batches = [branching(left, right, seed=i) for i, (left, right) in enumerate([(1, 0), (1, 1), (0, 1), (0, 0)])]
        check_resume(
            tmp_path,
            lambda: everything(model=Branches, microbatches=1, viewed_elements=zoo.STORAGES[storage]),
            batches,
        )

    def test_steps_that_were_skipped(self, tmp_path):
        batches = classes()
        batches[2][0][0, 0] = torch.nan
        made = functools.partial(everything, model=specimens.dropout_mlp, on_nonfinite="skip")
        check_resume(tmp_path, made, batches)
        state = made().restore(tmp_path)
        assert (int(state.skipped), int(state.updates), state.step) == (1, 4, 5)

    @pytest.mark.parametrize("donate", [True, False])
    def test_with_and_without_donation(self, tmp_path, donate):
        check_resume(tmp_path, lambda: everything(donate=donate), classes())

    def test_a_module_that_is_given_and_not_built(self, tmp_path):
        """What it held when the run was resumed does not matter."""
        made = iter(range(100))

        def program():
            torch.manual_seed(next(made))
            return everything(model=specimens.dropout_mlp())

        check_resume(tmp_path, program, classes())


class TestHuggingFace:
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_opens_a_checkpoint(self, tmp_path, name):
        import transformers

        specimen = zoo.SPECIMENS[name]
        program = everything(model=specimen.model, loss=specimen.loss)
        state = ff.fold(program.step, program.init(0), [specimen.batch(4), specimen.batch(5)])
        home = save(program, state, tmp_path)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(home, output_loading_info=True)
        assert {kind: found for kind, found in report.items() if found} == {}
        tokens = specimens.words(3)["input_ids"]
        with torch.no_grad():
            theirs = model.eval()(input_ids=tokens).logits
        assert torch.equal(theirs, program.apply(state, input_ids=tokens).logits)

    def test_opens_one_in_shards(self, tmp_path, monkeypatch):
        import transformers

        from forgather_fn.checkpoint import snapshot as snapshots

        monkeypatch.setattr(snapshots, "SHARD_BYTES", 1000)
        specimen = zoo.SPECIMENS["llama"]
        program = everything(model=specimen.model, loss=specimen.loss)
        state = program.init(0)
        home = save(program, state, tmp_path)
        assert len(json.loads((home / "model.safetensors.index.json").read_bytes())["weight_map"]) > 1
        model = transformers.AutoModelForCausalLM.from_pretrained(home)
        tokens = specimens.words(3)["input_ids"]
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, program.apply(state, input_ids=tokens).logits)


def test_a_run_that_went_back_goes_on_from_where_it_was_last(run, tmp_path):
    """It is restored at step 4 and trained on other data to step 6: that is the latest, not step 12."""
    copy = shutil.copytree(run, tmp_path / "copy")
    program = everything()
    state = program.restore(copy / "checkpoints" / "checkpoint-4", allow={"data"})
    other = drawing(order="sequential")
    state = run_to(6, program, state, other, ff.every(1, saved(copy)))
    assert latest(copy).step == 6
    assert_equal(everything().restore(copy), state)


def test_the_first_batch_costs_the_same_anywhere():
    """Nothing is skipped or read to get to a position: the dataset is asked for the first batch and no more."""

    asked = []

    class Counting:
        def __len__(self):
            return 10**7

        def __getitem__(self, index):
            asked.append(index)
            return torch.zeros(5), 0

    data = ff.batches(Counting(), batch_size=4)
    batch = next(data.start(0, 9 * 10**6))
    assert asked == batch.indices.tolist()


def test_the_position_in_the_data_is_that_of_the_state(run):
    program = everything()
    expected = [tick.batch.indices for tick in toolz.pipe(program.steps(program.init(0), drawing()), ff.until(steps=6))]
    state = program.restore(run / "checkpoints" / "checkpoint-5")
    found = next(iter(program.steps(state, drawing()))).batch.indices
    assert found.tolist() == expected[5].tolist()

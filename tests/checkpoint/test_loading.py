import json
import logging
import os
import shutil
import time

import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.checkpoint import CheckpointError, load, load_weights, save, saved, system, verify
from tests.checkpoint.faults import assert_same, leaves
from tests.checkpoint.subjects import BATCHES, Small, drawing, everything, finished, run_to, small, trajectory
from tests.specimens import mlp, partly_frozen
from tests.toys import Noisy, assert_equal, classifier, labelled_batches


def stepping_one(programs, states, batch):
    states["one"], metrics = programs["one"].step(states["one"], batch)
    return states, metrics


@pytest.fixture(scope="module")
def program():
    made = small()
    made.init(0)
    return made


@pytest.fixture
def run(program, tmp_path):
    for step in (2, 4):
        save(program, trajectory()[step], tmp_path)
    return tmp_path


def home(run, step):
    return run / "checkpoints" / f"checkpoint-{step}"


class TestWhatIsFound:
    def test_the_latest_of_a_run(self, program, run):
        assert load(run).path == home(run, 4)
        assert_equal(program.restore(run), trajectory()[4])
        assert_equal(program.restore(str(run / "checkpoints")), trajectory()[4])

    def test_the_one_that_is_named(self, program, run):
        assert_equal(program.restore(home(run, 2)), trajectory()[2])

    def test_a_run_directory_may_be_called_as_a_checkpoint_is(self, program, run, tmp_path):
        other = shutil.copytree(run, tmp_path / "checkpoint-7")
        assert_equal(program.restore(other), trajectory()[4])

    @pytest.mark.parametrize("name", ["runs/a", "checkpoints", "checkpoint-fast"])
    def test_nothing_where_there_is_nothing(self, program, tmp_path, name):
        with pytest.raises(CheckpointError, match=f"{name} has no checkpoint that can be loaded"):
            program.restore(tmp_path / name)

    def test_nothing_of_a_name_that_there_is_not(self, program, run):
        with pytest.raises(CheckpointError, match=r"has no manifest\.json: another tool wrote it, its save"):
            program.restore(home(run, 3))

    def test_those_of_other_tools_are_passed_over_loudly(self, program, run, caplog):
        foreign = home(run, 500)
        foreign.mkdir()
        (foreign / "trainer_state.json").write_text("{}")
        shutil.copy(home(run, 4) / "model.safetensors", foreign)
        with caplog.at_level(logging.WARNING):
            assert load(run).path == home(run, 4)
        assert "checkpoint-500 is passed over" in caplog.text

    def test_the_state_has_memory_of_its_own(self, program, run):
        before = {path: path.read_bytes() for path in home(run, 4).iterdir()}
        finished(program, program.restore(run))
        assert {path: path.read_bytes() for path in home(run, 4).iterdir()} == before
        shutil.rmtree(run)
        assert_equal(program.restore(save(program, trajectory()[4], run)), trajectory()[4])

    def test_another_state_of_the_program_stays_as_it_is(self, program, run):
        other = program.init(0)
        before = leaves(other)
        finished(program, program.restore(run))
        assert_same(leaves(other), before)
        assert_equal(finished(program, other, steps=4), trajectory()[4])


DAMAGE = {
    "a flipped bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "a flipped first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a flipped last bit": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "a missing byte": lambda data: data[:-1],
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
    "a zeroed tail": lambda data: data[:-4] + b"\0\1\2\3",
    "zeros": lambda data: b"\0" * len(data),
    "one byte more": lambda data: data + b"\0",
    "no file": None,
}
FILES = ("model.safetensors", "optimizer.safetensors", "buffers.safetensors", "ema.safetensors", "state.json")


def damage(path, how):
    if DAMAGE[how] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))


class TestCorruption:
    @pytest.mark.parametrize("how", DAMAGE)
    @pytest.mark.parametrize("file", [*FILES, "manifest.json"])
    def test_of_the_newest_is_reported_and_the_one_before_is_used(self, program, run, caplog, file, how):
        damage(home(run, 4) / file, how)
        with caplog.at_level(logging.WARNING):
            assert_equal(program.restore(run), trajectory()[2])
        assert "checkpoint-4 is passed over" in caplog.text
        assert file in caplog.text

    @pytest.mark.parametrize("how", DAMAGE)
    @pytest.mark.parametrize("file", [*FILES, "manifest.json"])
    def test_of_the_one_that_was_named_is_an_error(self, program, run, file, how):
        damage(home(run, 4) / file, how)
        with pytest.raises(CheckpointError, match=file):
            program.restore(home(run, 4))
        assert verify(home(run, 4)) != []

    def test_of_all_is_an_error_that_names_every_reason(self, program, run):
        damage(home(run, 4) / "model.safetensors", "a flipped last bit")
        damage(home(run, 2) / "state.json", "no file")
        with pytest.raises(CheckpointError) as caught:
            program.restore(run)
        text = str(caught.value)
        assert "checkpoint-4: " in text
        assert "model.safetensors: its content was changed" in text
        assert "state.json is missing" in text

    def test_no_bit_of_a_file_of_tensors_can_change_unseen(self, run):
        path = home(run, 4) / "optimizer.safetensors"
        data = path.read_bytes()
        for byte in range(0, len(data), 3):
            path.write_bytes(data[:byte] + bytes([data[byte] ^ (1 << byte % 8)]) + data[byte + 1 :])
            with pytest.raises(CheckpointError):
                load(home(run, 4))

    def test_an_empty_newest_directory_is_passed_over(self, program, run, caplog):
        home(run, 9).mkdir()
        now = time.time()  # the file system's clock may be a tick behind that of the manifests
        os.utime(home(run, 9), (now, now))
        with caplog.at_level(logging.WARNING):
            assert_equal(program.restore(run), trajectory()[4])
        assert "checkpoint-9 is passed over" in caplog.text

    def test_a_disk_that_cannot_be_read_is_damage_too(self, program, run, monkeypatch, caplog):
        def failing(path, read_file=system.read_file):
            if "checkpoint-4" in str(path) and path.name == "model.safetensors":
                raise OSError(5, "Input/output error")
            return read_file(path)

        monkeypatch.setattr(system, "read_file", failing)
        with caplog.at_level(logging.WARNING):
            assert_equal(program.restore(run), trajectory()[2])
        assert "Input/output error" in caplog.text
        with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors cannot be read: Input/output error"):
            program.restore(home(run, 4))

    def test_a_failure_leaves_the_module_as_it_was(self, run):
        model = Small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        damage(home(run, 4) / "ema.safetensors", "a flipped bit")
        with pytest.raises(CheckpointError):
            small(model=model).restore(home(run, 4))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def resealed(run, step, edit):
    """Change the state file of a checkpoint, as one who knows the format can."""
    from hashlib import sha256

    from forgather_fn.checkpoint import manifest as manifests
    from forgather_fn.checkpoint.hashing import Written

    path = home(run, step) / "state.json"
    text = edit(path.read_bytes())
    path.write_bytes(text)
    manifest = manifests.read(home(run, step))
    files = {**manifest.files, "state.json": Written(len(text), sha256(text).hexdigest())}
    (home(run, step) / "manifest.json").write_bytes(manifests.dump(attrs.evolve(manifest, files=files)))


def without_field(*path):
    def edit(text):
        record = json.loads(text)
        held = record
        for name in path[:-1]:
            held = held[name]
        del held[path[-1]]
        return json.dumps(record).encode()

    return edit


class TestAStateFileThatIsNone:
    @pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff", b"{}", b'{"version": "x"}', b"[" * 100_000])
    def test_is_an_error(self, program, run, text):
        resealed(run, 4, lambda _: text)
        with pytest.raises(CheckpointError, match="checkpoint-4"):
            program.restore(home(run, 4))

    @pytest.mark.parametrize(
        "path",
        [
            *[
                (name,)
                for name in ("version", "step", "samples", "seed", "data", "batch_size", "counters", "structure")
            ],
            *[(name,) for name in ("buffers", "ema", "plan")],
            *[("counters", name) for name in ("updates", "skipped", "tokens", "nonfinite")],
            *[("structure", name) for name in ("opt", "transforms", "controls")],
            ("structure", "opt", "mapping", "momentum"),
            ("plan", "optimizer"),
        ],
        ids="/".join,
    )
    def test_no_part_that_is_missing_is_replaced_by_a_fresh_one(self, program, run, path):
        resealed(run, 4, without_field(*path))
        with pytest.raises(CheckpointError, match="checkpoint-4"):
            program.restore(home(run, 4))


def another(**changes):
    made = small(**changes)
    made.init(0)
    return made


class Wider(Small):
    """The same names, other shapes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)


class Longer(Small):
    """A parameter more."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(2))


class TestMismatch:
    @pytest.mark.parametrize(
        ("part", "changes", "there", "here"),
        [
            ("optimizer", {"optimizer": ff.adamw()}, "sgd(momentum=0.9", "adamw("),
            ("optimizer", {"optimizer": ff.sgd(momentum=0.8)}, "momentum=0.9", "momentum=0.8"),
            ("schedule", {"schedule": 2e-2}, "0.01", "0.02"),
            ("loss", {"loss": ff.losses.mse}, "cross_entropy", "mse"),
            ("transforms", {"transforms": (ff.clipped(1.0),)}, "()", "clipped(max_norm=1.0)"),
            ("average", {"average": ff.ema(0.9)}, "ema(decay=0.5", "ema(decay=0.9"),
            ("average", {"average": None}, "ema(decay=0.5", "None"),
            ("precision", {"precision": "bfloat16"}, "as_built", "bfloat16"),
            ("on_nonfinite", {"on_nonfinite": "skip"}, "raise", "skip"),
            ("model", {"model": Wider}, "subjects.Small", "test_loading.Wider"),
        ],
    )
    def test_of_the_plan_shows_both_sides(self, run, part, changes, there, here):
        with pytest.raises(CheckpointError) as caught:
            another(**changes).restore(run)
        text = str(caught.value)
        assert f"  {part}:\n" in text
        saved_line, here_line = (line for line in text.splitlines() if line.startswith("    "))
        assert saved_line.startswith("    saved:")
        assert there in saved_line
        assert here_line.startswith("    here:")
        assert here in here_line
        assert f"allow={{'{part}'}}" in text

    def test_of_several_parts_shows_all_of_them(self, run):
        with pytest.raises(CheckpointError, match=r"(?s)optimizer:.*schedule:.*transforms:"):
            another(optimizer=ff.adamw(), schedule=1.0, transforms=(ff.clipped(1.0),)).restore(run)

    @pytest.mark.parametrize(
        ("changes", "allow"),
        [
            ({"schedule": 2e-2}, {"schedule"}),
            ({"loss": ff.losses.mse}, {"loss"}),
            ({"optimizer": ff.sgd(momentum=0.8)}, ["optimizer"]),
            ({"average": ff.ema(0.9), "schedule": 1.0}, ("average", "schedule")),
        ],
    )
    def test_may_be_allowed(self, run, changes, allow):
        state = another(**changes).restore(run, allow=allow)
        assert_equal(state, trajectory()[4])

    @pytest.mark.parametrize(
        "changes", [{"microbatches": 2}, {"viewed_elements": 0}, {"donate": False}, {"init": "by_name"}], ids=str
    )
    def test_of_what_does_not_change_the_meaning_is_none(self, run, changes):
        assert_equal(another(**changes).restore(run), trajectory()[4])

    def test_of_the_weights_shows_both_sides(self, run):
        with pytest.raises(
            CheckpointError,
            match=r"checkpoint-4: body\.weight is \(3, 5\) torch\.float32 there, and \(4, 5\) torch\.float32 in this",
        ):
            another(model=Wider).restore(home(run, 4), allow={"model"}, without={"optimizer", "ema"})

    def test_of_the_data_type_shows_both_sides(self, run):
        with pytest.raises(CheckpointError, match=r"torch\.float32 there, and .* torch\.float64 in this model"):
            another(precision="float64").restore(run, allow={"precision"}, without={"optimizer", "ema"})

    def test_of_the_names_shows_both_sides(self, run, tmp_path):
        longer = another(model=Longer)
        with pytest.raises(CheckpointError, match="lacks 'extra', and has none besides"):
            longer.restore(run, allow={"model"}, without={"optimizer", "ema"})
        save(longer, longer.init(0), tmp_path / "b")
        with pytest.raises(CheckpointError, match="lacks none, and has 'extra' besides"):
            another().restore(tmp_path / "b", allow={"model"}, without={"optimizer", "ema"})

    def test_of_the_slots_shows_both_sides(self, run):
        adamw = another(optimizer=ff.adamw())
        said = r"opt: the checkpoint lacks \['exp_avg', 'exp_avg_sq', 'count'\]\. To .* without=\{'optimizer'\}\)"
        with pytest.raises(CheckpointError, match=said):
            adamw.restore(run, allow={"optimizer"})
        said = r"a slot that this optimizer does not keep\. To let this part begin afresh: .* without=\{'optimizer'\}\)"
        with pytest.raises(CheckpointError, match=said):
            another(optimizer=ff.sgd()).restore(run, allow={"optimizer"})
        state = another(optimizer=ff.sgd()).restore(run, allow={"optimizer"}, without={"optimizer"})
        assert (dict(state.opt), state.step) == ({}, 4)

    def test_where_there_is_no_average(self, tmp_path):
        plain = another(average=None)
        save(plain, plain.init(0), tmp_path)
        with pytest.raises(
            CheckpointError, match=r"holds no average of the parameters; leave it out: without=\{'ema'\}"
        ):
            another().restore(tmp_path, allow={"average"})

    @pytest.mark.parametrize("names", [{"optimiser"}, {"model", "x"}, "model", {"microbatches"}])
    def test_of_names_in_allow_is_an_error(self, program, run, names):
        with pytest.raises(
            ValueError, match=r"restore: allow=.*expected a set of names out of \['average', 'batch_size'"
        ):
            program.restore(run, allow=names)

    @pytest.mark.parametrize("names", [{"model"}, "ema", {"opt"}])
    def test_of_names_in_without_is_an_error(self, program, run, names):
        with pytest.raises(ValueError, match=r"restore: without=.*expected a set of names out of \['controls', 'ema'"):
            program.restore(run, without=names)


class TestMismatchOfTheData:
    @pytest.fixture
    def at_three(self, tmp_path):
        program = everything()
        run_to(3, program, program.init(0), drawing(), ff.every(3, saved(tmp_path)))
        return program, tmp_path

    @pytest.mark.parametrize(
        ("changes", "there", "here"),
        [
            ({"batch_size": 2}, "batch_size=6", "batch_size=2"),
            ({"order": "sequential"}, "order=shuffled", "order=sequential"),
            ({"last": "ragged"}, "last=span", "last=ragged"),
            ({"random": False, "collate": None}, "random=True", "random=False"),
            ({"seed": 5}, "seed=0", "seed=5"),
        ],
    )
    def test_shows_both_sides(self, at_three, changes, there, here):
        program, run = at_three
        with pytest.raises(ValueError, match="this state was trained") as caught:
            program.steps(program.restore(run), drawing(**changes))
        assert there in str(caught.value)
        assert here in str(caught.value)

    def test_of_the_length(self, at_three):
        program, run = at_three
        longer = ff.batches([(torch.zeros(5), 0)] * 23, batch_size=6, random=True, collate=drawing().collate)
        with pytest.raises(ValueError, match=r"(?s)length=22.*length=23"):
            program.steps(program.restore(run), longer)

    def test_of_the_batch_size_alone(self, tmp_path):
        program = small()
        data = ff.batches(labelled_batches(1, 20)[0], batch_size=4)
        run_to(2, program, program.init(0), data, ff.every(2, saved(tmp_path)))
        other = ff.batches(labelled_batches(1, 20)[0], batch_size=5)
        with pytest.raises(ValueError, match=r"batch_size=4, the stream has batch_size=5"):
            program.steps(program.restore(tmp_path), other)
        state = run_to(3, program, program.restore(tmp_path, allow={"batch_size"}), other)
        assert (state.samples, state.batch_size) == (13, 5)

    def test_may_be_allowed(self, at_three):
        program, run = at_three
        state = program.restore(run, allow={"data", "batch_size"})
        assert run_to(4, program, state, drawing(batch_size=4, order="sequential")).samples == 22


class TestWithout:
    def test_the_optimizer_starts_fresh_and_the_rest_does_not(self, program, run):
        state = program.restore(run, without={"optimizer"})
        assert not state.opt["momentum"]["body.weight"].any()
        assert_equal(attrs.evolve(state, arrays=attrs.evolve(state.read(), opt=trajectory()[4].opt)), trajectory()[4])

    def test_another_number_of_transforms_is_refused_unless_they_start_fresh(self, tmp_path):
        program = small()
        data = ff.batches(labelled_batches(1, 20)[0], batch_size=4)
        run_to(2, program, program.init(0), data, ff.every(2, saved(tmp_path)))
        clipping = ff.single(attrs.evolve(program.plan, transforms=(*program.plan.transforms, ff.clipped(1.0))))
        with pytest.raises(CheckpointError, match=r"\d transforms, and the plan has \d: .*without=\{'transforms'\}"):
            clipping.restore(tmp_path, allow={"transforms"})
        state = clipping.restore(tmp_path, allow={"transforms"}, without={"transforms"})
        assert run_to(3, clipping, state, data).step == 3

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            (
                None,
                lambda params: {"sum": torch.zeros(())},
                "transforms/0: expected a mapping, the checkpoint has None",
            ),
            ({}, lambda params: (torch.zeros(()),), "expected a sequence, the checkpoint has a mapping"),
            (
                {"sum": {}},
                lambda params: {"sum": torch.zeros(())},
                "0/sum: expected a tensor, the checkpoint has a map",
            ),
            (3, lambda params: params.map(torch.zeros_like), "expected a tensor for each parameter, the .* has 3"),
            (torch.ones(2), lambda params: params.map(torch.zeros_like), "each parameter, the checkpoint has a tensor"),
        ],
    )
    def test_another_kind_of_state_is_refused_unless_it_starts_fresh(self, tmp_path, before, after, message):
        def keeping(init):
            return small(transforms=(ff.Transform(init, lambda g, s, **_: (g, s)),))

        first, second = keeping(lambda params: before), keeping(after)
        save(first, first.init(0), tmp_path)
        with pytest.raises(CheckpointError, match=rf"{message}.*another plan\. .*without=\{{"):
            second.restore(tmp_path, allow={"transforms"})
        state = second.restore(tmp_path, allow={"transforms"}, without={"transforms"})
        assert_equal(second.step(state, BATCHES[0])[0], second.step(second.init(0), BATCHES[0])[0])

    def test_the_average_starts_from_the_weights(self, program, run):
        state = program.restore(run, without={"ema"})
        assert torch.equal(state.ema["body.weight"], trajectory()[4].params["body.weight"])
        assert state.ema["body.weight"].data_ptr() != state.params["body.weight"].data_ptr()

    def test_the_progress_starts_at_nought(self, program, run):
        state = program.restore(run, without={"progress"})
        counts = {name: int(getattr(state, name)) for name in ("step", "samples", "updates", "tokens", "skipped")}
        assert set(counts.values()) == {0}
        assert (state.data, state.batch_size) == (None, None)
        assert torch.equal(state.params["body.weight"], trajectory()[4].params["body.weight"])

    def test_what_starts_fresh_sees_the_weights_that_were_read(self, run):
        """As an optimizer that keeps a copy of the parameters does."""
        seen = []

        def init(params):
            seen.append(params["body.weight"].clone())
            return {"momentum": params.map(torch.zeros_like)}

        base = ff.sgd(momentum=0.9)
        program = another(
            optimizer=attrs.evolve(base, init=init),
            transforms=(
                ff.Transform(lambda params: seen.append(params["body.weight"].clone()), lambda g, s, **_: (g, s)),
            ),
        )
        program.restore(run, allow={"transforms"}, without={"optimizer", "transforms"})
        assert torch.equal(seen[-1], trajectory()[4].params["body.weight"])
        assert torch.equal(seen[-2], trajectory()[4].params["body.weight"])

    def test_everything_but_the_weights(self, program, run):
        state = program.restore(run, without={"optimizer", "ema", "transforms", "controls", "progress"})
        fresh = program.init(0)
        assert torch.equal(state.params["body.weight"], trajectory()[4].params["body.weight"])
        assert (state.step, state.seed) == (fresh.step, fresh.seed)


class TestLoadWeights:
    def test_takes_the_model_and_nothing_else(self, program, run):
        fresh, there = program.init(7), trajectory()[4]
        state = load_weights(fresh, run)
        assert torch.equal(state.params["body.weight"], there.params["body.weight"])
        assert torch.equal(state.buffers["norm.running_mean"], there.buffers["norm.running_mean"])
        assert (state.step, state.samples, state.seed, int(state.updates)) == (0, 0, 7, 0)
        assert not state.opt["momentum"]["body.weight"].any()
        assert int(state.buffers["seen"]) == 0  # it is not persistent
        assert fresh.consumed

    def test_starts_the_average_from_the_weights(self, program, run):
        state = load_weights(program.init(7), run)
        assert torch.equal(state.ema["body.weight"], state.params["body.weight"])

    @pytest.mark.parametrize("joint", [False, True])
    @pytest.mark.parametrize(
        "optimizer",
        [
            ff.optim.schedule_free_adamw(),
            ff.optim.partitioned({"all": ("*", ff.optim.lookahead(ff.sgd(), steps=1))}),
            ff.optim.master_weights(ff.sgd()),
        ],
        ids=["schedule_free", "lookahead", "master_weights"],
    )
    def test_optimizers_that_keep_parameters_start_from_them_too(self, tmp_path, optimizer, joint):
        """With a rate of 0 the first update leaves the weights where they are."""
        batch = (torch.ones(2, 2, dtype=torch.bfloat16),) * 2
        plan = ff.Plan(model=lambda: nn.Linear(2, 2).bfloat16(), loss=ff.losses.mse, optimizer=optimizer, schedule=0.0)
        made = ff.joined({"one": plan}, stepping_one) if joint else ff.single(plan)
        there = made.init(3).copy()
        save(made, there, tmp_path)
        state, _ = made.step(load_weights(made.init(7), tmp_path), batch)
        exported, expected = (made.export(one).state_dict() for one in (state, there))
        for name, weight in there.params.items():
            assert torch.equal(state.params[name], weight)
            assert torch.equal(exported[name], expected[name])

    def test_can_be_trained_from(self, run):
        one, other = another(), another()
        state = load_weights(one.init(7), run)
        model = Small()
        model.load_state_dict(other.export(other.restore(run)).state_dict())
        by_hand = another(model=model)
        assert_equal(finished(one, state), finished(by_hand, by_hand.init(7)))

    def test_takes_frozen_parameters_too(self, tmp_path):
        def made(seed):
            model = partly_frozen()
            torch.manual_seed(seed)
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            return model

        source = another(model=made(1))
        there = source.init(0)
        save(source, there, tmp_path)
        target = another(model=made(2))
        fresh = target.init(0)
        sibling = fresh.copy()
        before = {name: tensor.clone() for name, tensor in sibling.frozen.items()}
        state = load_weights(fresh, tmp_path)
        assert set(state.frozen) == {"2.weight", "2.bias"}
        for name in state.frozen:
            assert torch.equal(state.frozen[name], there.frozen[name])
            assert torch.equal(sibling.frozen[name], before[name])  # what others share is not written to
        out = target.apply(state, torch.ones(1, 5))
        assert torch.equal(out, source.apply(there, torch.ones(1, 5)))

    def test_takes_what_is_selected(self, tmp_path):
        source = another(model=lambda: classifier(seed=1))
        there = source.init(0)
        save(source, there, tmp_path)
        target = another(model=lambda: classifier(seed=2))
        fresh = target.init(0)
        kept = fresh.copy()
        state = load_weights(fresh, tmp_path, select=lambda name: name.startswith("0."))
        assert torch.equal(state.params["0.weight"], there.params["0.weight"])
        assert torch.equal(state.params["2.weight"], kept.params["2.weight"])
        assert torch.equal(state.ema["2.weight"], kept.ema["2.weight"])

    def test_takes_a_part_of_another_model(self, tmp_path):
        source = another(model=mlp)
        save(source, source.init(0), tmp_path)
        target = another(model=lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9)))
        state = load_weights(target.init(3), tmp_path, select=lambda name: name.startswith("0."))
        assert torch.equal(state.params["0.weight"], source.init(0).params["0.weight"])

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (
                ["0.weight", "2.weight"],
                r"2\.weight is \(3, 7\) torch.float32 there, and \(9, 7\) torch.float32 in this",
            ),
            (["0.weight", "4.weight"], r"has no '4\.weight'\. The model here has"),
            ([], "select chose nothing"),
        ],
    )
    def test_refuses_what_does_not_fit_and_consumes_nothing(self, tmp_path, chosen, message):
        source = another(model=mlp)
        save(source, source.init(0), tmp_path)
        layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2)
        target = another(model=nn.Sequential(*layers))
        fresh = target.init(0)
        before = leaves(fresh)
        with pytest.raises(CheckpointError, match=message):
            load_weights(fresh, tmp_path, select=lambda name: name in chosen)
        assert not fresh.consumed
        assert_same(before, leaves(fresh))


class TestFrozen:
    def test_parameters_come_back_and_stay_shared(self, tmp_path):
        program = another(model=partly_frozen)
        state = finished(program, program.init(0), steps=2)
        save(program, state, tmp_path)
        restored = program.restore(tmp_path)
        assert_equal(restored, state)
        assert set(restored.frozen) == {"2.weight", "2.bias"}

    def test_ones_with_other_values_do_not_change_those_of_other_states(self, tmp_path):
        model = partly_frozen()
        program = another(model=model)
        save(program, program.init(0), tmp_path)
        other = partly_frozen()
        with torch.no_grad():
            other[2].weight.zero_()
        second = another(model=other)
        mine = second.init(0)
        assert torch.equal(second.restore(tmp_path).frozen["2.weight"], program.init(0).frozen["2.weight"])
        assert not mine.frozen["2.weight"].any()
        assert not second.apply(mine, torch.ones(1, 5)).isnan().any()
        assert not mine.frozen["2.weight"].any()


def test_buffers_come_back_in_the_shape_that_they_had(tmp_path):
    program = everything()
    state = run_to(4, program, program.init(0), drawing())
    save(program, state, tmp_path)
    other = everything()
    restored = other.restore(tmp_path)
    assert restored.buffers["history"].shape == (5,)
    assert_equal(restored, state)


def test_batch_statistics_are_those_of_the_checkpoint(tmp_path):
    program = another(model=Noisy)
    state = finished(program, program.init(0), steps=3)
    save(program, state, tmp_path)
    other = another(model=Noisy)
    data = BATCHES[:2]
    assert other.evaluate(other.restore(tmp_path), data) == program.evaluate(state, data)


def test_the_module_stands_on_what_was_restored(run):
    program = another()
    state = program.restore(run)
    assert program.module().body.weight.data_ptr() == state.params["body.weight"].data_ptr()
    assert torch.equal(program.module().norm.running_mean, trajectory()[4].buffers["norm.running_mean"])

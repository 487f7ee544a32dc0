"""A run that goes on is the run that was not stopped, whoever began it."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import forgather.ml as ours
from forgather.ml.trainer.collators import default_data_collator
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import Regression, rows

LONG = {"max_steps": 14, "save_steps": 5, "warmup_steps": 2, "weight_decay": 0.1}


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def same(one, other):
    for name, p in one.items():
        torch.testing.assert_close(other[name], p, rtol=0, atol=0, msg=name)


def losses(made):
    return [(log["step"], log["loss"]) for log in made.state.log_history if "loss" in log]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "regression"])
def test_a_run_that_goes_on_is_the_run_itself(kind, accumulate, tmp_path):
    whole = trainer(ours, tmp_path / "a", kind, gradient_accumulation_steps=accumulate, **LONG)
    whole.train()
    for step in (5, 10):
        other = trainer(ours, tmp_path / "b", kind, gradient_accumulation_steps=accumulate, **LONG)
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        same(weights(whole), weights(other))
        assert losses(other) == losses(whole)
        assert other.state.epoch == whole.state.epoch


@pytest.mark.parametrize("step", [5, 10])
@pytest.mark.parametrize(("first", "second"), [(transformers, ours), (ours, transformers)], ids=["to us", "from us"])
def test_runs_are_handed_over(first, second, step, tmp_path):
    whole = trainer(second, tmp_path / "whole", "llama", **LONG)
    whole.train()
    trainer(first, tmp_path / "a", "llama", **LONG).train()
    other = trainer(second, tmp_path / "b", "llama", **LONG)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert other.state.global_step == 14
    for (at, mine), (_, theirs) in zip(losses(other), losses(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5), at
    rates = [[log["learning_rate"] for log in t.state.log_history if "learning_rate" in log] for t in (other, whole)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


class Random(torch.utils.data.Dataset):
    """Draws from all three generators."""

    def __init__(self):
        self.rows = rows("regression")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        noise = torch.rand(()) + random.random() + np.random.rand()
        return {**self.rows[i], "x": self.rows[i]["x"] + noise.float()}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_data_are_those_of_the_run(workers, tmp_path):
    def made(folder):
        t = trainer(ours, folder, dataloader_num_workers=workers, **LONG)
        t.train_dataset = Random()
        return t

    whole = made(tmp_path / "a")
    whole.train()
    for step in (5, 10):
        other = made(tmp_path / "b")
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        same(weights(whole), weights(other))


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    trainer(ours, tmp_path, **LONG).train()
    (tmp_path / "checkpoint-99").mkdir()
    weights_file = tmp_path / "checkpoint-14" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    other = trainer(ours, tmp_path, **LONG)
    other.train(resume_from_checkpoint=True)
    assert losses(other)[9][0] == 10
    assert other.state.global_step == 14


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    trainer(ours, tmp_path, **LONG).train()
    file = tmp_path / "checkpoint-5" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"checkpoint-5 is damaged: optimizer\.pt"):
        trainer(ours, tmp_path, **LONG).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_rewritten_weights_are_damage_unless_there_is_nothing_to_compare_with(tmp_path, caplog):
    trainer(ours, tmp_path, max_steps=4, save_steps=2, learning_rate=0.0).train()
    folder = tmp_path / "checkpoint-4"
    found = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in found.items()}, folder / "model.safetensors")

    def resumed(**options):
        made = trainer(ours, tmp_path, max_steps=5, save_strategy="no", learning_rate=0.0, **options)
        made.train(resume_from_checkpoint=True)
        return weights(made)["out.bias"]

    torch.testing.assert_close(resumed(), found["out.bias"])
    assert "checkpoint-4 is passed over: model.safetensors" in caplog.text
    (folder / "manifest.json").unlink()
    torch.testing.assert_close(resumed(), found["out.bias"] + 1)


def without_optimizer(folder):
    (folder / "optimizer.pt").unlink()


def with_another_line(folder):
    with (folder / "trainer_state.json").open("a") as file:
        file.write("\n")


def with_other_arguments(folder):
    (folder / "training_args.bin").write_bytes(b"")


@pytest.mark.parametrize("library", [ours, transformers])
@pytest.mark.parametrize("change", [without_optimizer, with_another_line, with_other_arguments])
def test_what_callbacks_do_to_checkpoints_neither_keeps_them_nor_spoils_them(change, library, tmp_path, caplog):
    class Changes(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            change(tmp_path / f"checkpoint-{state.global_step}")

    options = {"save_steps": 1, "save_total_limit": 1}
    trainer(library, tmp_path, callbacks=[Changes()], max_steps=3, **options).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert ours.get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    other = trainer(library, tmp_path, max_steps=4, **options)
    assert other.train(resume_from_checkpoint=True).global_step == 4
    assert [step for step, _ in losses(other)] == [1, 2, 3, 4]
    assert library is transformers or "checkpoint-3 was changed since it was saved" in caplog.text


def test_damaged_weights_are_found_beside_a_file_that_is_gone(tmp_path):
    trainer(ours, tmp_path).train()
    without_optimizer(tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged: model\.safetensors"):
        trainer(ours, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("state", ["{", '{"global_step": 4}', '{"global_step": "6"}'])
def test_a_state_that_is_none_of_this_checkpoint_is_refused(state, tmp_path):
    trainer(ours, tmp_path).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged: trainer_state\.json"):
        trainer(ours, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_nothing_to_go_on_from_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer(ours, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        trainer(ours, tmp_path).train(resume_from_checkpoint=str(tmp_path))
    assert trainer(ours, tmp_path).train(resume_from_checkpoint=False).global_step == 6


def test_resharded_weights_are_read_with_a_warning(tmp_path):
    made = trainer(ours, tmp_path, "llama", **LONG)
    made.train()
    folder = tmp_path / "checkpoint-10"
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").exists()
    other = trainer(ours, tmp_path, "llama", **LONG)
    # `from_pretrained` wrote config.json anew as well.
    shutil.copy(tmp_path / "checkpoint-14" / "config.json", folder / "config.json")
    with pytest.warns(UserWarning, match="another tool has written them anew"):
        other.train(resume_from_checkpoint=str(folder))
    same(weights(made), weights(other))


@pytest.mark.parametrize("options", [{"max_steps": 20}, {"ignore_data_skip": True}, {"max_steps": 20, "save_steps": 4}])
def test_other_arguments_win_as_in_transformers(options, tmp_path):
    trainer(transformers, tmp_path / "a", **LONG).train()
    made = {}
    for library in (ours, transformers):
        made[library] = trainer(library, tmp_path / library.__name__, **{**LONG, **options})
        made[library].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    mine, theirs = made[ours], made[transformers]
    assert mine.state.global_step == theirs.state.global_step
    assert [step for step, _ in losses(mine)] == [step for step, _ in losses(theirs)]
    assert [loss for _, loss in losses(mine)] == pytest.approx([loss for _, loss in losses(theirs)], rel=1e-5)
    assert mine.state.epoch == pytest.approx(theirs.state.epoch)
    one, other = (sorted(p.name for p in (tmp_path / lib.__name__).iterdir()) for lib in (ours, transformers))
    assert one == other


def test_a_loader_of_the_user_goes_on_where_it_was(tmp_path):
    class Mine(ours.Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=4, shuffle=True)

    whole = trainer(ours, tmp_path / "a", cls=Mine, **LONG)
    whole.train()
    other = trainer(ours, tmp_path / "b", cls=Mine, **LONG)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    same(weights(whole), weights(other))


class Loader(DataLoader):
    """A loader whose class is a user's."""


class Shuffled:
    """What can only be iterated, in an order that it draws each time."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        order = list(range(len(self.samples)))
        random.shuffle(order)
        for first in range(0, len(order), 4):
            yield default_data_collator([self.samples[i] for i in order[first : first + 4]])

    def __len__(self):
        return math.ceil(len(self.samples) / 4)


LOADERS = {
    "prepared": lambda made: made.accelerator.prepare(DataLoader(made.train_dataset, batch_size=4, shuffle=True)),
    "subclass": lambda made: Loader(made.train_dataset, batch_size=4, shuffle=True),
    "iterable": lambda made: Shuffled(made.train_dataset),
}


@pytest.mark.parametrize("kind", sorted(LOADERS))
def test_whatever_loader_is_given_goes_on_where_it_was(kind, tmp_path):
    class Mine(ours.Trainer):
        def get_train_dataloader(self):
            return LOADERS[kind](self)

    def made(folder):
        t = trainer(ours, folder, cls=Mine, **LONG)
        t.train_dataset = Random()
        return t

    whole = made(tmp_path / "a")
    whole.train()
    for step in (5, 10):
        other = made(tmp_path / "b")
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        same(weights(whole), weights(other))


@pytest.mark.parametrize("library", [ours, transformers])
def test_a_run_that_goes_on_with_a_prepared_loader_sees_each_sample_once_an_epoch(library, tmp_path):
    class Sees(Regression):
        def forward(self, x, labels=None):
            self.seen = [*getattr(self, "seen", []), *x[:, 0].tolist()]
            return super().forward(x, labels)

    class Mine(library.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=4, shuffle=True))

    def made():
        return trainer(library, tmp_path, cls=Mine, model=Sees(), max_steps=6, save_steps=3)

    first, rest = made(), made()
    first.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = [*first.model.seen[:12], *rest.model.seen]  # 3 batches of 4 before
    assert sorted(seen) == sorted(float(row["x"][0]) for row in rows("regression"))


def test_an_iterable_dataset_goes_on_where_it_was(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows("regression", 60)

    def made(folder):
        t = trainer(ours, folder, **LONG)
        t.train_dataset = Endless()
        return t

    whole = made(tmp_path / "a")
    whole.train()
    other = made(tmp_path / "b")
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    same(weights(whole), weights(other))


class RandomStream(torch.utils.data.IterableDataset):
    """Draws in its workers."""

    def __iter__(self):
        for row in rows("regression", 20):
            yield {**row, "x": row["x"] + random.random() + torch.rand(()) + np.random.rand()}


def test_random_streams_in_workers_are_those_of_the_run(tmp_path):
    def made(folder):
        t = trainer(ours, folder, dataloader_num_workers=1, **LONG)
        t.train_dataset = RandomStream()
        return t

    whole = made(tmp_path / "a")
    whole.train()
    other = made(tmp_path / "b")
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert losses(other)[10:] == losses(whole)[10:]

"""Checkpoints: what Hugging Face's tools expect, written whole or not at all, rotated as transformers does."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import forgather.ml as ours
from forgather.ml.trainer.unharmed import newest_checkpoint
from forgather_fn.checkpoint import catalog, system
from tests.compat.tiny import MODELS, Regression, regression, rows

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
BATCH = {"per_device_train_batch_size": 4}


def trainer(library, folder, kind="regression", *, cls=None, model=None, callbacks=None, **options):
    args = library.TrainingArguments(
        str(folder), **{**QUIET, **BATCH, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, **options}
    )
    made = (cls or library.Trainer)(
        model=model or MODELS[kind](), args=args, train_dataset=rows(kind), eval_dataset=rows(kind, 9, seed=2),
        callbacks=callbacks,
    )  # fmt: skip
    made.pop_callback(library.PrinterCallback)
    return made


def entries(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["llama", "regression"])
def test_files_are_those_of_transformers(kind, tmp_path):
    for library, name in ((ours, "a"), (transformers, "b")):
        made = trainer(library, tmp_path / name, kind)
        made.train()
        made.save_model()
        made.save_state()
    assert entries(tmp_path / "a") == entries(tmp_path / "b")
    mine, theirs = tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4"
    assert entries(mine) == sorted([*entries(theirs), "manifest.json"])
    one, other = (json.loads((folder / "trainer_state.json").read_text()) for folder in (mine, theirs))
    assert set(one) == set(other)
    for name in set(one) - {"log_history", "total_flos"}:
        assert one[name] == other[name], name
    assert one["total_flos"] == pytest.approx(other["total_flos"])
    for file in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(folder / file, weights_only=True) for folder in (mine, theirs))
        assert set(one) == set(other)
        if file == "optimizer.pt":
            assert one["param_groups"] == other["param_groups"]
            assert {n: set(row) for n, row in one["state"].items()} == {n: set(r) for n, r in other["state"].items()}
            for number, row in other["state"].items():
                torch.testing.assert_close(one["state"][number], row, rtol=1e-4, atol=1e-9)
    assert set(load_file(mine / "model.safetensors")) == set(load_file(theirs / "model.safetensors"))


def test_a_checkpoint_of_a_language_model_opens_with_from_pretrained(tmp_path):
    made = trainer(ours, tmp_path, "llama")
    made.train()
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(dict(opened.named_parameters())[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_keeps_what_transformers_keeps(limit, tmp_path):
    for library, name in ((ours, "a"), (transformers, "b")):
        made = trainer(
            library, tmp_path / name, save_total_limit=limit, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, max_steps=10, learning_rate=0.5,
        )  # fmt: skip
        made.train()
        assert (made.state.best_model_checkpoint or "").startswith(str(tmp_path / name))
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    made = trainer(
        ours,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        max_steps=8,
        learning_rate=0.3,
        lr_scheduler_type="constant",
    )
    made.train()
    losses = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert made.state.best_global_step == best
    assert made.state.best_metric == losses[best]
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert best != 8  # or nothing was loaded


def test_save_strategy_best_saves_improvements_only(tmp_path):
    for library, name in ((ours, "a"), (transformers, "b")):
        made = trainer(
            library, tmp_path / name, save_strategy="best", metric_for_best_model="loss", eval_strategy="steps",
            eval_steps=1, max_steps=8, learning_rate=0.3,
        )  # fmt: skip
        made.train()
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


def test_only_the_model_is_saved_where_that_was_asked_for(tmp_path):
    trainer(ours, tmp_path, save_only_model=True).train()
    expected = ["manifest.json", "model.safetensors", "trainer_state.json", "training_args.bin"]
    assert entries(tmp_path / "checkpoint-6") == expected


def test_overridden_methods_write_into_the_checkpoint(tmp_path):
    class Mine(ours.Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            assert ".tmp-" in str(output_dir)
            (tmp_path / "seen").write_text(str(output_dir))
            with open(os.path.join(output_dir, "more.txt"), "w") as file:
                file.write("more")

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            with open(os.path.join(folder, "extra.txt"), "w") as file:
                file.write("extra")

    made = trainer(ours, tmp_path, cls=Mine)
    made.train()
    folder = tmp_path / "checkpoint-6"
    assert {"more.txt", "extra.txt", "model.safetensors"} <= set(entries(folder))
    assert {"more.txt", "extra.txt"} <= set(catalog.entry(folder).manifest.files)
    assert not [name for name in entries(tmp_path) if name.startswith(".")]


def test_an_override_that_writes_straight_to_the_output_directory_is_taken_in(tmp_path):
    class Mine(ours.Trainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "extra.txt"), "w") as file:
                file.write("extra")

    trainer(ours, tmp_path, cls=Mine).train()
    assert {"extra.txt", "model.safetensors", "manifest.json"} <= set(entries(tmp_path / "checkpoint-4"))
    assert catalog.verify(tmp_path / "checkpoint-4") == []


def test_on_save_may_add_files(tmp_path):
    class Adds(ours.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            with open(os.path.join(folder, "note.txt"), "w") as file:
                file.write("note")

    trainer(ours, tmp_path, callbacks=[Adds()]).train()
    assert catalog.verify(tmp_path / "checkpoint-4") == []
    assert catalog.added(catalog.entry(tmp_path / "checkpoint-4")) == ["note.txt"]


def test_a_save_that_fails_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    class Fails(ours.Trainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step == 4:
                raise OSError("the disk is full")
            super()._save_optimizer_and_scheduler(output_dir)

    made = trainer(ours, tmp_path, cls=Fails)
    with pytest.raises(OSError, match="the disk is full"):
        made.train()
    assert entries(tmp_path) == ["checkpoint-2"]
    assert ours.get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_tied_weights_of_a_plain_module_are_saved_and_read(tmp_path):
    class Tied(Regression):
        def __init__(self):
            super().__init__()
            self.again = self.hidden

    torch.manual_seed(0)
    made = trainer(ours, tmp_path, model=Tied())
    made.train()
    assert not any(name.startswith("again") for name in load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    other = trainer(ours, tmp_path, model=Tied(), max_steps=7)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 7


def test_saving_by_hand_needs_no_training(tmp_path):
    made = trainer(ours, tmp_path)
    made.save_model(str(tmp_path / "out"))
    assert entries(tmp_path / "out") == ["model.safetensors", "training_args.bin"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in regression().named_parameters():
        torch.testing.assert_close(held[name], parameter.detach(), rtol=0, atol=0)


def test_a_tokenizer_is_saved_beside_the_model(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            with open(os.path.join(folder, "tokenizer.json"), "w") as file:
                file.write("{}")

    made = trainer(ours, tmp_path)
    made.processing_class = Tokenizer()
    made.train()
    assert "tokenizer.json" in entries(tmp_path / "checkpoint-2")


def test_a_module_whose_state_is_no_tensor_is_refused_by_name(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    made = trainer(ours, tmp_path, model=Odd(2, 1))
    with pytest.raises(ValueError, match="_extra_state"):
        made.save_model()


class Part(Regression):
    """Has a method of the name that models of transformers have, which writes something else."""

    def save_pretrained(self, folder):
        raise AssertionError("nobody asked for it")


@pytest.mark.parametrize("library", [ours, transformers])
def test_a_module_that_has_a_save_pretrained_of_its_own_is_saved_as_any_other(library, tmp_path):
    made = trainer(library, tmp_path, model=Part())
    made.train()
    written = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {name: tuple(p.shape) for name, p in made.model.state_dict().items()} == {
        name: tuple(p.shape) for name, p in written.items()
    }


def test_a_model_of_transformers_that_is_compiled_opens_with_from_pretrained(tmp_path):
    made = trainer(ours, tmp_path, "llama")
    made.model = torch.compile(made.model, backend="eager")
    made.save_model()
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened.lm_head.weight, made.model.lm_head.weight)


CALLS = ("make_directory", "create", "write", "sync", "close", "sync_directory", "rename", "unlink", "remove_directory")


@pytest.mark.parametrize("keeps", [None, 1])
def test_wherever_a_save_is_stopped_a_whole_checkpoint_is_found(keeps, tmp_path, monkeypatch):
    """Every call to the system of the second save is made to fail once; the first or the second save is found then."""
    state = {"made": 0, "fails": None, "counting": False}

    def failing(name, original):
        def call(*args):
            if state["counting"]:
                state["made"] += 1
                if state["made"] - 1 == state["fails"]:
                    if name == "close":
                        original(*args)
                    raise OSError(f"call {state['fails']}: {name}")
            return original(*args)

        return call

    for name in CALLS:
        monkeypatch.setattr(system, name, failing(name, getattr(system, name)))

    class Counts(ours.Trainer):
        def _commit_checkpoint(self):
            state["counting"] = self.state.global_step == 4
            super()._commit_checkpoint()
            state["counting"] = False

    def save(folder, fails):
        state.update(made=0, fails=fails, counting=False)
        made = trainer(ours, folder, cls=Counts, max_steps=4, save_total_limit=keeps)
        try:
            made.train()
        except OSError:
            return False
        finally:
            state["counting"] = False
        return True

    assert save(tmp_path / "whole", None)
    number = state["made"]
    assert number > 20
    for i in range(number):
        folder = tmp_path / str(i)
        done = save(folder, i)
        newest = newest_checkpoint(folder)
        assert newest in {str(folder / "checkpoint-2"), str(folder / "checkpoint-4")}, i
        assert not done or newest.endswith("checkpoint-4")
        assert catalog.verify(newest) == []

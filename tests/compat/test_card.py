"""The model card that scripts write last."""

import inspect

import pytest
import transformers
import yaml

import forgather.ml as ours
from tests.compat.test_checkpoints import trainer
from tests.compat.test_peft import adapted

GIVEN = {
    "finetuned_from": "some/model", "license": "mit", "language": "en", "tags": "tiny", "tasks": "text-classification",
    "dataset": "Rows: all of them", "dataset_tags": "rows", "dataset_args": "small",
}  # fmt: skip


@pytest.mark.parametrize("given", [GIVEN, {**GIVEN, "tags": ["a", "generated_from_trainer"]}], ids=["word", "list"])
def test_metadata_are_those_of_transformers(given, tmp_path):
    heads = []
    for library in (ours, transformers):
        made = trainer(library, tmp_path / library.__name__, eval_strategy="steps", eval_steps=3, save_strategy="no")
        made.train()
        made.create_model_card(**given)
        text = (tmp_path / library.__name__ / "README.md").read_text(encoding="utf-8")
        heads.append(yaml.safe_load(text.split("---\n")[1]))
        assert f"# {library.__name__}\n" in text
        assert all(word in text for word in ("some/model", "Rows: all of them", "learning_rate: 0.01", "seed: 42"))
    names = {"library_name", "language", "license", "base_model", "tags", "datasets"}
    assert {name: heads[0][name] for name in names} == {name: heads[1][name] for name in names}


def test_the_card_has_what_was_given_and_each_evaluation(tmp_path):
    made = trainer(ours, tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no")
    made.train()
    made.create_model_card(model_name="mine", **GIVEN)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- Trained on: Rows: all of them (small)\n- For: text-classification\n" in text
    losses = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    assert [f"| {loss:.4g} |" in text for loss in losses] == [True, True]
    assert f"- eval_loss: {losses[-1]:.4g}\n" in text


def test_a_card_needs_neither_training_nor_arguments(tmp_path):
    trainer(ours, tmp_path / "mine").create_model_card()
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "# mine\n" in text
    assert "- Trained from: scratch\n- Trained on: an unknown dataset\n" in text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # what PEFT calls
def test_adapters_say_that_they_are_adapters(tmp_path):
    trainer(ours, tmp_path, model=adapted()).create_model_card(finetuned_from="some/model", license="mit")
    head = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (head["library_name"], head["license"]) == ("peft", "mit")


def test_the_arguments_are_those_of_transformers():
    one, other = (inspect.signature(library.Trainer.create_model_card) for library in (ours, transformers))
    assert list(one.parameters) == list(other.parameters)

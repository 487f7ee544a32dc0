"""Models with adapters of PEFT: the adapters alone are trained, saved, resumed, and loaded as the best."""

import os

import pytest
import torch
import transformers
from safetensors.torch import load_file

import forgather.ml as ours
from tests.compat.test_checkpoints import trainer
from tests.compat.tiny import llama

peft = pytest.importorskip("peft")

BOTH = (ours, transformers)
pytestmark = pytest.mark.filterwarnings(  # what PEFT calls of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Could not find a config file:UserWarning",
)


def adapted():
    model = llama()
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
    )
    return peft.get_peft_model(model, config)


def made(library, folder, **options):
    return trainer(library, folder, "llama", model=adapted(), **{"learning_rate": 0.1, **options})


def adapters(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if "lora" in name}


def losses(made):
    return [log["loss"] for log in made.state.log_history if "loss" in log]


def test_adapters_are_trained_as_in_transformers(tmp_path):
    found = [made(library, tmp_path / library.__name__, save_strategy="no") for library in BOTH]
    for one in found:
        one.train()
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)
    before = dict(adapted().named_parameters())
    for name, p in found[0].model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora" not in name)


def test_adapters_alone_are_saved(tmp_path):
    for library in BOTH:
        made(library, tmp_path / library.__name__).train()
    mine, theirs = (tmp_path / library.__name__ / "checkpoint-4" for library in BOTH)
    assert sorted(os.listdir(mine)) == sorted([*os.listdir(theirs), "manifest.json"])
    assert set(load_file(mine / "adapter_model.safetensors")) == set(load_file(theirs / "adapter_model.safetensors"))


@pytest.mark.parametrize(("first", "second"), [(ours, ours), (transformers, ours), (ours, transformers)])
def test_adapters_are_resumed(first, second, tmp_path):
    whole = made(second, tmp_path / "whole")
    whole.train()
    made(first, tmp_path / "a").train()
    other = made(second, tmp_path / "b")
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert other.state.global_step == 6
    for name, p in adapters(whole).items():
        torch.testing.assert_close(adapters(other)[name], p, rtol=1e-4, atol=1e-6, msg=name)


def test_the_newest_checkpoint_of_transformers_is_found(tmp_path):
    made(transformers, tmp_path).train()
    other = made(ours, tmp_path, max_steps=7)
    other.train(resume_from_checkpoint=True)
    assert other.state.log_history[0]["step"] == 1
    assert other.state.global_step == 7


def test_the_best_adapters_are_loaded(tmp_path):
    one = made(
        ours, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=8,
        learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    one.train()
    found = {log["step"]: log["eval_loss"] for log in one.state.log_history if "eval_loss" in log}
    best = min(found, key=found.get)
    assert best != 8
    assert one.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-6)

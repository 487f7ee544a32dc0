from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import torch
import transformers
from torch import nn

import forgather.ml
from forgather.ml import Trainer
from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.model_settings import constructed, model_settings
from tests.compat import tiny


def arguments(**given: Any) -> TrainingArguments:
    return TrainingArguments("x", use_cpu=True, **given)


def test_a_model_is_built_with_the_data_type_that_is_named_and_no_other_is() -> None:
    made = constructed(lambda: nn.Linear(2, 2), arguments(default_dtype="bfloat16", construct_model_on="device"))
    assert made.weight.dtype == torch.bfloat16
    assert nn.Linear(2, 2).weight.dtype == torch.float32

    def failing() -> nn.Module:
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        constructed(failing, arguments(default_dtype="float64"))
    assert torch.get_default_dtype() == torch.float32


def test_a_model_is_compiled_in_place_for_the_time_of_a_block() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Model(nn.Module):  # a module of torch's own is not compiled by itself
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    model = Model()
    args = arguments(torch_compile=True)
    args.torch_compile_backend = backend  # type: ignore[assignment]  # torch.compile takes functions too
    expected = model(torch.ones(3, 2))
    with model_settings(model, args):
        assert torch.equal(model(torch.ones(3, 2)), expected)
        assert len(graphs) == 1
    torch._dynamo.reset()
    assert torch.equal(model(torch.ones(3, 2)), expected)
    assert len(graphs) == 1


def test_noise_and_the_memory_budget_hold_for_the_time_of_a_block() -> None:
    from torch._functorch import config

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids)

    model, ids = Words(), torch.tensor([[1, 2]])
    args = arguments(neftune_noise_alpha=5.0, torch_compile=True, activation_memory_budget=0.5)
    args.torch_compile_backend = "eager"
    quiet, before = model(ids), config.activation_memory_budget
    with model_settings(model, args):
        assert config.activation_memory_budget == 0.5
        assert not torch.equal(model(ids), quiet)
    assert torch.equal(model(ids), quiet)
    assert config.activation_memory_budget == before
    torch._dynamo.reset()


def test_without_settings_a_model_is_as_it_is() -> None:
    model = nn.Linear(2, 2)
    with model_settings(model, arguments()):
        assert model._compiled_call_impl is None
        assert not model._forward_hooks


class TestMeta:
    def test_a_model_gets_memory_and_values(self) -> None:
        args = arguments(construct_model_on="meta", seed=7)
        one, other = (constructed(tiny.llama, args) for _ in range(2))
        assert not any(tensor.is_meta for tensor in (*one.parameters(), *one.buffers()))
        assert one.lm_head.weight is one.model.embed_tokens.weight
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
        third = constructed(tiny.llama, arguments(construct_model_on="meta", seed=8))
        assert not torch.equal(one.lm_head.weight, third.lm_head.weight)

    def test_what_has_no_initialisation_is_refused_by_name(self) -> None:
        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(2, 2)
                self.register_buffer("table", torch.ones(2))

        with pytest.raises(ValueError, match="nothing gave 'table' a value"):
            constructed(Bare, arguments(construct_model_on="meta"))

    def test_it_trains_and_a_checkpoint_is_restored_into_it(self, tmp_path: Path) -> None:
        def trainer(**given: Any) -> Trainer:
            args = TrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, construct_model_on="meta", **given
            )
            return Trainer(model_init=tiny.llama, args=args, train_dataset=tiny.rows("llama"))

        trainer(max_steps=2, save_steps=2, lr_scheduler_type="constant").train()
        whole = trainer(max_steps=4, save_strategy="no", lr_scheduler_type="constant")
        whole.train()
        resumed = trainer(max_steps=4, save_strategy="no", lr_scheduler_type="constant")
        resumed.train(resume_from_checkpoint=True)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name


class TestUpdatesInTheBackwardPass:
    def trained(self, tmp_path: Path, **given: Any) -> dict[str, torch.Tensor]:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=3,
            max_grad_norm=0, weight_decay=0.1, **given,
        )  # fmt: skip
        trainer = Trainer(model=tiny.llama(), args=args, train_dataset=tiny.rows("llama"))
        trainer.train()
        return trainer.model.state_dict()

    @pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
    def test_they_give_what_ordinary_ones_give(self, tmp_path: Path, optim: str) -> None:
        ordinary = self.trained(tmp_path, optim=optim)
        fused = self.trained(tmp_path, optim=optim, fuse_optim_with_backward=True)
        for name, tensor in ordinary.items():
            torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=2e-7)

    def test_an_optimizer_that_is_not_known_to_be_separable_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Adagrad: it is not known to update parameters one by one"):
            self.trained(tmp_path, optim="adagrad", fuse_optim_with_backward=True)

    def test_nobody_can_look_inside(self, tmp_path: Path) -> None:
        class Own(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                return super().training_step(*args, **kwargs)

        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_grad_norm=0, fuse_optim_with_backward=True, max_steps=1
        )
        with pytest.raises(ValueError, match="nobody can look between gradients and update"):
            Own(model=tiny.llama(), args=args, train_dataset=tiny.rows("llama")).train()


def words() -> transformers.PreTrainedTokenizerFast:
    known = {f"w{i}": i for i in range(20)} | {"<pad>": 20, "<unk>": 21, "<end>": 22}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


@pytest.mark.parametrize("given", ["a tokenizer", "a processor", "nothing"])
def test_the_special_tokens_of_a_model_are_those_of_its_tokenizer(given: str, tmp_path: Path) -> None:
    """A classifier of several rows needs to know its padding, and what is saved must generate with these."""

    class Processor(transformers.ProcessorMixin):
        def __init__(self) -> None:
            self.tokenizer = words()

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None: ...

    found = []
    for library in (forgather.ml, transformers):
        given_one = {"a tokenizer": words, "a processor": Processor, "nothing": lambda: None}[given]()
        args = library.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
        rows = tiny.rows("llama", 4)
        model = tiny.llama()
        trainer = library.Trainer(
            model=model, args=args, train_dataset=rows, processing_class=given_one,
            data_collator=transformers.default_data_collator,
        )  # fmt: skip
        trainer.train()
        pads = model.config.pad_token_id, model.generation_config.pad_token_id
        ends = model.config.eos_token_id, model.generation_config.eos_token_id
        found.append((pads, ends))
    assert found[0] == found[1]
    assert found[0][0] == ((None, None) if given == "nothing" else (20, 20))

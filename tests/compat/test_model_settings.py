from typing import Any

import pytest
import torch
from torch import nn

from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.model_settings import constructed, model_settings


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

import itertools
import json

import pytest
import torch
from torch import nn

from forgather_fn.cli import main
from forgather_fn.pipeline.balance import balanced, measured
from forgather_fn.pipeline.cuts import SplitError
from forgather_fn.pipeline.explaining import explain
from forgather_fn.pipeline.schedules import ScheduleError
from tests.pipeline.models import MODELS, Plain, words

LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def lists(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(1, size, bias=False) for size in sizes))


@pytest.mark.parametrize(
    ("sizes", "stages", "cuts"),
    [
        ((1, 1, 1, 1), 2, ["1"]),
        ((9, 1, 1, 1), 2, ["0"]),
        ((1, 1, 1, 9), 2, ["2"]),
        ((5, 1, 1, 5, 1, 1), 3, ["1", "3"]),
        ((1, 2, 3), 3, ["0", "1"]),
    ],
)
def test_the_largest_stage_is_as_small_as_it_can_be(sizes: tuple[int, ...], stages: int, cuts: list[str]) -> None:
    model = lists(*sizes)
    found = list(balanced(model, stages))

    def largest(ends: list[str]) -> int:
        bounds = [0, *(int(end) + 1 for end in ends), len(sizes)]
        return max(sum(sizes[a:b]) for a, b in itertools.pairwise(bounds))

    assert largest(found) == largest(cuts)
    assert set(balanced(model, stages).values()) == {"end"}


def test_what_comes_before_and_after_the_blocks_counts() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1, 20)
            self.layer = nn.ModuleList(nn.Linear(1, 5) for _ in range(6))

    assert balanced(Wide(), 2) == {"layer.0": "end"}
    assert balanced(Wide(), 2, {f"layer.{i}": float(i >= 4) for i in range(6)}) == {"layer.4": "end"}


def test_time_is_measured_by_module() -> None:
    ticks = iter(range(10**6))
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    taken = measured(model, lambda: model(torch.ones(1, 2)), clock=lambda: float(next(ticks)))
    assert taken == {"": 9.0, "0": 1.0, "1": 5.0, "1.0": 1.0, "1.1": 1.0}
    assert not model[0]._forward_hooks
    assert model.training


def test_models_without_blocks() -> None:
    with pytest.raises(SplitError, match=r"no nn.ModuleList"):
        balanced(nn.Linear(1, 1), 2)
    with pytest.raises(SplitError, match=r"5 stages need as many blocks.* has 4"):
        balanced(lists(1, 1, 1, 1), 5)


def test_stages_are_told() -> None:
    told = explain(Plain(tied=True), {"layer.3": "end"}, ranks=2, microbatches=4)
    whole = sum(p.numel() for p in Plain(tied=True).parameters())
    assert sum(stage.parameters for stage in told.stages) == whole + 40 * 16  # the tied one is in both
    assert [stage.rank for stage in told.stages] == [0, 1]
    assert told.stages[0].bytes == 4 * told.stages[0].parameters
    page = str(told)
    assert "rank 0  0 1 . . [0] 2 [1] 3 [2] . [3]" in page
    assert "bubble: 20.0%" in page


def test_refusals_come_without_processes() -> None:
    with pytest.raises(ScheduleError, match="at least 2 microbatches"):
        explain(Plain(), "auto", ranks=2, microbatches=1)


def test_a_70_billion_parameter_model_on_64_ranks_takes_no_memory(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LARGE))
    sizes = ["--stages", "64", "--microbatches", "128", "--width", "100"]
    assert main(["pipeline", "explain", str(path), *sizes]) == 0
    page = capsys.readouterr().out
    assert "1F1B: 64 stages on 64 ranks (loop), 128 microbatches" in page
    assert page.count("\nrank ") == 64
    assert "bubble: 33.0%" in page  # 63 / (128 + 63)


def test_cuts_and_factories_on_the_command_line(capsys) -> None:
    given = ["pipeline", "explain", "tests.pipeline.models:Plain", "--split", '{"layer.3": "end"}']
    assert main(given) == 0
    assert "stage" in capsys.readouterr().out
    assert main([*given, "--stages", "3"]) == 2
    assert "has 1 cuts and so 2 stages" in capsys.readouterr().err
    assert main(["pipeline", "explain", "nothing.here"]) == 2
    assert main(["pipeline", "explain", "tests.pipeline.models:nothing"]) == 2
    assert main(["pipeline", "explain", "torch.nn:Linear"]) == 2  # which takes arguments


def test_measured_times_balance_a_model() -> None:
    model = MODELS["plain"].module()
    spec = balanced(model, 2, measured(model, lambda: model(words()["input_ids"])))
    assert len(spec) == 1

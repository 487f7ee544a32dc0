"""Every public function, each of its arguments replaced by what nobody means: it is taken, or refused by name."""

import inspect
import math
import warnings
from typing import Any, Final, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn import diagnostics, signature


class Odd:
    def __repr__(self):
        return "<odd>"


def odd_values():
    """Make them anew: one can be read only once."""
    numbers = {"nan": math.nan, "inf": math.inf, "-1": -1, "0": 0, "1.5": 1.5, "a huge integer": 10**400, "1j": 1j}
    scalars = {"np.float32": np.float32(0.5), "np.int64": np.int64(2), "np.bool": np.bool_(True)}
    tensors = {"0-d": torch.tensor(0.5), "1-d": torch.ones(2), "array": np.ones(2), "0-d array": np.array(2)}
    texts = {"empty": "", "text": "x", "digits": "1", "bytes": b"x", "surrogate": "\ud800", "nul": "\0"}
    several = {"[]": [], "['x']": ["x"], "{}": {}, "set": {1}, "(1,)": (1,), "[[1]]": [[1]], "{1: 2}": {1: 2}}
    rest = {"None": None, "True": True, "class": int, "object": Odd(), "generator": (x for x in [1])}
    return numbers | scalars | tensors | texts | several | rest


LOSS = ff.losses.cross_entropy
CALLS: Final[dict[str, dict[str, Any]]] = {
    "adam": {},
    "adamw": {},
    "sgd": {},
    "from_torch": {"factory": torch.optim.SGD},
    "optim.adafactor": {},
    "optim.adamw_bfloat16": {},
    "optim.lion": {},
    "optim.lookahead": {"optimizer": ff.sgd()},
    "optim.master_weights": {"optimizer": ff.sgd()},
    "optim.muon": {},
    "optim.orthogonal": {},
    "optim.partitioned": {"parts": {"all": ("*", ff.sgd())}},
    "optim.schedule_free_adamw": {},
    "optim.describe": {"optimizer": ff.sgd(), "params": nn.Linear(2, 2)},
    "group": {"match": "*"},
    "ema": {"decay": 0.9},
    "power_ema": {"gamma": 6.0},
    "swa": {"start": 1},
    "clipped": {"max_norm": 1.0},
    "noise": {"std": 1.0},
    "chain": {},
    "stateless": {"function": torch.sign},
    "transforms.annealed": {"eta": 0.1},
    "transforms.centralised": {},
    "transforms.clipped_by_group": {"limits": {"*": 1.0}},
    "transforms.clipped_by_unit": {},
    "transforms.clipped_by_value": {"limit": 1.0},
    "losses.by_source": {"loss": ff.losses.mse, "names": ("a", "b")},
    "losses.chunked": {"loss": LOSS},
    "losses.class_weighted": {"loss": LOSS, "weights": [1.0, 2.0]},
    "losses.contrastive": {},
    "losses.distilled": {"loss": LOSS, "teacher": "logits"},
    "losses.focal": {},
    "losses.from_output": {"weight": "samples"},
    "losses.huber": {},
    "losses.ignoring": {"loss": LOSS, "index": 0},
    "losses.masked": {"loss": LOSS, "by": "mask"},
    "losses.smoothed": {"loss": LOSS, "epsilon": 0.1},
    "losses.weighted": {"loss": LOSS, "by": "weight"},
    "losses.with_metrics": {"loss": LOSS},
    "losses.with_z_loss": {"loss": LOSS},
    "metrics.bits_per_byte": {"bytes": "bytes"},
    "metrics.confusion": {"classes": 2},
    "metrics.f1": {"classes": 2},
    "metrics.top_k": {"k": 1},
    "reducers.plateau": {"factor": 0.5},
    "reducers.spikes": {},
    "reducers.stale": {},
    "schedules.ahead": {"schedule": 0.1, "steps": 1},
    "schedules.along": {"curve": ff.schedules.straight, "start": 0.0, "stop": 1.0, "steps": 2},
    "schedules.constant": {"value": 0.1},
    "schedules.cosine": {"peak": 0.1, "total": 10},
    "schedules.cosine_with_restarts": {"peak": 0.1, "total": 10, "cycles": 2},
    "schedules.inverse_sqrt": {"peak": 0.1},
    "schedules.joined": {"boundaries": ()},
    "schedules.linear": {"peak": 0.1, "total": 10},
    "schedules.on_plateau": {"base": 0.1},
    "schedules.one_cycle": {"peak": 0.1, "total": 10},
    "schedules.piecewise": {"boundaries": (1,), "values": (0.0, 1.0)},
    "schedules.polynomial": {"peak": 0.1, "total": 10, "power": 1.0},
    "schedules.scaled": {"schedule": 0.1, "factor": 0.5},
    "schedules.warmup_stable_decay": {"peak": 0.1, "stable": 1, "decay": 1},
    "schedules.wave": {"cycles": 1.0},
    "batches": {"dataset": torch.arange(10), "batch_size": 2},
    "data.best_fit": {"documents": [[1, 2], [3]], "length": 4},
    "data.block_mask": {"position_ids": torch.tensor([[0, 1, 0]])},
    "data.by_length": {"lengths": [1, 2, 3], "group": 2},
    "data.counted": {"source": [1, 2]},
    "data.flash_arguments": {"position_ids": torch.tensor([[0, 1, 0]])},
    "data.memmap_tokens": {"path": "tokens.bin", "length": 4},
    "data.mixture": {"sources": {"a": [1], "b": [2]}},
    "data.packed": {"documents": [[1, 2], [3]], "length": 4},
    "data.rampup": {"start": 2, "stop": 4, "increment": 2, "samples": 10},
    "data.text_bytes": {"path": "tokens.bin", "length": 4},
    "data.text_lines": {"path": "tokens.bin"},
    "at": {"steps": 1},
    "at_end": {},
    "changing": {"change": lambda tick: None},
    "early_stopped": {"patience": 1},
    "evaluated": {"data": []},
    "every": {"steps": 1},
    "every_seconds": {"seconds": 1.0},
    "folded": {"name": "spike", "reducer": ff.reducers.spikes()},
    "report": {},
    "rollback": {"after": 1, "every": 1},
    "saved": {"run": "run"},
    "stopped_by": {"condition": bool},
    "until": {"steps": 1},
    "lora": {"model": lambda: nn.Linear(2, 2), "match": "*", "rank": 1, "alpha": 1.0},
    "diagnostics.activation_statistics": {},
    "diagnostics.by_module": {"metrics": {}},
    "diagnostics.flops_per_token": {"parameters": 10},
    "diagnostics.histograms": {"directory": "out"},
    "diagnostics.memory_recorded": {"directory": "out", "start": 1},
    "diagnostics.module_norms": {},
    "diagnostics.peak_flops": {"device": "NVIDIA H100 80GB HBM3"},
    "diagnostics.profiled": {"directory": "out", "start": 1},
    "diagnostics.utilization": {"flops_per_token": 1.0, "peak_flops": 1.0},
}
"""Public functions, each with arguments that it takes."""

BY_POSITION: Final = {
    **dict.fromkeys(["every", "every_seconds", "at", "at_end", "report"], (print,)),
    "schedules.joined": (0.1,),
}
"""What those need besides that take any number of others."""

ELSEWHERE: Final = {
    **dict.fromkeys(["serve", "controlled", "memory"], "test_arguments"),
    **dict.fromkeys(["single", "accelerated", "pipelined", "joined", "members"], "test_programs"),
    **dict.fromkeys(["difference", "fold", "last", "frozen", "refreshed_statistics"], "test_programs"),
    **dict.fromkeys(["diagnostics.activations"], "test_programs"),
    **dict.fromkeys(["optim.slots_like", "transforms.apply", "schedules.rate"], "for authors of pieces"),
    **dict.fromkeys(["optim.hidden_matrices", "losses.smoothed_cross_entropy"], "functions of tensors"),
    **dict.fromkeys(["losses.leading_dimension", "losses.logits_of", "losses.target_of"], "functions of batches"),
    **dict.fromkeys(["losses.named_means"], "functions of batches"),
    **{f"schedules.{name}": "a curve" for name in ("straight", "half_cosine", "one_minus_sqrt", "sqrt_of_rest")},
}
"""Those that are called with wrong arguments in another file, or are no functions of options."""


def public():
    """Find the public functions, each by its shortest name."""
    found, places = {}, {"": ff}
    places |= {f"{name}.": getattr(ff, name) for name in ("optim", "transforms", "losses", "metrics", "reducers")}
    places |= {"schedules.": ff.schedules, "data.": ff.data, "diagnostics.": diagnostics}
    for prefix, place in places.items():
        for name in getattr(place, "__all__", None) or vars(place):
            function = getattr(place, name)
            if inspect.isfunction(function) and function.__module__.startswith("forgather_fn") and name[0] != "_":
                found.setdefault(function, f"{prefix}{name}")
    return {name: function for function, name in found.items()}


def function_of(name):
    found = diagnostics if name.startswith("diagnostics.") else ff
    for part in name.removeprefix("diagnostics.").split("."):
        found = getattr(found, part)
    return found


def test_every_public_function_is_called_with_wrong_arguments():
    assert set(public()) - set(CALLS) - set(ELSEWHERE) == set()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.bin").write_bytes(b"abcdefgh\n" * 20)
    return tmp_path


@pytest.mark.parametrize("name", CALLS)
def test_what_is_right_is_taken(name, folder):
    call(function_of(name), BY_POSITION.get(name, ()), CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_is_taken_or_refused_by_name(name, folder):
    function, right = function_of(name), CALLS[name]
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(inspect.unwrap(function))
    for parameter in parameters.values():
        for what, value in odd_values().items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                args, kwargs = (value,), right
            else:
                args, kwargs = BY_POSITION.get(name, ()), {**right, parameter.name: value}
            case = f"{name}({parameter.name}={what})"
            error = raised(function, args, kwargs)
            if error is None:
                expected = signature.expected(hints.get(parameter.name, Any))
                if parameter.kind is not parameter.VAR_POSITIONAL and expected is not None:
                    assert expected.takes(signature.plain(value)), f"{case} was taken"
            elif isinstance(error, FileNotFoundError):
                assert error.filename == value, case
            else:
                assert isinstance(error, ValueError), f"{case} ended in {error!r}"
                assert 0 < len(str(error)) < 2000, case
    assert not list(folder.glob("out*")), "nothing is written before a run"


def raised(function, args, kwargs):
    """Call, and give the error that it ended in."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(function, args, kwargs)
    except Exception as error:
        return error
    return None


def call(function, args, kwargs):
    """Call with names, and the first by position where more follow."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if args and first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
        function(kwargs[first.name], *args, **{key: one for key, one in kwargs.items() if key != first.name})
    else:
        function(*args, **kwargs)

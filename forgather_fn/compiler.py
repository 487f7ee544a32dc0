"""Compiling a function whole, and saying what stands in the way."""

import functools
import inspect
import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import FrameSummary
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


LAUNCH: Mapping[str, dict[str, Any]] = {"cpu": {"cpp_wrapper": True}, "cuda": {"triton.cudagraphs": True}}
"""How the kernels of a graph are called, by device: from C++, which takes two thirds of the time that it takes from
Python where they are small; or all at once, as a CUDA graph."""


class CompileError(ValueError):
    """Something in the step cannot be part of a graph; the message says what, in which file and line."""


def whole(function: F, backend: str, device: torch.device) -> F:
    """Compile a function as one graph, when it is first called.

    Arguments of other shapes and types make other graphs. A dimension that was seen to differ is a symbol from then on,
    so that there are few of them.

    Args:
        function: Of tensors, and of trees of them.
        backend: One of ``torch.compile``'s.
        device: Where it runs.

    Raises:
        CompileError: When called: it cannot be one graph, or it would need too many. Nothing has been run then.
    """
    import torch._dynamo as dynamo  # when used: importing it takes as long as all of torch

    own = {"isolate_recompiles": True}  # or the programs of a process would share one limit
    known = inspect.signature(torch.compile).parameters
    accepted: dict[str, Any] = {name: on for name, on in own.items() if name in known}
    options: dict[str, Any] = dict(LAUNCH.get(device.type, {})) if backend == "inductor" else {}
    options["guard_filter_fn"] = _guarded
    graph = torch.compile(function, fullgraph=True, backend=backend, options=options, **accepted)
    wanted = {"trace_autograd_ops": True, "ignore_logging_functions": _logging_functions()}
    settings = {name: value for name, value in wanted.items() if hasattr(dynamo.config, name)}

    failed = (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return graph(*args)
        except failed:
            # There is no graph for these arguments yet. Settings matter when one is made, and take a while to set.
            pass
        try:
            with dynamo.config.patch(settings):
                return graph(*args)
        except failed as error:
            raise CompileError(_explained(error)) from error

    return cast(F, call)


def _guarded(guards: Sequence[Any]) -> list[bool]:
    """Choose what is looked at before each call of a graph: all, but for what cannot differ.

    The binding has made sure that the module's parameters are those of the layout; the graph gets them from the state.
    The kinds of trees that torch knows are what they were.
    """
    checked = {"TENSOR_MATCH", "TYPE_MATCH", "DICT_CONTAINS"}
    return [
        not ("SUPPORTED_NODES" in guard.name or ("._parameters" in guard.name and guard.guard_type in checked))
        for guard in guards
    ]


def opaque(function: F) -> F:
    """Have a function of tensors run on symbols while a graph is traced, where the compiler would read its code."""
    import torch._dynamo as dynamo

    return cast(F, dynamo.nonstrict_trace(function))


def mark_size(tensor: Tensor) -> None:
    """Say that the leading dimension of a tensor will differ from call to call."""
    import torch._dynamo as dynamo

    dynamo.maybe_mark_dynamic(tensor, 0)


def mark_static(tensor: Tensor) -> None:
    """Say that a tensor stays where it is from call to call, so that a CUDA graph updates it in place."""
    import torch._dynamo as dynamo

    dynamo.mark_static_address(tensor, guard=False)


def _logging_functions() -> set[Callable[..., Any]]:
    """Give the functions that write to logs: a warning of a model's is no reason to break a graph."""
    names = ("debug", "info", "warning", "warning_once", "error")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _explained(error: BaseException) -> str:
    """Say what broke the graph, where in the user's code, and what can be done."""
    error = _origin(error)
    what = str(error).split("\n\nfrom user code")[0].split("\n  Developer debug context")[0].strip()
    frames = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    place = ""
    for frame in filter(_is_users, frames):  # the last one is the innermost
        place = f"\n  where: {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return (
        f"the step cannot be compiled whole: {what}{place}\n"
        '  fix: change that line, or use Plan(compile="model"), which compiles what it can of the model and leaves the '
        "rest of the step as it is"
    )


def _origin(error: BaseException) -> BaseException:
    """Find what an opaque function raised: the compiler says of it only that there is no output."""
    found, inner = error, error.__cause__ or error.__context__
    while inner is not None:
        if not type(inner).__module__.startswith("torch._dynamo"):
            found = inner
        inner = inner.__cause__ or inner.__context__
    return found if any(map(_is_users, traceback.extract_tb(found.__traceback__))) else error


def _is_users(frame: FrameSummary) -> bool:
    ours = (os.path.dirname(torch.__file__), str(Path(__file__).parent))
    return not frame.filename.startswith(tuple(f"{directory}{os.sep}" for directory in ours))

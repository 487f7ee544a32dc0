"""Compiling a function whole, and saying what stands in the way."""

import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from traceback import FrameSummary
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


class CompileError(ValueError):
    """Something in the step cannot be part of a graph; the message says what, in which file and line."""


def whole(function: F, backend: str) -> F:
    """Compile a function as one graph, when it is first called.

    Arguments of other shapes and types make other graphs. A dimension that was seen to differ is a symbol from then on,
    so that there are few of them.

    Args:
        function: Of tensors, and of trees of them.
        backend: One of ``torch.compile``'s.

    Raises:
        CompileError: When called: it cannot be one graph, or it would need too many. Nothing has been run then.
    """
    import torch._dynamo as dynamo  # when used: importing it takes as long as all of torch

    own = {"isolate_recompiles": True}  # or the programs of a process would share one limit
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {name: on for name, on in own.items() if name in known}
    graph = torch.compile(function, fullgraph=True, backend=backend, **options)
    wanted = {"trace_autograd_ops": True, "ignore_logging_functions": _logging_functions()}
    settings = {name: value for name, value in wanted.items() if hasattr(dynamo.config, name)}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return graph(*args)
        except dynamo.exc.TorchDynamoException:
            # There is no graph for these arguments yet. Settings matter when one is made, and take a while to set.
            pass
        try:
            with dynamo.config.patch(settings):
                return graph(*args)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as error:
            raise CompileError(_explained(error)) from error

    return cast(F, call)


def opaque(function: F) -> F:
    """Have a function of tensors run on symbols while a graph is traced, where the compiler would read its code."""
    import torch._dynamo as dynamo

    return cast(F, dynamo.nonstrict_trace(function))


def _logging_functions() -> set[Callable[..., Any]]:
    """Give the functions that write to logs: a warning of a model's is no reason to break a graph."""
    names = ("debug", "info", "warning", "warning_once", "error")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _explained(error: Exception) -> str:
    """Say what broke the graph, where in the user's code, and what can be done."""
    what = str(error).split("\n\nfrom user code")[0].split("\n  Developer debug context")[0].strip()
    frames = [frame for frame in getattr(error, "real_stack", None) or () if _is_users(frame)]
    place = ""
    if frames:
        last = frames[-1]
        place = f"\n  where: {last.filename}:{last.lineno}, in {last.name}: {last.line}"
    return (
        f"the step cannot be compiled whole: {what}{place}\n"
        '  fix: change that line, or use Plan(compile="model"), which compiles what it can of the model and leaves the '
        "rest of the step as it is"
    )


def _is_users(frame: FrameSummary) -> bool:
    ours = (os.path.dirname(torch.__file__), str(Path(__file__).parent))
    return not frame.filename.startswith(tuple(f"{directory}{os.sep}" for directory in ours))

"""One stage of a model, run by the model's own forward: what comes before is passed over, what comes after not reached.

Nothing of the model is edited. While a stage runs, and only then, the modules at its cuts have hooks, and those that
need not run stand aside. What the model makes of the batch alone (masks, positions) it makes in every stage.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import attrs
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from forgather_fn.pipeline.cuts import SplitError
from forgather_fn.pipeline.forms import Form, form_of
from forgather_fn.pipeline.probe import Crossing, Flow


class _Reached(BaseException):
    """The end of a stage; no handler of exceptions in a model's forward stops it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@attrs.frozen(eq=False)
class Stage:
    """One stage of a model.

    Attributes:
        model: The whole; parameters of other stages may be stand-ins.
        begins: Where the hidden state comes in; None in the first stage.
        ends: Where it goes out; None in the last stage.
        skipped: Modules that need not run, with the form of their outputs.
    """

    model: nn.Module
    begins: Crossing | None
    ends: Crossing | None
    skipped: tuple[tuple[nn.Module, Form], ...]

    def run(self, hidden: Tensor | None, call: Callable[[], Any]) -> Any:
        """Run the stage.

        Args:
            hidden: What the stage before gave; None in the first.
            call: Calls the model on the batch.

        Returns:
            The hidden state at the end; in the last stage, the model's outputs.

        Raises:
            SplitError: The model does not come to the end of the stage.
        """
        assert (hidden is None) == (self.begins is None)
        with ExitStack() as stack:
            if self.begins is not None and hidden is not None:
                own = hidden.clone() if self.begins.written else hidden
                stack.enter_context(_entered(self.model, self.begins, own))
            for module, form in self.skipped:
                stack.enter_context(_forward_of(module, _passing(form)))
            if self.ends is not None:
                stack.enter_context(_left(self.model, self.ends))
            try:
                outputs = call()
            except _Reached as reached:
                return reached.hidden
        if self.ends is not None:
            raise SplitError(f"the model has not come to {self.ends.cut} this time; a stage must end at its cut always")
        return outputs


def cut_stage(model: nn.Module, flow: Flow, number: int) -> Stage:
    """Cut one stage out of the flow of a model."""
    return Stage(
        model,
        begins=flow.crossings[number - 1] if number else None,
        ends=flow.crossings[number] if number < len(flow.crossings) else None,
        skipped=tuple((model.get_submodule(name), form) for name, form in flow.skipped[number].items()),
    )


def _passing(form: Form) -> Callable[..., Any]:
    """Make a forward that gives what it is given, in the form of an output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = form_of((args, kwargs))
        assert found is not None
        return form.holding(found[1])

    return forward


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward for a while."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _entered(model: nn.Module, crossing: Crossing, hidden: Tensor) -> Iterator[None]:
    module, form = model.get_submodule(crossing.cut.name), crossing.form
    if crossing.cut.side == "end":
        # Hooks of the module have seen this output already, in the stage before: what they make of it now is undone.
        last = module.register_forward_hook(lambda module, args, output: form.holding(hidden))
        with _hooked(last), _forward_of(module, lambda *args, **kwargs: form.holding(hidden)):
            yield
        return

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        _check_not_recomputed(crossing)
        return form.holding(hidden, within=(args, kwargs))

    with _hooked(module.register_forward_pre_hook(enter, with_kwargs=True)):
        yield


@contextmanager
def _left(model: nn.Module, crossing: Crossing) -> Iterator[None]:
    module = model.get_submodule(crossing.cut.name)
    if crossing.cut.side == "end":

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(_hidden(output, crossing))

        handle = module.register_forward_hook(leave)
    else:

        def leave_before(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(_hidden((args, kwargs), crossing))

        handle = module.register_forward_pre_hook(leave_before, with_kwargs=True)
    with _hooked(handle):
        yield


def _hidden(value: Any, crossing: Crossing) -> Tensor:
    found = form_of(value)
    if found is None:
        raise SplitError(f"there is no hidden state at {crossing.cut} this time")
    return found[1]


_CHECKPOINT: Final = "torch/utils/checkpoint.py"


def _check_not_recomputed(crossing: Crossing) -> None:
    """Make sure that a module is not run under activation checkpointing, which would give it its old input again.

    Raises:
        SplitError: It is.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.replace("\\", "/").endswith(_CHECKPOINT):
            raise SplitError(
                f"split_spec: {crossing.cut} lies under activation checkpointing, which runs the module again without "
                "its hidden state; cut at the end of the module before it"
            )

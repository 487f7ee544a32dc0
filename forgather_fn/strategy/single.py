"""Training on one device."""

from forgather_fn.built import Built
from forgather_fn.execution import Execution
from forgather_fn.in_backward import updating_in_backward
from forgather_fn.plan import Plan, check_plan
from forgather_fn.program import Program
from forgather_fn.step import eager
from forgather_fn.strategy.program import Strategy, assembled


def single(plan: Plan) -> Program:
    """Make the program of a plan on one device.

    The model is built, or bound, at the first ``init``; before that nothing of it is touched.

    Args:
        plan: The recipe. A module in it is bound by the program: its parameters become views of a state's storage.

    Returns:
        The record of functions: init, steps, step, gradients, update, evaluate, apply, export.
    """
    check_plan("single", plan)
    return assembled(plan, Strategy(_execution))


def _execution(built: Built) -> Execution:
    if built.plan.update == "in_backward":
        return updating_in_backward(built)
    if built.plan.compile is not True:
        return eager(built)
    from forgather_fn.compiled import compiled  # when used: the compiler is as large as the rest of torch

    return compiled(built)

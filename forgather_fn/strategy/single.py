"""Training on one device."""

import functools
import logging
import os
from typing import Any

import attrs

from forgather_fn.built import Built
from forgather_fn.distributed.launched import number_in
from forgather_fn.execution import Execution
from forgather_fn.in_backward import updating_in_backward
from forgather_fn.loop import Steps, open_steps
from forgather_fn.plan import Plan, check_plan
from forgather_fn.program import Program
from forgather_fn.state import TrainState
from forgather_fn.step import eager
from forgather_fn.strategy.program import Strategy, assembled

logger = logging.getLogger(__name__)


def single(plan: Plan) -> Program:
    """Make the program of a plan on one device.

    The model is built, or bound, at the first ``init``; before that nothing of it is touched.

    Args:
        plan: The recipe. A module in it is bound by the program: its parameters become views of a state's storage.

    Returns:
        The record of functions: init, steps, step, gradients, update, evaluate, apply, export.
    """
    check_plan("single", plan)
    return attrs.evolve(assembled(plan, Strategy(_execution)), open_steps=_opened)


def _opened(program: Program, state: TrainState, data: Any) -> Steps:
    _tell_of_others(number_in(os.environ, "WORLD_SIZE", 1, least=1))
    return open_steps(program, state, data)


@functools.cache
def _tell_of_others(processes: int) -> None:
    """Say once that processes train each for themselves, where a launcher has started several."""
    if processes > 1:
        logger.warning(
            "a launcher has started %d processes (WORLD_SIZE), and ff.single trains in each of them alone, on all of "
            "the data; ff.accelerated(plan) trains one model on all of them",
            processes,
        )


def _execution(built: Built) -> Execution:
    if built.plan.update == "in_backward":
        return updating_in_backward(built)
    if built.plan.compile is not True:
        return eager(built)
    from forgather_fn.compiled import compiled  # when used: the compiler is as large as the rest of torch

    return compiled(built)

"""A model as a function of its inputs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import functional_call

from forgather_fn.evaluation import chosen
from forgather_fn.model import buffer_names, buffer_slots, parameter_sites
from forgather_fn.program import Program
from forgather_fn.state import Params, TrainState, as_state


def frozen(program: Program, state: TrainState, *, params: Params = "params") -> Callable[..., Any]:
    """Give a model as a function of its inputs, whose parameters no gradient reaches.

    Gradients go through it to its inputs: so a generator learns from its critic. It runs in the mode that the module
    is in, training as a rule, draws random numbers from torch's generators, which a step has seeded, and leaves the
    buffers as they are. It may lie in a batch, for the loss.

    Args:
        program: Of the model.
        state: Whose values it has; called when a step has consumed that, the function refuses.
        params: Those that an evaluation uses, or their average.
    """
    as_state(state)
    module = program.module()
    places = {site.name: name for site, name in parameter_sites(module)}
    places |= buffer_names(buffer_slots(module))

    def call(*inputs: Any, **named: Any) -> Any:
        arrays = state.read()
        values: dict[str, Tensor] = {**chosen(program.plan, arrays, params), **arrays.frozen}
        values |= {name: tensor.clone() for name, tensor in arrays.buffers.items()}
        tensors = {place: values[name] for place, name in places.items() if name in values}
        return functional_call(module, tensors, inputs, named, tie_weights=False)

    return call

"""Updates in the backward pass: each parameter as soon as its gradient is there, which is then let go.

So memory never holds all gradients. What needs all of them before the first update cannot be had: transforms, several
microbatches, a loss scale, and leaving out a step whose gradient is not finite.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.built import Built
from forgather_fn.data import Batch
from forgather_fn.execution import Execution
from forgather_fn.finite import Flag, flag_on_device, flag_on_host
from forgather_fn.gradient import Gradients, norms
from forgather_fn.losses import named_means
from forgather_fn.mean import Mean
from forgather_fn.optim.base import Rates, UpdateContext, rates_at
from forgather_fn.program import Metrics
from forgather_fn.state import Arrays, NonFiniteError, TrainState
from forgather_fn.step import eager, following, take_gradients, update_arrays
from forgather_fn.terminal import ordinal
from forgather_fn.wanted import check_wants, named
from forgather_fn.wide import wide_norm
from forgather_fn.workspace import dense

_PARTLY: Final = (
    "step {step} (the {nth}): the gradient of {name} was not finite (inf or nan). Parameters whose gradients came "
    'before it have been updated already, since update="in_backward" does not wait for the others, and the state is '
    'consumed: go on from a checkpoint. Plan(donate=False) or Plan(update="after_backward") keeps the state.'
)
_FAILED: Final = (
    'Some parameters have been updated already, since update="in_backward" does not wait for all gradients, and the '
    "state is consumed: go on from a checkpoint, or try again with Plan(donate=False), which keeps the state."
)


def updating_in_backward(built: Built) -> Execution:
    """Run the steps of a program with updates in the backward pass.

    The bits are those of ``update="after_backward"`` with ``viewed_elements=0``. The state is consumed when the first
    gradient is there; whatever fails before, also a loss that is not finite, leaves it as it was.

    Raises:
        ValueError: Two parameters share memory without being one object, so that neither has the whole gradient.
    """
    by_name: dict[str, nn.Parameter] = {}
    layout = built.binding.layout
    alone = {name: layout.alone(i) for name, i in layout.index.items()}
    for site, name in built.binding.trainable:
        if by_name.setdefault(name, site.tensor) is not site.tensor:
            raise ValueError(
                f"{name} and {site.name} share memory, but are two parameters, of which neither gets the whole "
                'gradient; tie them as one object (a.weight = b.weight) for update="in_backward"'
            )
    look: Flag = flag_on_host if built.device.type == "cpu" else flag_on_device
    plan = built.plan
    rest = attrs.evolve(plan, optimizer=attrs.evolve(plan.optimizer, update=_already_updated))
    running: list[_Updates] = []

    def watched_loss(outputs: Any, data: Any) -> Mapping[str, Mean]:
        means = named_means(plan.loss(outputs, data))
        running[-1].look_at(means["loss"])
        return means

    watched = attrs.evolve(built, plan=attrs.evolve(plan, loss=watched_loss))

    def step(state: TrainState, batch: Batch, wants: frozenset[str]) -> tuple[TrainState, Metrics]:
        _check_wants(wants)
        rates = rates_at(plan.schedule, plan.optimizer, state.step, state.controls)
        updates = _Updates(built, state, look, rates, state.read().nonfinite, wants, alone)
        running.append(updates)
        try:
            with updates.hooked(by_name):
                gradients, buffers, means = take_gradients(watched, state, batch)
        finally:
            running.pop()
        arrays, reports, _ = update_arrays(
            rest,
            updates.arrays(),
            updates.measured(gradients),
            buffers,
            means,
            flag=look,
            begin=lambda: None,
            rates=updates.rates,
            step=state.step,
            seed=state.seed,
            wants=frozenset(),
        )
        reports |= updates.wanted(arrays) if wants else {}
        if arrays.buffers is not built.binding.buffers:
            built.binding.bind_buffers(arrays.buffers)
        return following(state, arrays, batch.samples), {
            **means,
            **reports,
            **updates.rates.metrics(),
        }

    return attrs.evolve(eager(built), step=step)


def _check_wants(wants: frozenset[str]) -> None:
    check_wants(wants)
    if "gradients" in wants:
        raise ValueError(
            'a step was asked for "gradients", which update="in_backward" lets go of one by one; ask for '
            '"gradient_norms", or use Plan(update="after_backward")'
        )


def _already_updated(gradients: Gradients, state: Any, params: Any, context: UpdateContext) -> Any:
    del gradients, params, context
    return state


@attrs.define(eq=False)
class _Updates:
    """The updates of one step, while its backward pass runs.

    Attributes:
        built: The model.
        state: Consumed by the first update.
        look: Decides whether a number is finite.
        rates: Of this step.
        nonfinite: The first step that was not finite, or -1.
        wants: Metrics beyond the usual ones.
        alone: Which leaf of the layout each parameter is: it is active, and no other.
        norms: The norm of each gradient that has come.
        moved: The norm of what each parameter was changed by, where it is asked for.
    """

    built: Built
    state: TrainState
    look: Flag
    rates: Rates
    nonfinite: Tensor
    wants: frozenset[str]
    alone: Mapping[str, tuple[bool, ...]]
    norms: dict[str, Tensor] = attrs.field(factory=dict)
    moved: dict[str, Tensor] = attrs.field(factory=dict)
    _taken: Arrays | None = None

    def look_at(self, loss: Mean) -> None:
        """Look at the loss before anything is updated by its gradient."""
        with torch.no_grad():
            self._finite(loss.total.detach())

    @contextlib.contextmanager
    def hooked(self, by_name: dict[str, nn.Parameter]) -> Iterator[None]:
        """Update each parameter when its gradient is there, for the time of a block."""
        with contextlib.ExitStack() as stack:
            for name, parameter in by_name.items():
                hook = functools.partial(self._update, name)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            try:
                yield
            except BaseException as error:
                if self._taken is not None and not isinstance(error, NonFiniteError):
                    error.add_note(_FAILED)
                raise

    def arrays(self) -> Arrays:
        """Give what the updates have left; of a loss that reaches no trained parameter, the state as it was."""
        if self._taken is None:
            self._taken = self.state.consume(f"step {self.state.step}")
        return self._taken

    def measured(self, gradients: Gradients) -> Gradients:
        """Say of a gradient that is gone which leaves it had, and its norm."""
        layout = gradients.layout
        norms = [self.norms[name].to(self.built.dtype) for name in layout.index if name in self.norms]
        if len(norms) == 1:
            norm = norms[0]
        else:
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.built.device)
        active = tuple(name in self.norms for name in layout.index)
        return attrs.evolve(gradients, active=active, known_norm=norm)

    def wanted(self, arrays: Arrays) -> dict[str, Tensor]:
        """Give the metrics that were asked for."""
        still = torch.zeros((), device=self.built.device)
        found = named("gradient_norms", self.norms) if "gradient_norms" in self.wants else {}
        if "parameter_norms" in self.wants:
            found |= named("parameter_norms", norms(arrays.params))
        if "update_norms" in self.wants:
            found |= named("update_norms", {name: self.moved.get(name, still) for name in arrays.params})
        return found

    def _update(self, name: str, parameter: nn.Parameter) -> None:
        assert not torch.is_grad_enabled()  # as in every backward pass that makes no graph of its own
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        layout = self.built.binding.layout
        grad = dense(name, [grad], layout.leaves[layout.index[name]].stride)
        norm = wide_norm(grad)
        try:
            found_inf = self._finite(norm)
        except NonFiniteError:
            if self._taken is None:
                raise
            step = self.state.step
            raise NonFiniteError(_PARTLY.format(step=step, nth=ordinal(step + 1), name=name)) from None
        if self._taken is None:
            self._taken = self.state.consume(f"step {self.state.step}")
        arrays = self._taken
        if self.nonfinite is not arrays.nonfinite:
            arrays.nonfinite.copy_(self.nonfinite)
        before = arrays.params[name].clone() if "update_norms" in self.wants else None
        gradients, rates = Gradients(layout, self.alone[name], {name: grad}, None, 0, 0.0), self.rates
        context = UpdateContext(rates.learning_rate, found_inf, rates.scheduled, self.state.step, self.state.seed)
        opt = self.built.plan.optimizer.update(gradients, arrays.opt, arrays.params, context)
        if before is not None:
            self.moved |= norms({name: before.sub_(arrays.params[name])})
        self.norms[name] = norm
        self._taken = arrays if opt is arrays.opt else attrs.evolve(arrays, opt=opt)
        # Whoever still needs the old value in this backward pass is told by autograd, instead of getting the new one.
        torch.autograd.graph.increment_version(parameter)

    def _finite(self, probe: Tensor) -> Tensor:
        verdict = self.look(self.built.plan.on_nonfinite, probe, self.nonfinite, self.state.step)
        self.nonfinite = verdict.nonfinite
        return verdict.found_inf

"""One step of a training: the core's, whole where nobody looks inside, else in two halves with events between."""

from typing import Any

import attrs
import torch
from torch import Tensor

import forgather_fn as ff
from forgather.ml.trainer.agreeing import AgreeingMixin
from forgather.ml.trainer.evaluation import EvaluationMixin
from forgather.ml.trainer.left_gradients import add_up, clipped, has_room, taken, warn_of_none
from forgather.ml.trainer.live_optimizer import Adopted, Called, adopted
from forgather.ml.trainer.loss_scaling import unscale
from forgather.ml.trainer.microbatches import divisor, microbatches
from forgather.ml.trainer.optimizing import OptimizerMixin
from forgather.ml.trainer.windows import Window
from forgather_fn.binding import unbind
from forgather_fn.gradient import Gradients
from forgather_fn.mean import Mean
from forgather_fn.program import Program
from forgather_fn.random import key, seeded
from forgather_fn.share import Microbatches
from forgather_fn.state import NonFiniteError, TrainState, nonfinite_message

INSIDE = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")
"""Events inside a step: where one has listeners, the step is made in two halves."""

OVERRIDES = ("training_step", "compute_loss", "_prepare_inputs", "_prepare_input", "compute_loss_context_manager",
             "autocast_smart_context_manager", "_loss", "_call")  # fmt: skip
"""Methods of which an override decides how a gradient comes about."""


@attrs.define(eq=False)
class Engine:
    """The functional side of a running training.

    Attributes:
        program: What the strategy made of the plan.
        state: Where the training is; the module's parameters are its memory.
        held: The optimizer's side.
        halves: Whether steps are made in two halves, so that the plan does not clip.
        looks: What the layout was made of: see :meth:`SteppingMixin._look`.
        settings: What arguments said when the plan was made: see :meth:`SteppingMixin._settings`.
    """

    program: Program
    state: TrainState
    held: Adopted | Called
    halves: bool
    looks: tuple[Any, ...]
    settings: tuple[Any, ...]


class SteppingMixin(OptimizerMixin, EvaluationMixin, AgreeingMixin):
    """The part of a trainer that makes steps."""

    _engine: Engine | None

    def _strategy(self, plan: ff.Plan) -> Program:
        """Make the program of a plan: what the concrete trainers differ in."""
        raise NotImplementedError

    def _loss_scale(self) -> Tensor | None:
        """Give what float16 multiplies the loss by, where it does."""
        return None if self._engine is None else self._engine.state.loss_scale.get("scale")

    def _open_engine(self, step: int) -> None:
        """Put the model on a state of its own, which begins at a step, with the optimizer's slots as they are."""
        halves = self._in_halves()
        if halves and self.args.fuse_optim_with_backward:
            raise ValueError(
                "fuse_optim_with_backward=True updates parameters while the backward pass runs, so that nobody can "
                "look between gradients and update, or compute gradients otherwise. This trainer has an override of "
                f"{', '.join(OVERRIDES[:2])} or the like, a callback for one of {', '.join(INSIDE)}, or a scheduler of "
                "its own kind. Leave one of the two out"
            )
        if halves and self._world.size > 1 and getattr(self.args, "reduction", "sum") == "tree":
            raise ValueError(
                'reduction="tree" adds the gradients of microbatches in pairs, and where somebody looks inside steps '
                "they are added up one after the other in the parameters' grad. This trainer has an override of "
                f"{', '.join(OVERRIDES[:2])} or the like, a callback for one of {', '.join(INSIDE)}, or a scheduler of "
                'its own kind: leave it out, or use reduction="sum"'
            )
        held = adopted(self.optimizer, self.model)
        plan = self._plan(held, halves)
        program = self._strategy(plan)
        state = attrs.evolve(program.init(self.args.seed), step=step)
        self._engine = Engine(program, state, held, halves, self._look(), self._settings())

    def _plan(self, held: Adopted | Called, halves: bool) -> ff.Plan:
        """Translate arguments to a plan."""
        args, max_norm = self.args, self._max_norm()
        return ff.Plan(
            model=self.model,
            loss=self._objective(),
            optimizer=held.as_optimizer(),
            schedule=lambda step: float(self.optimizer.param_groups[0]["lr"]),
            transforms=() if halves or max_norm is None else (ff.clipped(max_norm),),
            microbatches=self._microbatches,
            precision="bfloat16" if args.bf16 else "float16" if args.fp16 else "as_built",
            on_nonfinite=self.args.on_nonfinite,
            device=args.device,
            update="in_backward" if args.fuse_optim_with_backward else "after_backward",
        )

    def _max_norm(self) -> float | None:
        """Give the norm that gradients are clipped to, where they are."""
        given = self.args.max_grad_norm
        return float(given) if given is not None and given > 0 else None

    def _in_halves(self) -> bool:
        """Tell whether on any process somebody looks inside steps, or decides how gradients come about."""
        return self._halved if self._world.size > 1 else self._wants_halves()

    def _wants_halves(self) -> bool:
        from forgather.ml.trainer.base_trainer import BaseTrainer

        overridden = any(getattr(type(self), name) is not getattr(BaseTrainer, name) for name in OVERRIDES)
        patched = any(name in self.__dict__ for name in OVERRIDES)
        # A scheduler that is not torch's may look at gradients, as transformers' AdafactorSchedule does.
        foreign = not type(self.lr_scheduler).__module__.startswith(("torch.optim.", "builtins", "forgather."))
        return overridden or patched or foreign or any(self.callback_handler.listens(event) for event in INSIDE)

    def _look(self) -> tuple[Any, ...]:
        """Look at what the layout of the state depends on: parameters, their memory, and the optimizer's groups."""
        sites = tuple(
            (child, name, id(p), p.data_ptr(), p.dtype, p.shape)
            for child in self.model.modules()
            for name, p in child._parameters.items()
            if p is not None
        )
        asked = tuple(id(p) for p in self.model.parameters() if p.requires_grad)
        groups = tuple(tuple(id(p) for p in group["params"]) for group in self.optimizer.param_groups)
        return sites, asked, groups, id(self.optimizer)

    def _settings(self) -> tuple[Any, ...]:
        """Give what a plan is made of and callbacks may change in the arguments."""
        return self._microbatches, self._max_norm()

    def _refresh_engine(self) -> Engine:
        """Find what user's code changed since the last step, and lay out the state anew where that is needed.

        Raises:
            ValueError: A parameter was replaced, which the optimizer does not know.
        """
        engine = self._engine
        assert engine is not None
        halves = self._in_halves()
        fits = isinstance(engine.held, Called) or type(engine.held.optimizer) is type(self.optimizer)
        same = halves == engine.halves and self._settings() == engine.settings
        if fits and same and engine.held.is_whole(engine.state.opt) and self._look() == engine.looks:
            return engine
        self._check_replaced(engine)
        unbind(self.model)
        self._open_engine(engine.state.step)
        assert self._engine is not None
        for name, held in self._engine.state.loss_scale.items():
            held.copy_(engine.state.loss_scale[name])
        self._engine.state.updates.copy_(engine.state.updates)
        return self._engine

    def _check_replaced(self, engine: Engine) -> None:
        before = {(id(child), name): (pid, shape) for child, name, pid, _, _, shape in engine.looks[0]}
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for prefix, child in self.model.named_modules():
            for name, p in child._parameters.items():
                was = before.get((id(child), name))
                if p is None or was is None or not p.requires_grad or was == (id(p), p.shape):
                    continue
                if was[0] == id(p) or id(p) not in known:
                    full = f"{prefix}.{name}" if prefix else name
                    raise ValueError(
                        f"{full} was replaced while training runs (by resize_token_embeddings, or a new layer), and "
                        "the optimizer does not fit the new parameter. Replace parameters before train(), or tell the "
                        "optimizer: optimizer.add_param_group({'params': [p]})"
                    )

    def _step(self, window: Window) -> tuple[Mean, Tensor]:
        """Make one step, and give its loss and the norm of its gradient before clipping.

        Raises:
            NonFiniteError: The loss or a gradient is not finite, and nothing was said of what then.
        """
        if self._peers.size == 1 and len(self.callback_handler.callbacks) != self._callbacks_seen:
            self._callbacks_seen, self._watched = len(self.callback_handler.callbacks), self._is_watched()
        engine = self._engine
        assert engine is not None
        if self._watched or self._settings() != engine.settings:
            engine = self._refresh_engine()
        if not engine.halves or not self.model.training:  # else training_step does it, or an override decides
            self._enter_training(self.model)
        unknown = self._uses_items is None and window.count > 1 and isinstance(window.items, Tensor)
        if self.args.torch_compile and unknown and window.batches:
            self._find_use_of_items(window.batches[0], window.items)
        if engine.halves:
            return self._step_in_halves(engine, window)
        parts = microbatches(window, watch=self._uses_items is None)
        several = engine.program.plan.microbatches > 1
        assert several or len(parts) == 1, "the plan is for one microbatch, and the step has more"
        data = Microbatches(tuple(parts), window.first) if several else parts[0]
        state, metrics = engine.program.step(engine.state, ff.Batch(data, int(window.all.samples), None))
        engine.state = state
        return metrics["loss"], metrics["grad_norm"]

    _callbacks_seen: int

    def _step_in_halves(self, engine: Engine, window: Window) -> tuple[Mean, Tensor]:
        """Make one step by :meth:`training_step` on each microbatch, the events inside it, and the core's update."""
        handler, args = self.callback_handler, self.args
        state, total, samples = engine.state, window.all.weight, int(window.all.samples)
        for p in self.model.parameters():
            p.grad = None
        self._scaler.used = not window.batches
        before = _copied(state.buffers)
        try:
            loss = self._train_microbatches(window)
        finally:
            self._tell_last(True)
        warn_of_none(self.model)
        if not has_room(self.model, state):  # training_step has unfrozen a parameter
            engine = self._refresh_engine()
            state = engine.state
        if state.loss_scale:
            unscale(self.model, state.loss_scale["scale"], self._scaler)
        gradients = taken(self.model, state, samples, total)
        norm = gradients.norm().clone()
        if (max_norm := self._max_norm()) is not None:
            gradients = clipped(gradients, state, max_norm)
        self.control = handler.call_event("on_pre_optimizer_step", args, self.state, self.control)
        try:
            self._update(engine, taken(self.model, state, samples, total), loss)
        except NonFiniteError:
            _restore(state.buffers, before)
            raise
        self.control = handler.call_event("on_optimizer_step", args, self.state, self.control)
        return Mean(loss.detach(), 1.0), norm  # the mean over the step already, which may have no labels at all

    def _train_microbatches(self, window: Window) -> Tensor:
        """Call :meth:`training_step` on each microbatch, and leave in ``grad`` the gradient of all processes.

        A ``training_step`` that does not call the trainer's own gives what it gives under DistributedDataParallel: the
        mean over the microbatches of its process, of which the mean over processes is taken.

        Raises:
            StoppedInsideError: A callback ended the training between two microbatches.
        """
        handler, args, last = self.callback_handler, self.args, len(window.batches) - 1
        engine, alone = self._engine, self._world.size == 1
        assert engine is not None
        loss, self._in_parts, self._called = torch.zeros(()), window.count > 1, False
        items = divisor(window.items)
        for i, (batch, weight) in enumerate(zip(window.batches, window.weights, strict=True)):
            self._share = window.share(weight)
            self._tell_last(i == last)
            with seeded(key(engine.state.seed, engine.state.step, window.first + i, "forward"), args.device):
                part = self.training_step(self.model, batch, items)
            loss = loss + part if i else part
            if i < last:
                self.control = handler.call_event("on_substep_end", args, self.state, self.control)
                if alone and (self.control.should_epoch_stop or self.control.should_training_stop):
                    raise StoppedInsideError
        if alone:
            return loss
        self._agree()
        if window.count > 1 and (self.control.should_epoch_stop or self.control.should_training_stop):
            raise StoppedInsideError
        factor = 1.0 if self._called else len(window.batches) / window.count
        return add_up(self._world, self.model, loss.detach(), factor)

    def _update(self, engine: Engine, gradients: Gradients, loss: Tensor) -> None:
        kept = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        if engine.program.plan.on_nonfinite == "raise" and not torch.isfinite(loss):
            raise NonFiniteError(nonfinite_message(engine.state.step, "the loss"))
        engine.state, _ = engine.program.update(engine.state, gradients)
        for p, grad in kept:  # for those who look at gradients after the update
            p.grad = grad


class StoppedInsideError(Exception):
    """A callback ended the training between two microbatches: the step is not made."""


def _copied(buffers: Any) -> Any:
    return buffers.copy() if len(buffers) else None


def _restore(buffers: Any, before: Any) -> None:
    if before is not None:
        buffers.assign(before)

"""How much memory a training will take, before it takes any: its first step is run on tensors without values."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from forgather_fn import reducers, tree
from forgather_fn.allocations import Allocations
from forgather_fn.batch import as_batch, microbatches
from forgather_fn.flat import Layout, layout_of, zeros
from forgather_fn.gradient import Gradients
from forgather_fn.losses import named_means
from forgather_fn.model import (
    Anatomy,
    Slot,
    anatomy_of,
    buffer_slots,
    call_arguments,
    enter_training,
    parameter_sites,
    surrounded,
)
from forgather_fn.optim.base import UpdateContext, rates_at
from forgather_fn.plan import Plan, check_plan
from forgather_fn.random import key, seeded

META = torch.device("meta")


@attrs.frozen(kw_only=True)
class Memory:
    """What a training will hold on its device, in bytes. Printed, it is a table.

    Attributes:
        parameters: Those that are trained, in flat storage.
        frozen: Those that are not.
        buffers: Of the module.
        gradients: All of them; with ``update="in_backward"`` the largest one.
        slots: Of the optimizer, and what transforms keep.
        averages: Of the parameters.
        batch: The data of one step.
        activations: What the forward pass of one microbatch keeps for its backward pass.
        peak: The most of all this that is held at one time, with what else a step needs for a while.
    """

    parameters: int
    frozen: int
    buffers: int
    gradients: int
    slots: int
    averages: int
    batch: int
    activations: int
    peak: int

    def __str__(self) -> str:
        rows = attrs.asdict(self)
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {size / 2**20:>12,.1f} MiB" for name, size in rows.items())


def memory(plan: Plan, batch: Any) -> Memory:
    """Estimate the memory that training by a plan takes, on one device, without allocating it.

    A copy of the model without values runs forward and backward over the first microbatches of the batch, on tensors
    that have shapes only, and all that torch would allocate and give back is added up. So activation checkpointing,
    autocast and microbatches are counted as they are. Not counted is what kernels use inside, what the allocator keeps,
    and what an optimizer that is not fused takes for a while. A compiled step is counted as one that is not.

    Args:
        plan: A factory in it is called on the meta device; a module in it is left as it is.
        batch: The data of one step, or a :class:`~forgather_fn.data.Batch`; its values are not read.

    Raises:
        ValueError: The model or the loss cannot be run without values, since it looks at one; or nothing is trained.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(64, 64), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.1)
        >>> found = memory(plan, (torch.zeros(8, 64), torch.zeros(8, 64)))
        >>> found.parameters, found.slots // found.parameters
        (16640, 2)
    """
    check_plan("memory", plan)
    subject = _subject(plan)
    layout = subject.layout
    slots, updating = _update(plan, layout)
    changing = {
        "parameters": layout.bytes,
        "buffers": sum(map(_size, subject.buffers)),
        "slots": slots + _bytes([transform.init(zeros(layout, META)) for transform in plan.transforms]),
        "averages": layout.widened().bytes if plan.average is not None else 0,
    }
    frozen = sum(_size(tensor) for tensor in subject.still.values())
    data = as_batch(batch)
    held = _bytes(data.data)
    owned = plan.update == "in_backward" or layout.elements > plan.viewed_elements
    sizes = [_size(tensor) for tensor in subject.trained.values()]
    gradients = (max(sizes) if plan.update == "in_backward" else sum(sizes)) if owned else layout.bytes
    activations, passing = _passes(plan, subject, microbatches(data, plan.microbatches)[:2], owned)
    always = sum(changing.values()) * (1 if plan.donate else 2) + frozen + held
    viewed = 0 if owned else gradients
    # The model as it was built is let go at the end of `init`; buffers are copied before the passes, and after them.
    first = sum(changing.values()) + frozen + held + viewed + sum(sizes) + changing["buffers"]
    step = always + viewed + 2 * changing["buffers"] + max(passing, gradients - viewed + updating)
    peak = max(first, step)
    return Memory(**changing, frozen=frozen, gradients=gradients, batch=held, activations=activations, peak=peak)


@attrs.frozen(eq=False)
class _Subject:
    """A model without values, and how it would be stored.

    Attributes:
        module: On the meta device.
        anatomy: Of it.
        slots: Its buffers.
        trained: Parameters that are trained, in the precision of the plan.
        still: Those that are not.
        layout: Of the former.
    """

    module: nn.Module
    anatomy: Anatomy
    slots: tuple[Slot, ...]
    trained: Mapping[str, Tensor]
    still: Mapping[str, Tensor]
    layout: Layout

    @property
    def buffers(self) -> list[Tensor]:
        """Each once."""
        return list({id(slot.tensor): slot.tensor for slot in self.slots if slot.tensor is not None}.values())

    @property
    def params(self) -> Mapping[str, Tensor]:
        """All of them."""
        return {**self.trained, **self.still}


def _subject(plan: Plan) -> _Subject:
    module = _without_values(plan.model)
    enter_training(module)
    anatomy = anatomy_of(module)
    floating = {"float32": torch.float32, "float64": torch.float64}.get(plan.precision)
    params = {name: _brought(p.detach(), floating) for name, p in anatomy.params.items()}
    asked = {name: params[name] for name, p in anatomy.params.items() if p.requires_grad}
    hypers = plan.optimizer.groups(asked)
    trained = {name: tensor for name, tensor in asked.items() if not hypers[name].frozen}
    if not trained:
        raise ValueError(f"memory: {type(module).__name__} has no parameter that is trained")
    still = {name: tensor for name, tensor in params.items() if name not in trained}
    layout = layout_of(trained, {name: hypers[name] for name in trained})
    return _Subject(module, anatomy, buffer_slots(module), trained, still, layout)


def _brought(tensor: Tensor, floating: torch.dtype | None) -> Tensor:
    return tensor.to(floating) if floating is not None and tensor.is_floating_point() else tensor


def _without_values(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if not isinstance(model, nn.Module):
        try:
            with META, seeded(key(0, "init"), torch.device("cpu")):
                model = model()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"memory: the model cannot be built on the meta device ({error}); give the plan a "
                "module instead of its factory"
            ) from error
    made: dict[str, Tensor] = {}
    memo: dict[int, Any] = {}
    for site, name in parameter_sites(model):  # one object for those that are tied by their memory only
        empty = nn.Parameter(torch.empty_like(site.tensor, device=META), requires_grad=site.tensor.requires_grad)
        memo[id(site.tensor)] = made.setdefault(name, empty)
    memo |= {id(buffer): torch.empty_like(buffer, device=META) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _passes(plan: Plan, subject: _Subject, parts: Sequence[Any], owned: bool) -> tuple[int, int]:
    """Run forward and backward; give what is kept between them, and the most that is held beside the state."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    arguments = call_arguments(subject.module, plan.loss)
    held = [slot for slot in subject.slots if slot.tensor is not None]
    with fake:
        values = {n: nn.Parameter(_real(t, plan.device), n in subject.trained) for n, t in subject.params.items()}
        parts = [_faked(part, plan) for part in parts]
        buffers = {id(tensor): _real(tensor, plan.device) for tensor in subject.buffers}
    leaves = [values[name] for name in subject.trained]
    for site, name in subject.anatomy.sites:
        site.module._parameters[site.attribute] = values[name]
    for slot in held:
        slot.held[slot.attribute] = buffers[id(slot.tensor)]
    for leaf in () if owned else leaves:
        with fake:
            leaf.grad = torch.empty_like(leaf)
    for leaf in leaves if plan.update == "in_backward" else ():
        leaf.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
    kept = 0
    counting = Allocations()
    counting.ignore([*values.values(), *buffers.values(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    counting.ignore(tree.tensors(parts))
    lowered = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(plan.precision)
    with fake, seeded(key(0, "memory"), torch.device("cpu")), counting, _explained():
        for part in parts:
            before = counting.now
            args, kwargs = arguments(part)
            with torch.autocast(plan.device.type, dtype=lowered, enabled=lowered is not None):
                total = _objective(plan, subject.module, args, kwargs, part)
            kept = max(kept, counting.now - before)
            torch.autograd.backward(total, torch.ones_like(total))
            del total
    return kept, counting.peak


def _update(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Run an update; give what the optimizer keeps, and what it needs besides for a while.

    An optimizer that looks at a value cannot be run: it keeps what it begins with. Fused ones do, which need nothing.
    """
    controls = reducers.base.begun(plan.controls)
    counting = Allocations()
    active = (True,) * len(layout.leaves)
    with FakeTensorMode(), torch.no_grad():
        params, flat = (zeros(layout, plan.device) for _ in range(2))
        counting.ignore([*params.buffers, *flat.buffers])
        gradients = Gradients(layout, active, dict(flat), flat, 1, 1.0)
        with counting:
            state = plan.optimizer.init(params)
            begun = _bytes(state)
            try:
                rates = rates_at(plan.schedule, plan.optimizer, 0, controls)
                context = UpdateContext(rates.learning_rate, torch.tensor(0.0), rates.scheduled)
                state = plan.optimizer.update(gradients, state, params, context)
            except (DataDependentOutputException, RuntimeError, NotImplementedError):
                return begun, 0
        kept = _bytes(state)
        return kept, max(counting.peak - kept, 0)


def _objective(plan: Plan, module: nn.Module, args: Any, kwargs: dict[str, Any], part: Any) -> Tensor:
    """Run the model and the loss; nothing else is held after it, as in a step."""
    with surrounded(module, plan.loss):
        outputs = module(*args, **kwargs)
    return named_means(plan.loss(outputs, part))["loss"].total


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except DataDependentOutputException as error:
        raise ValueError(
            f"memory: the model or the loss looks at a value ({error}), and there are none to look at; "
            "the estimate is of models whose operations follow from shapes alone"
        ) from error


def _let_go(leaf: Tensor) -> None:
    leaf.grad = None


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """Make a tensor that says that it is on a device, and has no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _faked(data: Any, plan: Plan) -> Any:
    floating = {"float32": torch.float32, "float64": torch.float64}.get(plan.precision)
    real = tree.tensors(data)
    return tree.filled(data, [_real(_brought(tensor.to(META), floating), plan.device) for tensor in real])


def _bytes(held: Any) -> int:
    return sum(_size(tensor) for tensor in tree.tensors(held))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

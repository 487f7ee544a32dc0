"""Training on several devices, one process to each, through Accelerate."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.built import Built
from forgather_fn.execution import Execution
from forgather_fn.flat import Layout
from forgather_fn.overlap import NEVER, OVERLAPPED_BYTES
from forgather_fn.plan import Plan, Precision, check_plan
from forgather_fn.program import Program
from forgather_fn.reduction import Reduction, all_reduced, doubled
from forgather_fn.replicated import replicated
from forgather_fn.share import Share
from forgather_fn.signature import checked
from forgather_fn.strategy.processes import check_same_plan, world_of
from forgather_fn.strategy.program import Strategy, assembled
from forgather_fn.strategy.sharding import Sharding, check_shards
from forgather_fn.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

ALL_VIEWED: Final = 1 << 62
"""Gradients lie in flat buffers whatever their size: a buffer is what is sent."""

PRECISIONS: Final[Mapping[str, Precision]] = {"bf16": "bfloat16", "fp16": "float16"}


@checked
def accelerated(
    plan: Plan,
    accelerator: "Accelerator | None" = None,
    accelerator_args: Mapping[str, Any] | None = None,
    *,
    reduction: Reduction = "sum",
    dispatch: Literal["each", "rank0"] = "each",
    sync_batch_norm: bool = False,
    overlap_bytes: int | None = None,
    sharded: bool | Sequence[str] = False,
) -> Program:
    """Make the program of a plan on all processes of a launcher, as Accelerate finds and places them.

    A step consumes the plan's microbatches, whatever the number of processes; each process runs an equal block of
    them. Batches are those of the whole step: of a stream each process reads only its samples; any other batch is given
    whole to each. So the same text trains on one process and on many, and gives the same numbers.

    Args:
        plan: The recipe. Its microbatches are a multiple of the number of processes. Its device is Accelerate's.
        accelerator: Which knows the processes and their devices; None makes one.
        accelerator_args: For the one that is made: ``mixed_precision``, ``cpu``, ``kwargs_handlers``, ...
        reduction: ``"sum"`` adds gradients as torch's all-reduce does; ``"tree"`` in aligned pairs, so that 1, 2 and 4
            processes give the same bits, at the price of more memory and transfers.
        dispatch: ``"each"`` process reads its samples, or ``"rank0"`` reads for all.
        sync_batch_norm: Make batch norms use the statistics of all processes (on accelerators).
        overlap_bytes: From which size of the gradient on it is sent in pieces during the last backward pass, and not
            after it. None: 64 MiB on accelerators; never on CPUs, where transfers take the cores that compute.
        sharded: Where the model does not fit: cut parameters, gradients, slots and averages, so that each process has
            a part of every tensor, by torch's ``fully_shard``. True gathers the members of each ``nn.ModuleList`` one
            at a time; patterns of names (``["encoder.*"]``) choose other modules. ``state.params`` are shards then,
            and ``apply`` and ``export`` are collective too. One process alone has nothing to cut.

    Returns:
        The record of functions, as of :func:`~forgather_fn.strategy.single.single`. ``step``, ``gradients``,
        ``evaluate``, ``init`` and ``restore`` are collective: every process calls them.

    Raises:
        ValueError: The microbatches cannot be shared out evenly; the plan or the accelerator asks for what this
            strategy does not do; or a launcher started several processes, and this one believes that it is alone.
    """
    if overlap_bytes is not None and overlap_bytes < 0:
        raise ValueError(f"accelerated: overlap_bytes must be at least 0, or None; got {overlap_bytes}")
    found = accelerator_from(accelerator, accelerator_args)
    _check_unsharded(found)
    world = world_of(found).of_program()
    plan = _fitted(plan, found, world, sync_batch_norm)
    share = Share(plan.microbatches, world.rank, world.size)
    agree = functools.partial(_agree, plan, world)
    if sharded is not False:
        check_shards(plan, reduction, overlap_bytes)
    if sharded is not False and world.size > 1:
        sharding = Sharding(world, agree, None if sharded is True else tuple(sharded))
        execution = functools.partial(sharding.execution, share=share)
        strategy = Strategy(execution, world, cut_over=world, share=share, storage=sharding.storage())
    else:
        if overlap_bytes is None:
            overlap_bytes = NEVER if found.device.type == "cpu" else OVERLAPPED_BYTES
        strategy = Strategy(_execution(world, share, reduction, overlap_bytes), world, share=share, agree=agree)
    return assembled(plan, attrs.evolve(strategy, dispatch=dispatch == "rank0"))


def _execution(world: World, share: Share, reduction: Reduction, overlap_bytes: int) -> Callable[[Built], Execution]:
    """Run steps on replicas."""
    pairs, own = reduction == "tree", len(share.block)
    if pairs and own & (own - 1) and world.size > 1:
        raise ValueError(
            f'accelerated: reduction="tree" adds aligned pairs, and each process has {own} microbatches, which is no '
            'power of two; use such a number, or reduction="sum"'
        )
    reduce = doubled(world) if pairs else all_reduced(world)
    return functools.partial(
        replicated, world=world, share=share, reduce=reduce, in_pairs=pairs, overlap_bytes=overlap_bytes
    )


def _fitted(plan: Plan, found: "Accelerator", world: World, sync_batch_norm: bool) -> Plan:
    """Bring a plan to what Accelerate has found: its device, and its precision."""
    check_plan("accelerated", plan)
    _check(plan)
    if found.gradient_accumulation_steps not in (1, plan.microbatches // world.size):
        raise ValueError(
            f"accelerated: Accelerator(gradient_accumulation_steps={found.gradient_accumulation_steps}), but a step "
            f"has the plan's microbatches={plan.microbatches} over {world.size} processes; leave it out"
        )
    plan = attrs.evolve(plan, device=found.device, precision=_precision(plan, found), viewed_elements=ALL_VIEWED)
    return attrs.evolve(plan, model=_synchronised(plan)) if sync_batch_norm else plan


_REFUSED: Final = {
    "deepspeed_plugin": "DeepSpeed has an optimizer and a loop of its own",
    "deepspeed_plugins": "DeepSpeed has an optimizer and a loop of its own",
    "megatron_lm_plugin": "Megatron has an optimizer and a loop of its own",
    "dynamo_plugin": "compile with Plan(compile=...)",
    "dynamo_backend": "compile with Plan(compile=..., backend=...)",
    "fsdp_plugin": "shard with ff.accelerated(plan, sharded=True)",
    "parallelism_config": "use ff.pipelined for models that are cut",
    "rng_types": "randomness is derived from the plan's seed, and no generator is synchronised",
    "project_dir": "observers write, where they are told to",
    "project_config": "observers write, where they are told to",
    "log_with": "observers report: ff.report",
}


def accelerator_from(given: "Accelerator | None", arguments: Mapping[str, Any] | None) -> "Accelerator":
    """Take the accelerator that is given, or make one.

    Args:
        given: Which knows the processes and their devices.
        arguments: Of ``accelerate.Accelerator``, for one that is made; ``cpu`` is whether there is no other device.

    Raises:
        ValueError: Both are given, or an argument asks for what is not done here.
    """
    from accelerate import Accelerator

    if given is not None:
        if arguments:
            raise ValueError(
                "accelerated: accelerator and accelerator_args were both given; make the accelerator with these "
                f"arguments: Accelerator({', '.join(f'{name}=...' for name in arguments)})"
            )
        return given
    arguments = dict(arguments or {})
    for name, reason in _REFUSED.items():
        if arguments.get(name) is not None:
            raise ValueError(f"accelerated: accelerator_args[{name!r}] is not honoured here: {reason}")
    arguments.setdefault("cpu", not torch.accelerator.is_available())
    return Accelerator(**arguments)


def _check_unsharded(accelerator: "Accelerator") -> None:
    """Make sure that nobody counts on shards by Accelerate: on CPUs it forgets of them without a word."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    if asked or getattr(accelerator.state, "fsdp_plugin", None) is not None:
        raise ValueError(
            "accelerated: Accelerate was told to shard the model (fsdp_plugin, --use_fsdp), which is not honoured "
            "here: shard with ff.accelerated(plan, sharded=True)"
        )


def _check(plan: Plan) -> None:
    if plan.unroll:
        raise ValueError(
            "accelerated: unroll=True makes one graph of all microbatches, of which each process has others; leave it "
            "out, and compile=True makes one of a microbatch's gradient and one of the update"
        )
    if plan.update == "in_backward":
        raise ValueError('accelerated: update="in_backward" updates before the gradients of other processes are there')
    devices = sorted({str(device) for device in getattr(plan.model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"accelerated: the model is spread over the devices {', '.join(devices)} (hf_device_map), and each process "
            "trains a whole one; load it without device_map, or cut it with ff.pipelined"
        )


def _precision(plan: Plan, accelerator: "Accelerator") -> Precision:
    asked = accelerator.mixed_precision
    if asked == "no":
        return plan.precision
    if asked not in PRECISIONS:
        raise ValueError(f"accelerated: mixed_precision={asked!r} is not one of {', '.join(PRECISIONS)}, no")
    if plan.precision not in ("as_built", PRECISIONS[asked]):
        raise ValueError(
            f"accelerated: Accelerate was told mixed_precision={asked!r}, and the plan precision={plan.precision!r}; "
            "leave one of them out"
        )
    return PRECISIONS[asked]


def _synchronised(plan: Plan) -> Any:
    if plan.device.type == "cpu":
        raise ValueError("accelerated: sync_batch_norm=True needs accelerators; torch has no SyncBatchNorm for CPUs")
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    if isinstance(plan.model, nn.Module):
        return convert(plan.model)
    factory = plan.model
    return functools.wraps(factory)(lambda *args: convert(factory(*args)))


def _agree(plan: Plan, world: World, layout: Layout, tensors: Sequence[Tensor]) -> None:
    """Take the values of the first process, on which a model may have been built with other random numbers."""
    if world.size == 1:
        return
    mine = {**plan.describe(), "parameters": ", ".join(f"{leaf.name} {tuple(leaf.shape)}" for leaf in layout.leaves)}
    mine.pop("device")
    check_same_plan("accelerated", world, mine)
    from torch import distributed

    with world.explained(), torch.no_grad():
        for tensor in tensors:
            distributed.broadcast(tensor, group=world.group, group_src=0)

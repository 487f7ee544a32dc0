"""What an argument may not be, and why: whatever is not honoured is refused, with what to write instead."""

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

import attrs

from forgather.ml.trainer.enums import DebugOption, OptimizerNames
from forgather_fn.distributed.launched import number_in


@attrs.frozen
class Refusal:
    """Which values of a field are not honoured, and what is said of them.

    Attributes:
        reason: Why, and what to do instead.
        refuses: ``value -> bool``; None refuses all but the default.
    """

    reason: str
    refuses: Callable[[Any], bool] | None = None


OPTIMIZERS: Final = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.ADAMW_TORCH_FUSED,
        OptimizerNames.ADAFACTOR,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
    }
)
"""The optimizers that are honoured by name."""

_PASS_IT: Final = "pass the optimizer itself: optimizer_cls_and_kwargs=(Class, {...}), or optimizer_factory"
_LAUNCHED: Final = "the trainer of this class runs on one device; AccelTrainer is the one for several"


REFUSED: Final[Mapping[str, Refusal]] = {
    "optim": Refusal(f"it needs another package: {_PASS_IT}", lambda value: value not in OPTIMIZERS),
    "optim_target_modules": Refusal(f"it is GaLore's and APOLLO's: {_PASS_IT}"),
    "average_tokens_across_devices": Refusal(
        "on several processes the loss is always the mean over the tokens of all of them",
        lambda value: not value and number_in(os.environ, "WORLD_SIZE", 1, least=1) > 1,
    ),
    "use_liger_kernel": Refusal(
        "apply them to the model yourself: liger_kernel.transformers.apply_liger_kernel_to_...()"
    ),
    "liger_kernel_config": Refusal("apply Liger's kernels to the model yourself"),
    "push_to_hub": Refusal("push what was saved: trainer.model.push_to_hub(...), or `hf upload` with output_dir"),
    "skip_memory_metrics": Refusal("add the callback PeakMemory, which logs the memory that was in use"),
    "set_dataset_epoch": Refusal("data that has a set_epoch counts on being called"),
    "preserve_n_best": Refusal("the best checkpoint is kept from rotation, and no more of the best ones"),
    "save_dataset_state": Refusal("the position in the data follows from the step; see ignore_data_skip"),
    "parallelism_config": Refusal(_LAUNCHED),
    "fsdp": Refusal(_LAUNCHED, lambda value: bool(value)),
    "deepspeed": Refusal("DeepSpeed keeps parameters, gradients and the optimizer itself; see AccelTrainer"),
    "dataloader_in_order": Refusal("batches as they become ready make a run that cannot be repeated or resumed"),
    "train_sampling_strategy": Refusal(
        "it balances batches over several processes: use 'group_by_length'", lambda value: value == "batch_rebalance"
    ),
    "debug": Refusal("TPUs are not supported", lambda value: DebugOption.TPU_METRICS_DEBUG in value),
}
"""For each field, what is refused of it. Fields that are not named here are honoured, whatever their value."""


def refuse_unhonoured(args: Any) -> None:
    """Look at every field, and raise for the first one whose value is not honoured.

    Called when arguments are made, and by ``train``, since they can be changed in between.

    Raises:
        ValueError: Names the field, its value, and the reason.
    """
    for field in fields(args):
        refusal = args.refused.get(field.name)
        if refusal is None:
            continue
        value = getattr(args, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if refusal.refuses(value) if refusal.refuses else value != default:
            shown = getattr(value, "value", value)
            raise ValueError(f"{type(args).__name__}: {field.name}={shown!r} is not supported: {refusal.reason}")


def table(kind: type[Any]) -> dict[str, str]:
    """Say of every field of a class of arguments what it does, and which of its values are refused.

    Args:
        kind: ``TrainingArguments``, or a class derived from it.

    Returns:
        A sentence or two for each field, in the order of the fields.

    Example:
        >>> from forgather.ml.trainer.arguments import TrainingArguments
        >>> table(TrainingArguments)["max_grad_norm"]
        'Clip the gradient to this norm; 0 does not clip.'
    """
    said = {}
    for field in fields(kind):
        text = field.metadata.get("help", "").replace("%%", "%")
        refusal = kind.refused.get(field.name)
        if refusal is not None:
            which = "Some values are" if refusal.refuses else "Any value but the default is"
            text = f"{text} {which} refused: {refusal.reason}."
        said[field.name] = text
    return said

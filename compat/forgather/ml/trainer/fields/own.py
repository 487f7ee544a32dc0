"""The fields that transformers does not have: those of Forgather's trainers."""

from dataclasses import dataclass, field
from typing import Literal

from forgather.ml.trainer.fields.describing import does


@dataclass
class Own:
    """How the model is built and what of it is computed again, dropped, or moved."""

    construct_model_on: str = field(
        default="default",
        metadata=does(
            "Where model_init runs: 'default' (the CPU, then moved), 'device', or 'meta' (memory is made on the "
            "device, and filled there by the modules' own reset_parameters or _init_weights).",
            choices=["default", "device", "meta"],
        ),
    )
    default_dtype: str | None = field(
        default=None, metadata=does("The default data type while model_init runs, such as 'bfloat16'.")
    )
    fuse_optim_with_backward: bool = field(
        default=False,
        metadata=does("Update each parameter in the backward pass; without clipping, accumulation and fp16."),
    )
    enable_activation_offloading: bool = field(
        default=False, metadata=does("Keep activations in the CPU's memory until the backward pass.")
    )
    activation_memory_budget: float | None = field(
        default=None,
        metadata=does("Share of activations that a compiled model keeps, from 0 to 1; needs torch_compile."),
    )
    torch_compile_dynamic: bool | None = field(
        default=None, metadata=does("Whether shapes vary, for torch.compile; None: as it finds.")
    )
    torch_compile_full_graph: bool = field(
        default=False, metadata=does("Refuse models that torch.compile cannot take as one graph.")
    )
    float32_matmul_precision: str | None = field(
        default=None,
        metadata=does(
            "torch.set_float32_matmul_precision while the trainer runs.", choices=["highest", "high", "medium"]
        ),
    )
    sdpa_backend: None | str | list[str] = field(
        default=None,
        metadata=does("Kernels of attention while the trainer runs: math, flash, efficient, cudnn; one or several."),
    )
    sdpa_set_priority: bool = field(default=False, metadata=does("Try the kernels of sdpa_backend in their order."))
    dynamo_recompile_limit: int | None = field(
        default=None, metadata=does("How often torch.compile may compile a function anew while the trainer runs.")
    )
    detect_anomaly: bool = field(
        default=False, metadata=does("Let autograd name the operation whose gradient is not finite; slow.")
    )

    on_nonfinite: Literal["raise", "skip"] = field(
        default="raise",
        metadata=does(
            "What follows a loss or a gradient that is not finite: 'raise' stops with the weights as they were, 'skip' "
            "leaves the step out and goes on.",
            choices=["raise", "skip"],
        ),
    )
    logging_dir: str | None = field(
        default=None, metadata=does("Where TBLogger and JsonLogger write; None: runs/ in output_dir.")
    )
    overwrite_output_dir: bool = field(
        default=False, metadata=does("For scripts: whether they may train into a directory that is not empty.")
    )
    epoch_train_steps: int | None = field(
        default=None, metadata=does("Updates of an epoch where the data's length is not known.")
    )
    set_dataset_epoch: bool = field(
        default=True, metadata=does("Call the training data's set_epoch, where it has one, at each epoch's begin.")
    )
    max_eval_steps: int = field(default=-1, metadata=does("Batches of an evaluation at most; -1: all."))


@dataclass
class OwnSaving:
    """What is saved and what is read back."""

    eval_on_save: bool = field(default=False, metadata=does("Evaluate before each save."))
    preserve_best_model: bool = field(
        default=False, metadata=does("Keep the best checkpoints from rotation, without loading one at the end.")
    )
    preserve_n_best: int = field(default=1, metadata=does("How many of the best checkpoints are kept: one."))
    save_optimizer_state: bool = field(default=True, metadata=does("Save the optimizer's state."))
    save_scheduler_state: bool = field(default=True, metadata=does("Save the learning-rate scheduler's state."))
    save_dataset_state: bool = field(default=True, metadata=does("Save the position in the training data."))
    save_rng_state: bool = field(default=True, metadata=does("Save the states of the random generators."))
    restore_optimizer_state: bool = field(default=True, metadata=does("Read the optimizer's state on resumption."))
    restore_scheduler_state: bool = field(default=True, metadata=does("Read the scheduler's state on resumption."))
    restore_dataset_state: bool = field(
        default=True, metadata=does("Go on in the training data where the run was; False begins it anew.")
    )
    restore_rng_state: bool = field(default=True, metadata=does("Read the generators' states on resumption."))

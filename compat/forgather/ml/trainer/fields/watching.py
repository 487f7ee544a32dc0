"""What is logged, reported, evaluated, saved, pushed and kept."""

from dataclasses import dataclass, field
from typing import Literal

from forgather.ml.trainer.enums import HubStrategy, IntervalStrategy, SaveStrategy
from forgather.ml.trainer.fields.describing import does

LEVELS = ["detail", "debug", "info", "warning", "error", "critical", "passive"]


@dataclass
class Logging:
    """Logs and reports."""

    logging_strategy: IntervalStrategy | str = field(default="steps", metadata=does("When to log: no, steps, epoch."))
    logging_steps: float = field(
        default=500, metadata=does("Updates between two logs; below 1, a share of all updates.")
    )
    logging_first_step: bool = field(default=False, metadata=does("Also log after the first update."))
    log_on_each_node: bool = field(default=True, metadata=does("Log on every machine, and not on the first alone."))
    logging_nan_inf_filter: bool = field(
        default=True,
        metadata=does(
            "Leave losses that are not finite out of logged means, where on_nonfinite lets training go on after them."
        ),
    )
    include_num_input_tokens_seen: str | bool = field(
        default="no", metadata=does("Count input tokens: 'all', 'non_padding', 'no', or a truth value for all or no.")
    )

    log_level: str = field(
        default="passive",
        metadata=does("Level of the first process's loggers, shown on standard error.", choices=LEVELS),
    )
    log_level_replica: str = field(
        default="warning", metadata=does("Level of the other processes' loggers.", choices=LEVELS)
    )
    disable_tqdm: bool | None = field(
        default=None, metadata=does("Print logs instead of drawing bars; None: where warnings are off.")
    )

    report_to: None | str | list[str] = field(
        default="none", metadata=does("Where logs are sent: names such as tensorboard, wandb; 'all'; 'none'.")
    )
    run_name: str | None = field(default=None, metadata=does("The run's name in reports."))
    project: str = field(default="huggingface", metadata=does("The project's name in Trackio."))
    trackio_space_id: str | None = field(default=None, metadata=does("For Trackio: the Space that it writes to."))
    trackio_bucket_id: str | None = field(default=None, metadata=does("For Trackio: the bucket of the Space."))
    trackio_static_space_id: str | None | Literal[False] = field(
        default=None, metadata=does("For Trackio: the static Space that it writes to.")
    )


@dataclass
class Evaluation:
    """When is evaluated, on what, and what metrics see."""

    eval_strategy: IntervalStrategy | str = field(default="no", metadata=does("When to evaluate: no, steps, epoch."))
    eval_steps: float | None = field(
        default=None, metadata=does("Updates between two evaluations; None: logging_steps; below 1, a share of all.")
    )
    eval_delay: float = field(
        default=0, metadata=does("Epochs or updates, as eval_strategy counts, before the first evaluation.")
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata=does("Samples of one forward pass in evaluation, on one device.")
    )
    prediction_loss_only: bool = field(default=False, metadata=does("Evaluate the loss alone."))
    eval_on_start: bool = field(default=False, metadata=does("Also evaluate before the first update."))
    eval_do_concat_batches: bool = field(
        default=True, metadata=does("Join predictions along the batch; otherwise they are lists of batches.")
    )
    eval_use_gather_object: bool = field(
        default=False, metadata=does("Gather any objects, not tensors alone, from several processes.")
    )
    eval_accumulation_steps: int | None = field(
        default=None, metadata=does("After how many batches predictions move to the CPU; None: at the end.")
    )

    include_for_metrics: list[str] = field(
        default_factory=list, metadata=does("What compute_metrics gets besides predictions: 'inputs', 'loss'.")
    )
    batch_eval_metrics: bool = field(
        default=False, metadata=does("Call compute_metrics for each batch, with compute_result=True at the last.")
    )


@dataclass
class Saving:
    """When is saved, what is kept, and which model is the best."""

    save_only_model: bool = field(
        default=False, metadata=does("Save the model, and not what is needed to go on training.")
    )
    save_strategy: SaveStrategy | str = field(default="steps", metadata=does("When to save: no, steps, epoch, best."))
    save_steps: float = field(default=500, metadata=does("Updates between two saves; below 1, a share of all updates."))
    save_on_each_node: bool = field(default=False, metadata=does("Save on every machine, and not on the first alone."))
    save_total_limit: int | None = field(
        default=None, metadata=does("How many checkpoints are kept; the newest and the best always are.")
    )
    enable_jit_checkpoint: bool = field(
        default=False, metadata=does("On SIGTERM, save after the update in progress and stop.")
    )

    push_to_hub: bool = field(default=False, metadata=does("Refused: push what was saved with model.push_to_hub()."))
    hub_token: str | None = field(default=None, metadata=does("For the Hub; read where push_to_hub is set."))
    hub_private_repo: bool | None = field(default=None, metadata=does("For the Hub; read where push_to_hub is set."))
    hub_model_id: str | None = field(default=None, metadata=does("For the Hub; read where push_to_hub is set."))
    hub_strategy: HubStrategy | str = field(
        default="every_save", metadata=does("For the Hub; read where push_to_hub is set.")
    )
    hub_always_push: bool = field(default=False, metadata=does("For the Hub; read where push_to_hub is set."))
    hub_revision: str | None = field(default=None, metadata=does("For the Hub; read where push_to_hub is set."))

    load_best_model_at_end: bool = field(
        default=False, metadata=does("When training ends, load the checkpoint with the best metric.")
    )
    metric_for_best_model: str | None = field(
        default=None, metadata=does("The metric by which models are compared, with or without 'eval_'.")
    )
    greater_is_better: bool | None = field(
        default=None, metadata=does("Whether more of it is better; None: unless its name ends in 'loss'.")
    )

    ignore_data_skip: bool = field(
        default=False, metadata=does("On resumption, begin the data anew instead of where the run was.")
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=False, metadata=does("On resumption, give callbacks the state that they had.")
    )

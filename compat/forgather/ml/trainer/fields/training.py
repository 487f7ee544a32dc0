"""How long is trained, and how: duration, schedule, optimizer, accumulation, clipping."""

from dataclasses import dataclass, field

from forgather.ml.trainer.enums import OptimizerNames, SchedulerType
from forgather.ml.trainer.fields.describing import does


@dataclass
class Training:
    """Duration, learning rate, optimizer."""

    output_dir: str | None = field(
        default=None, metadata=does("Where checkpoints and results go; without one, 'trainer_output'.")
    )

    per_device_train_batch_size: int = field(
        default=8, metadata=does("Samples of one forward pass in training, on one device.")
    )
    num_train_epochs: float = field(
        default=3.0, metadata=does("Passes over the training data; a fraction ends within the last one.")
    )
    max_steps: int = field(
        default=-1,
        metadata=does("Updates to make, instead of num_train_epochs; needed where the data's length is not known."),
    )

    learning_rate: float = field(default=5e-5, metadata=does("The highest value of the schedule."))
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata=does("The shape of the learning rate over the run: one of SchedulerType.")
    )
    lr_scheduler_kwargs: dict | str | None = field(  # type: ignore[type-arg]  # the parser reads the bare type
        default=None, metadata=does("Further arguments of the schedule, as a dict or JSON, such as num_cycles.")
    )
    warmup_steps: float = field(
        default=0, metadata=does("Updates in which the learning rate rises from 0; below 1, a share of all updates.")
    )

    optim: OptimizerNames | str = field(
        default="adamw_torch_fused",
        metadata=does(
            "adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad or rmsprop; others need other packages."
        ),
    )
    optim_args: str | None = field(
        default=None, metadata=does("Further arguments of sgd, adagrad or rmsprop: 'momentum=0.9,nesterov=True'.")
    )
    weight_decay: float = field(
        default=0.0, metadata=does("Decay of all parameters but biases and those of normalisation layers.")
    )
    adam_beta1: float = field(default=0.9, metadata=does("Decay of Adam's first moment."))
    adam_beta2: float = field(default=0.999, metadata=does("Decay of Adam's second moment."))
    adam_epsilon: float = field(default=1e-8, metadata=does("What Adam adds to its denominator."))
    optim_target_modules: None | str | list[str] = field(
        default=None, metadata=does("Layers for GaLore and APOLLO, which are refused here; so this is, too.")
    )

    gradient_accumulation_steps: int = field(
        default=1,
        metadata=does("Forward and backward passes to an update; their sum is the gradient of one large batch."),
    )
    average_tokens_across_devices: bool = field(
        default=True, metadata=does("Divide the loss by the tokens of all processes; of no account on one.")
    )
    max_grad_norm: float = field(default=1.0, metadata=does("Clip the gradient to this norm; 0 does not clip."))
    label_smoothing_factor: float = field(
        default=0.0, metadata=does("Share of the target that is spread over all classes; 0 for none.")
    )

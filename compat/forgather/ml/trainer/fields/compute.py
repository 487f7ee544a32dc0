"""In which precision, with how much memory, and how fast."""

from dataclasses import dataclass, field
from typing import Any

from forgather.ml.trainer.fields.describing import does


@dataclass
class Compute:
    """Precision, activation checkpointing, compilation, memory."""

    bf16: bool = field(default=False, metadata=does("Run the model in bfloat16, under autocast."))
    fp16: bool = field(default=False, metadata=does("Run the model in float16, under autocast, with a scaled loss."))
    bf16_full_eval: bool = field(default=False, metadata=does("Evaluate with the model itself in bfloat16."))
    fp16_full_eval: bool = field(default=False, metadata=does("Evaluate with the model itself in float16."))
    tf32: bool | None = field(
        default=None, metadata=does("Allow TensorFloat-32 in matrix products while the trainer runs; None leaves it.")
    )

    activation_checkpointing: bool | None = field(
        default=None,
        metadata=does("Compute activations again in the backward pass instead of keeping them.", nargs="?", const=True),
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=does("Arguments of torch.utils.checkpoint, as a dict or JSON, such as use_reentrant.")
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata=does("The older name of activation_checkpointing.", nargs="?", const=True)
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=does("The older name of activation_checkpointing_kwargs.")
    )

    torch_compile: bool = field(default=False, metadata=does("Compile the model by torch.compile."))
    torch_compile_backend: str | None = field(
        default=None, metadata=does("The backend of torch.compile; naming one turns torch_compile on.")
    )
    torch_compile_mode: str | None = field(
        default=None, metadata=does("The mode of torch.compile; naming one turns torch_compile on.")
    )

    use_liger_kernel: bool = field(default=False, metadata=does("Liger's kernels; refused, they need another package."))
    liger_kernel_config: dict[str, bool] | None = field(
        default=None, metadata=does("Which of Liger's kernels; refused, as they are.")
    )

    use_cache: bool = field(
        default=False, metadata=does("Let the model keep keys and values of attention; set on its config for training.")
    )
    neftune_noise_alpha: float | None = field(
        default=None, metadata=does("Add noise to the embeddings in training (NEFTune, arXiv 2310.05914).")
    )
    torch_empty_cache_steps: int | None = field(
        default=None, metadata=does("After how many updates the accelerator's cached memory is returned; None: never.")
    )
    auto_find_batch_size: bool = field(
        default=False, metadata=does("Lower the batch size by a tenth and start again when memory runs out.")
    )

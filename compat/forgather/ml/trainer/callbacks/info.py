"""What a run is, when it begins."""

import sys
from typing import Any, TextIO

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class InfoCallback(TrainerCallback):
    """Write, when a run begins, how large the model, the batches and the run are.

    Args:
        verbose: Also write the model and the arguments.
        output_stream: Where to; None for the standard output at that time.
    """

    def __init__(self, verbose: bool = False, output_stream: TextIO | None = None) -> None:
        self.verbose = verbose
        self.output_stream = output_stream

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write it."""
        if not state.is_world_process_zero:
            return
        stream = sys.stdout if self.output_stream is None else self.output_stream
        rows = information(args, state, model, train_dataloader)
        width = max(map(len, rows))
        stream.write("".join(f"{name:<{width}}  {value}\n" for name, value in rows.items()))
        if self.verbose:
            stream.write(f"{model}\n{args}\n")
        stream.flush()


def information(args: Any, state: TrainerState, model: Any, train_dataloader: Any) -> dict[str, str]:
    """Say how large the model, the batches and the run are."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        samples = f"{len(train_dataloader.dataset):,}"
    except (TypeError, AttributeError):
        samples = "not known"
    return {
        "model": type(model).__name__,
        "parameters": f"{sum(one.numel() for one in parameters):,}",
        "trained parameters": f"{trained:,}",
        "device": str(args.device),
        "training samples": samples,
        "epochs": f"{state.num_train_epochs:,}",
        "samples in an update": f"{batch:,} = {args.train_batch_size} a batch x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} processes",
        "updates": f"{state.max_steps:,}",
    }

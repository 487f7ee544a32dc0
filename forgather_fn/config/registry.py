"""What may be built without being allowed: constructors that do no more than construct."""

from collections.abc import Mapping
from typing import Final

import attrs


@attrs.frozen
class Family:
    """The classes of a module that have a common base.

    Attributes:
        base: ``module:Name`` of the base.
        defined: What the names of the modules that define them begin with.
    """

    base: str
    defined: str


FAMILIES: Final[Mapping[str, Family]] = {
    "torch.nn": Family("torch.nn:Module", "torch.nn.modules."),
    "torch.optim": Family("torch.optim:Optimizer", "torch.optim."),
    "torch.optim.lr_scheduler": Family("torch.optim.lr_scheduler:LRScheduler", "torch.optim.lr_scheduler"),
}
"""By the module that a configuration names."""


def _names(module: str, names: str) -> frozenset[str]:
    return frozenset(f"{module}:{name}" for name in names.split())


NAMES: Final = frozenset().union(
    _names("torch", "device tensor Generator"),
    _names("torch.utils.data", "TensorDataset StackDataset ConcatDataset ChainDataset Subset DataLoader"),
    _names(
        "torch.utils.data", "BatchSampler RandomSampler SequentialSampler SubsetRandomSampler WeightedRandomSampler"
    ),
    _names("torch.utils.data.distributed", "DistributedSampler"),
    _names("torch.utils.data", "DistributedSampler"),
    _names(
        "forgather_fn", "Mean Plan Transform accelerated adam adamw at at_end batches chain clipped early_stopped ema"
    ),
    _names(
        "forgather_fn", "evaluated every every_seconds folded from_torch group joined lora noise pipelined power_ema"
    ),
    _names("forgather_fn", "report rollback saved sgd single stateless stopped_by swa until"),
    _names("forgather_fn.data", "batches best_fit by_length counted memmap_tokens mixture packed rampup text_bytes"),
    _names("forgather_fn.data", "text_lines"),
    _names("forgather_fn.diagnostics", "by_module histograms module_norms profiled"),
    _names("forgather_fn.losses", "binary_cross_entropy causal_lm chunked class_weighted contrastive"),
    _names("forgather_fn.losses", "by_source cross_entropy distilled focal from_output huber ignoring l1 masked mse"),
    _names("forgather_fn.losses", "smoothed weighted with_metrics with_z_loss"),
    _names("forgather_fn.metrics", "accuracy bits_per_byte confusion f1 perplexity top_k"),
    _names("forgather_fn.optim", "adafactor adam adamw adamw_bfloat16 from_torch lion lookahead master_weights muon"),
    _names("forgather_fn.optim", "partitioned schedule_free_adamw sgd"),
    _names("forgather_fn.reducers", "plateau spikes stale"),
    _names("forgather_fn.schedules", "constant cosine cosine_with_restarts half_cosine inverse_sqrt joined linear"),
    _names("forgather_fn.schedules", "on_plateau one_cycle one_minus_sqrt piecewise polynomial scaled straight"),
    _names("forgather_fn.schedules", "warmup_stable_decay"),
    _names("forgather_fn.transforms", "annealed centralised chain clipped clipped_by_group clipped_by_unit"),
    _names("forgather_fn.transforms", "clipped_by_value noise stateless"),
    _names("forgather_fn.reports", "bar console jsonl tensorboard"),
    _names("forgather_fn.training", "Training assembled looks warmed_up"),
    _names("forgather_fn.demo.model", "Transformer"),
    _names("forgather_fn.demo.text", "held_out_windows labelled read training_windows"),
    _names("forgather_fn.demo.train", "bits_per_byte show"),
)
"""Each as a configuration names it."""

PACKAGES: Final[Mapping[str, frozenset[str]]] = {
    "forgather.ml": frozenset({"cli", "config", "control", "launch"}),
}
"""Packages whose classes may be built, and the functions that they offer themselves; not those of these modules."""

"""Seeds, devices, data loading, several processes, and what only scripts read."""

from dataclasses import dataclass, field
from typing import Any

from forgather.ml.trainer.enums import DebugOption
from forgather.ml.trainer.fields.describing import does


@dataclass
class Running:
    """Seeds, devices and data loading."""

    full_determinism: bool = field(
        default=False, metadata=does("Also use deterministic kernels, which are slower: enable_full_determinism.")
    )
    seed: int = field(default=42, metadata=does("The seed of initialisation, of dropout, and of the data's order."))
    data_seed: int | None = field(default=None, metadata=does("The seed of the data's order; None: seed."))

    use_cpu: bool = field(default=False, metadata=does("Use the CPU even where there is an accelerator."))

    accelerator_config: dict | str | None = field(  # type: ignore[type-arg]  # the parser reads the bare type
        default=None, metadata=does("How Accelerate shares batches out, as a dict, JSON, or the path of a JSON file.")
    )
    parallelism_config: Any | None = field(
        default=None, metadata=does("Accelerate's plan of several dimensions of parallelism; refused.")
    )

    dataloader_drop_last: bool = field(
        default=False, metadata=does("Leave out the last batch of an epoch where it is not full.")
    )
    dataloader_num_workers: int = field(default=0, metadata=does("Processes that load data; 0: this one does."))
    dataloader_pin_memory: bool = field(
        default=True, metadata=does("Load batches into pinned memory, where there is an accelerator.")
    )
    dataloader_persistent_workers: bool = field(
        default=False, metadata=does("Keep the loading processes from one pass over the data to the next.")
    )
    dataloader_prefetch_factor: int | None = field(
        default=None, metadata=does("Batches that each loading process is ahead.")
    )
    dataloader_multiprocessing_context: str | None = field(
        default=None,
        metadata=does(
            "How loading processes are started; None: as torch does.", choices=["fork", "spawn", "forkserver"]
        ),
    )
    dataloader_in_order: bool = field(
        default=True, metadata=does("Take batches in their order; False is refused, since a run could not be repeated.")
    )

    remove_unused_columns: bool = field(
        default=True, metadata=does("Leave out the columns of the data that the model's forward does not take.")
    )
    label_names: list[str] | None = field(
        default=None, metadata=does("The inputs that are labels; None: those that the model's forward names.")
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata=does(
            "The order of training data: random, sequential, or group_by_length.",
            choices=["random", "sequential", "group_by_length", "batch_rebalance"],
        ),
    )
    length_column_name: str = field(
        default="length", metadata=does("The column that has lengths, for group_by_length.")
    )


@dataclass
class Parallel:
    """Several processes."""

    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata=does("For DistributedDataParallel; read where there are several processes.")
    )
    ddp_bucket_cap_mb: int | None = field(
        default=None, metadata=does("For DistributedDataParallel; read where there are several processes.")
    )
    ddp_broadcast_buffers: bool | None = field(
        default=None, metadata=does("For DistributedDataParallel; read where there are several processes.")
    )
    ddp_static_graph: bool | None = field(
        default=None, metadata=does("For DistributedDataParallel; read where there are several processes.")
    )
    ddp_backend: str | None = field(
        default=None,
        metadata=does(
            "The backend of torch.distributed; read where there are several processes.",
            choices=["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"],
        ),
    )
    ddp_timeout: int = field(
        default=1800, metadata=does("Seconds that processes wait for each other; read where there are several.")
    )

    fsdp: str | None = field(
        default=None, metadata=does("Sharding of parameters; refused by this trainer.", nargs="?", const=True)
    )
    fsdp_config: dict[str, Any] | str | None = field(
        default=None, metadata=does("How parameters are sharded; read where fsdp is set.")
    )
    deepspeed: dict | str | None = field(  # type: ignore[type-arg]  # the parser reads the bare type
        default=None, metadata=does("DeepSpeed's configuration; refused.")
    )

    debug: str | list[DebugOption] = field(
        default="", metadata=does("underflow_overflow: report the first values in the model that are not finite.")
    )
    skip_memory_metrics: bool = field(default=True, metadata=does("Add no memory that was in use to metrics."))


@dataclass
class Scripts:
    """What scripts read, and trainers do not."""

    do_train: bool = field(default=False, metadata=does("For scripts: whether to train."))
    do_eval: bool = field(default=False, metadata=does("For scripts: whether to evaluate; on with an eval_strategy."))
    do_predict: bool = field(default=False, metadata=does("For scripts: whether to predict."))
    resume_from_checkpoint: str | None = field(
        default=None, metadata=does("For scripts: the checkpoint to pass to train().")
    )

    local_rank: int = field(
        default=-1, metadata=does("For scripts that launchers give it to; read local_process_index instead.")
    )

"""Data: the loaders that users see, override and iterate, and how many steps they give."""

import inspect
import math
import sys
from collections.abc import Callable, Sized
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.columns import RemoveColumnsCollator
from forgather.ml.trainer.sampler import EpochSampler, LengthGroupedSampler, lengths_of
from forgather.ml.trainer.seeding import seed_worker


def has_length(data: Any) -> bool:
    """Tell whether ``len`` works on it."""
    try:
        return len(data) is not None
    except (TypeError, AttributeError, NotImplementedError):
        return False


@attrs.frozen
class Lengths:
    """How long a training is, in the words of :meth:`DataMixin.set_initial_training_values`.

    Attributes:
        epochs: Passes over the data, the last one begun.
        updates_per_epoch: Optimizer steps in one.
        examples: Samples in one.
        samples: Samples of the whole training.
        batch_size: Samples in a step.
        batches_per_epoch: Microbatches in one epoch.
        max_steps: Optimizer steps of the whole training.
    """

    epochs: int
    updates_per_epoch: int
    examples: int
    samples: float
    batch_size: int
    batches_per_epoch: int
    max_steps: int


class DataMixin(Attributes):
    """The part of a trainer that makes data loaders."""

    def get_train_dataloader(self) -> Any:
        """Make the loader of the training set; override it for one of your own.

        Raises:
            ValueError: There is no training set, or nothing in it.
        """
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        if isinstance(self.train_dataset, Sized) and len(self.train_dataset) == 0:
            raise ValueError(f"Trainer: the train_dataset (a {type(self.train_dataset).__name__}) is empty.")
        return self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, self._get_train_sampler, is_training=True
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Make the loader of an evaluation set: the one given, the one of this name, or the trainer's.

        Raises:
            ValueError: There is none.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        kept: dict[str, Any] = self.__dict__.get("_eval_dataloaders", {})
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if self.args.dataloader_persistent_workers and name in kept:
            return kept[name]
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            chosen = self.eval_dataset[eval_dataset]
        return self._get_dataloader(
            chosen, "Evaluation", self.args.eval_batch_size, self._get_eval_sampler, dataloader_key=name
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Make the loader of a test set."""
        return self._get_dataloader(test_dataset, "test", self.args.eval_batch_size, self._get_eval_sampler)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Sampler[int] | None] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        args = self.args
        # A stream of the datasets library may not know its columns: then samples lose them one by one.
        if hasattr(dataset, "remove_columns") and getattr(dataset, "column_names", None) is not None:
            dataset, collate = self._remove_unused_columns(dataset, description), self.data_collator
        else:
            collate = self._get_collator_with_removed_columns(self.data_collator, description)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": collate,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.accelerator.is_available(),
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
            "in_order": getattr(args, "dataloader_in_order", True),
            # Making an iterator draws a seed for workers, which must not come from the generator that users draw from.
            "generator": torch.Generator().manual_seed(args.seed),
        }
        if not isinstance(dataset, IterableDataset):
            sampler = sampler_fn(dataset) if sampler_fn is not None else None
            if sampler is not None:
                options["sampler"] = self._seeded(sampler) if is_training else sampler
            options["drop_last"] = args.dataloader_drop_last
        if is_training:
            options["worker_init_fn"] = seed_worker
        loader: DataLoader[Any] = DataLoader(dataset, **options)
        if dataloader_key is not None and args.dataloader_persistent_workers:
            self.__dict__.setdefault("_eval_dataloaders", {})[dataloader_key] = loader
        return loader

    def _seeded(self, sampler: Any) -> Any:
        """Make a plain shuffle one that depends on seed and epoch alone, so that a run can be resumed."""
        if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
            return EpochSampler(sampler.data_source, self._data_seed())
        return sampler

    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Choose the order of the training set by ``train_sampling_strategy``; None leaves it to the loader."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not has_length(dataset):
            return None
        strategy = str(getattr(self.args, "train_sampling_strategy", "random"))
        if strategy == "group_by_length":
            together = self._train_batch_size * self._microbatches
            return LengthGroupedSampler(together, self._lengths(dataset), self._data_seed())
        if strategy == "sequential":
            return SequentialSampler(dataset)
        return EpochSampler(dataset, self._data_seed())

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        if str(getattr(self.args, "train_sampling_strategy", "random")) == "group_by_length":
            return LengthGroupedSampler(self.args.eval_batch_size, self._lengths(eval_dataset), self._data_seed())
        return SequentialSampler(eval_dataset)

    def _lengths(self, dataset: Any) -> list[int]:
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        return lengths_of(dataset, self.args.length_column_name, names[0])

    def _set_signature_columns_if_needed(self) -> None:
        if getattr(self, "_signature_columns", None) is not None:
            return
        model: Any = self.model
        if hasattr(model, "get_base_model"):  # what PEFT has wrapped
            model = model.get_base_model()
        parameters = inspect.signature(model.forward).parameters
        names = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._signature_columns = [*names, "label", "label_ids", *self.label_names] if names or not takes_any else []

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        columns = self._signature_columns
        if not columns:  # forward takes whatever comes
            return dataset
        ignored = [name for name in dataset.column_names if name not in columns]
        if len(ignored) == len(dataset.column_names):
            raise ValueError(
                "No columns in the dataset match the model's forward method signature: "
                f"({', '.join(columns)}). The following columns have been ignored: [{', '.join(ignored)}]. Please "
                "check the dataset and model. You may need to set `remove_unused_columns=False` in `TrainingArguments`."
            )
        return dataset.remove_columns(ignored)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        if not self._signature_columns:
            return data_collator
        return RemoveColumnsCollator(data_collator, self._signature_columns, type(self.model).__name__)

    def num_examples(self, dataloader: Any) -> int:
        """Count the samples of a loader; estimated where its dataset has no length."""
        dataset = getattr(dataloader, "dataset", None)
        if dataset is not None and has_length(dataset):
            return len(dataset)
        return len(dataloader) * int(self.args.per_device_train_batch_size)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Count the samples of one step."""
        return int(self._train_batch_size * self._microbatches)

    def set_initial_training_values(self, args: Any, dataloader: Sized) -> tuple[int, int, int, float, int, int, int]:
        """Find how long the training is: the fields of :class:`Lengths`, in order.

        Raises:
            ValueError: The loader has no length and ``max_steps`` is not given.
        """
        return attrs.astuple(self._training_lengths(args, dataloader))

    def _training_lengths(self, args: Any, dataloader: Sized) -> Lengths:
        batch_size = self.get_total_train_batch_size(args)
        accumulate = self._microbatches
        cap = getattr(args, "epoch_train_steps", None)
        if not has_length(dataloader):
            if args.max_steps <= 0:
                raise ValueError(
                    "args.max_steps must be set to a positive value if dataloader does not have a length, was "
                    f"{args.max_steps}"
                )
            per_epoch, batches = args.max_steps, args.max_steps * accumulate
            if cap and isinstance(cap, int):
                per_epoch, batches = cap, cap * accumulate
            samples = args.max_steps * batch_size
            return Lengths(sys.maxsize, per_epoch, samples, samples, batch_size, batches, args.max_steps)
        batches = len(dataloader)
        per_epoch = max(math.ceil(batches / accumulate), 1)
        if args.max_steps > 0:
            epochs = math.ceil(args.max_steps / per_epoch)
            samples = args.max_steps * batch_size
            return Lengths(
                epochs, per_epoch, self.num_examples(dataloader), samples, batch_size, batches, args.max_steps
            )
        max_steps = math.ceil(args.num_train_epochs * per_epoch)
        examples = self.num_examples(dataloader)
        return Lengths(
            math.ceil(args.num_train_epochs),
            per_epoch,
            examples,
            examples * args.num_train_epochs,
            batch_size,
            batches,
            max_steps,
        )

"""Making the optimizer: by arguments, by a factory, or as it was given."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.optimizers import decay_parameter_names, optimizer_class_and_kwargs


class Named:
    """Named parameters, for optimizer factories: an iterator of pairs that may also be called for a new one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._iterator = iter(model.named_parameters())

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._iterator

    def __next__(self) -> tuple[str, nn.Parameter]:
        return next(self._iterator)

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Begin anew, as ``named_parameters()`` does."""
        return self.model.named_parameters(*args, **kwargs)


class OptimizerMixin(Attributes):
    """The part of a trainer that makes the optimizer."""

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer, where there is none yet; override it for one of your own.

        Two groups: parameters that decay, and those that do not (biases and norms).
        """
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        if self.optimizer_factory is not None:
            self.optimizer = self.optimizer_factory(Named(model))
            return self.optimizer
        decays = set(self.get_decay_parameter_names(model))
        groups: Any = [
            {
                "params": [p for n, p in model.named_parameters() if n in decays and p.requires_grad],
                "weight_decay": self.args.weight_decay,
            },
            {
                "params": [p for n, p in model.named_parameters() if n not in decays and p.requires_grad],
                "weight_decay": 0.0,
            },
        ]
        given = self.optimizer_cls_and_kwargs
        kind, options = given if given is not None else self.get_optimizer_cls_and_kwargs(self.args, model)
        options = dict(options)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            self.optimizer = kind()(model, **options)  # a factory that wants the model
            return self.optimizer
        for name in ("params", "model", "optimizer_dict"):
            groups = options.pop(name, groups)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that decay: not those of layer norms, and not those named as biases or norms."""
        return decay_parameter_names(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """Give the class of the optimizer that ``optim`` names, and its options.

        Raises:
            ValueError: It is not one of those that are known, or ``optim_args`` do not fit it.
        """
        del model
        return optimizer_class_and_kwargs(args)

    def get_num_trainable_parameters(self) -> int:
        """Count the parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_learning_rates(self) -> list[float]:
        """Give the learning rate of each parameter group.

        Raises:
            ValueError: There is no optimizer yet.
        """
        self._require_optimizer()
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """Give the group of a parameter, or the parameters of all groups.

        Raises:
            ValueError: There is no optimizer yet.
        """
        self._require_optimizer()
        groups = self.optimizer.param_groups
        if isinstance(param, str):
            param = dict(self.model.named_parameters())[param]
        if param is not None:
            for group in groups:
                if any(param is held for held in group["params"]):
                    return group
        return [group["params"] for group in groups]

    def _require_optimizer(self) -> None:
        if self.optimizer is None:
            raise ValueError("Trainer optimizer is None, please make sure you have setup the optimizer before.")

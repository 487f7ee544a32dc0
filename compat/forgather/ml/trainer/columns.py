"""Leaving out what the model does not take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class RemoveColumnsCollator:
    """Leave out the columns that the model does not take, before a collator sees them.

    Attributes:
        data_collator: What collates the rest.
        signature_columns: Which columns stay.
        model_name: For the error message.
    """

    data_collator: Callable[[list[Any]], Any]
    signature_columns: list[str]
    model_name: str = "the model"

    def __call__(self, features: list[Any]) -> Any:
        """Collate what is left.

        Raises:
            ValueError: Nothing is left.
        """
        return self.data_collator([self._kept(feature) for feature in features])

    def _kept(self, feature: Any) -> Any:
        if not isinstance(feature, dict):
            return feature
        kept = {name: value for name, value in feature.items() if name in self.signature_columns}
        if not kept:
            raise ValueError(
                f"No columns in the dataset match the arguments of {self.model_name}.forward: the samples have "
                f"{sorted(feature)}, the model takes {self.signature_columns}. Rename them, or set "
                "remove_unused_columns=False in TrainingArguments and drop the others in the collator."
            )
        return kept

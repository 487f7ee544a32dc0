"""How Accelerate shares batches out: the ``accelerator_config`` argument."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass
class AcceleratorConfig:
    """How batches are shared out; with one process nothing is shared, and the first three say nothing.

    Attributes:
        split_batches: Whether ``per_device_train_batch_size`` is that of all processes; refused where there are
            several.
        dispatch_batches: Whether the first process loads for all; None: what can only be iterated.
        even_batches: Accelerate's, which repeats samples so that all processes have equally many. Here none is
            repeated, whatever it says: a process may have fewer microbatches of a step than others, or none.
        use_seedable_sampler: Always true: the order of data depends on its seed alone.
        non_blocking: Whether batches are copied to the device while it computes.
        gradient_accumulation_kwargs: Refused: ``gradient_accumulation_steps`` says it.
        use_configured_state: Refused: a trainer finds its processes by itself.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True
    non_blocking: bool = False
    gradient_accumulation_kwargs: dict[str, Any] | None = None
    use_configured_state: bool = False

    def __post_init__(self) -> None:
        """Refuse what is not honoured."""
        for name, value in (
            ("use_seedable_sampler", True),
            ("gradient_accumulation_kwargs", None),
            ("use_configured_state", False),
        ):
            if getattr(self, name) != value and getattr(self, name) != {}:
                raise ValueError(f"accelerator_config: {name}={getattr(self, name)!r} is not supported, only {value!r}")

    @classmethod
    def from_json_file(cls, path: str | Path) -> "AcceleratorConfig":
        """Read one from a JSON file."""
        return accelerator_config(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """Give what transformers writes into its files."""
        values = asdict(self)
        del values["use_configured_state"]
        return values


def accelerator_config(given: Any) -> AcceleratorConfig:
    """Make one of what ``accelerator_config`` may be: None, one, transformers' own, a dict, or a path of a JSON file.

    Raises:
        ValueError: It is none of these, has a key that is none, or a value that is not honoured.
    """
    if isinstance(given, AcceleratorConfig):
        return given
    if isinstance(given, type):
        raise NotImplementedError(f"accelerator_config={given.__name__}: pass an instance of the class, or a dict")
    if isinstance(given, str | Path):
        return AcceleratorConfig.from_json_file(given)
    if given is not None and not isinstance(given, Mapping):
        if not hasattr(given, "to_dict"):
            raise ValueError(f"accelerator_config={given!r}: expected a dict, or the path of a JSON file")
        given = given.to_dict()
    values = dict(given or {})
    if extra := values.keys() - {field.name for field in fields(AcceleratorConfig)}:
        raise ValueError(f"accelerator_config has no {sorted(extra)}")
    return AcceleratorConfig(**values)

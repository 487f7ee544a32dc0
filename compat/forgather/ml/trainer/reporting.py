"""Where logs are sent: the names that ``report_to`` takes, and the callbacks that they stand for."""

import difflib
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Final

PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "azure_ml": ("azureml",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
    "flyte": ("flytekit",),
    "kubeflow": (),
}
"""For each name, the packages that it needs. All but TensorBoard and kubeflow also need transformers, whose callbacks
they are."""


def available() -> list[str]:
    """Name the integrations whose packages are installed; kubeflow where a job of it says so."""
    found = [name for name, packages in PACKAGES.items() if packages and all(find_spec(one) for one in packages)]
    if "mlflow" in found and "azure_ml" in found:  # it reports through MLflow then
        found.remove("azure_ml")
    return [name for name in found if name != "flyte"] + ["kubeflow"] * in_kubeflow()


def in_kubeflow() -> bool:
    """Tell whether this process is part of a Kubeflow job that wants progress."""
    off = os.environ.get("DISABLE_KUBEFLOW_INTEGRATION", "").upper() == "TRUE"
    return not off and "KUBEFLOW_TRAINER_SERVER_URL" in os.environ


def report_names(given: str | Iterable[str] | None) -> list[str]:
    """Bring ``report_to`` to a list of names.

    Raises:
        ValueError: A name is none of :data:`PACKAGES`.

    Example:
        >>> report_names("none"), report_names(["tensorboard"])
        ([], ['tensorboard'])
    """
    listed = [given] if isinstance(given, str) else list(given or [])
    if listed == ["all"]:
        listed = available()
    elif listed == ["none"]:
        listed = []
    if in_kubeflow() and "kubeflow" not in listed:
        listed.append("kubeflow")
    for name in listed:
        if name not in PACKAGES:
            near = difflib.get_close_matches(str(name), PACKAGES, n=1)
            raise ValueError(
                f"report_to={name!r} is not one of 'all', 'none', {', '.join(map(repr, PACKAGES))}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return listed


def reporters(names: Iterable[str]) -> list[Any]:
    """Make the callbacks that send logs.

    Args:
        names: As :func:`report_names` gives them.

    Raises:
        ValueError: A package that a name needs is not installed.
    """
    made: list[Any] = []
    for name in names:
        if missing := [one for one in PACKAGES[name] if not find_spec(one)]:
            raise ValueError(f"report_to={name!r} needs {', '.join(missing)}, which is not installed")
        if name == "tensorboard":
            from forgather.ml.trainer.callbacks import TBLogger

            made.append(TBLogger())
            continue
        if not find_spec("transformers"):
            raise ValueError(f"report_to={name!r} is a callback of transformers, which is not installed")
        import transformers.integrations as theirs

        get: Any = theirs.get_reporting_integration_callbacks  # type: ignore[attr-defined]  # it has no types
        made += [callback() for callback in get([name])]
    return made

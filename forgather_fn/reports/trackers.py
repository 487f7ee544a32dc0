"""Rows as runs of Weights & Biases, MLflow and trackio, none of which is a dependency."""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from forgather_fn.reports.row import Sink
from forgather_fn.reports.tracked import TrackedRun, tracked

StrPath = str | os.PathLike[str]
_MLFLOW_METRICS: Final = 1000
"""As many metrics MLflow takes in one call."""
_MLFLOW_PARAMS: Final = 100


def wandb(directory: StrPath, *, project: str, config: Mapping[str, Any] | None = None, **options: Any) -> Sink:
    """Log each row to a run of Weights & Biases (``pip install wandb``).

    Rows are logged with their step as a value, which is the x-axis: steps that a restored attempt makes again are
    logged again, where Weights & Biases would drop a step that goes back.

    Args:
        directory: That of the run. ``trackers.json`` in it has the id, by which a restored attempt goes on with the
            run; files of an offline run lie in it, for ``wandb sync``.
        project: The project.
        config: What the run is made from, such as ``plan.describe()``.
        options: Of ``wandb.init``: ``mode="offline"``, ``entity``, ``name``, ``group``, ``tags``, ...

    Raises:
        ValueError: It is not installed.
    """

    def begin(package: Any, known: str | None) -> TrackedRun:
        own = {"reinit": "create_new", "resume": "allow"}
        run = package.init(project=project, dir=os.fspath(directory), id=known, **{**own, **options})
        run.config.update(dict(config or {}), allow_val_change=True)
        run.define_metric("*", step_metric="step")
        return TrackedRun(
            run.id,
            log=lambda step, numbers: run.log({"step": step, **numbers}),
            end=lambda failed: run.finish(exit_code=int(failed)),
        )

    return tracked("wandb", "wandb", directory, begin)


def mlflow(
    directory: StrPath,
    *,
    experiment: str = "Default",
    tracking_uri: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.time,
) -> Sink:
    """Log each row to a run of MLflow (``pip install mlflow``, or ``mlflow-skinny`` where a server keeps the runs).

    MLflow's own active run is neither used nor changed. MLflow keeps an infinite value as the largest float, and both
    values of a step that a restored attempt makes again.

    Args:
        directory: That of the run; ``trackers.json`` in it has the id, by which a restored attempt goes on.
        experiment: Created where there is none of that name.
        tracking_uri: Where runs are kept, such as ``"sqlite:///mlflow.db"``; None for MLflow's own choice.
        name: Of the run; None for one that MLflow makes up.
        config: What the run is made from, such as ``plan.describe()``; written when the run begins, since MLflow
            refuses to change it.
        tags: Of the run.
        clock: Gives seconds since the epoch, for the times of values.

    Raises:
        ValueError: It is not installed.
    """

    def begin(package: Any, known: str | None) -> TrackedRun:
        client = package.MlflowClient(tracking_uri)
        if known is None:
            found = client.get_experiment_by_name(experiment)
            place = client.create_experiment(experiment) if found is None else found.experiment_id
            run = client.create_run(place, run_name=name, tags=dict(tags or {})).info.run_id
            params = [package.entities.Param(key, str(value)) for key, value in (config or {}).items()]
            for some in _batched(params, _MLFLOW_PARAMS):
                client.log_batch(run, params=some)
        else:
            run = known
            client.update_run(run, status="RUNNING")

        def log(step: int, numbers: Mapping[str, float]) -> None:
            now = int(clock() * 1000)
            metrics = [package.entities.Metric(key, value, now, step) for key, value in numbers.items()]
            for some in _batched(metrics, _MLFLOW_METRICS):
                client.log_batch(run, metrics=some)

        return TrackedRun(run, log, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED"))

    return tracked("mlflow", "mlflow", directory, begin)


def trackio(directory: StrPath, *, project: str, config: Mapping[str, Any] | None = None, **options: Any) -> Sink:
    """Log each row to a run of trackio (``pip install 'trackio>=0.20'``).

    Args:
        directory: That of the run. ``trackers.json`` in it has the run's name, by which a restored attempt goes on with
            it; its name is that of the directory, and some letters.
        project: The project.
        config: What the run is made from, such as ``plan.describe()``.
        options: Of ``trackio.init``: ``space_id``, ``group``, ...

    Raises:
        ValueError: It is not installed.
    """

    def begin(package: Any, known: str | None) -> TrackedRun:
        name = known or f"{Path(directory).resolve().name}-{secrets.token_hex(4)}"
        own = {"resume": "allow" if known else "never", "embed": False, "config": dict(config or {})}
        run = package.init(project=project, name=name, **{**own, **options})
        return TrackedRun(
            name,
            log=lambda step, numbers: run.log(dict(numbers), step=step),
            end=lambda failed: run.finish(),
        )

    return tracked("trackio", "trackio>=0.20", directory, begin)


def _batched(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]

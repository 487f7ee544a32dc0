"""What a pipeline would be: its stages, its schedule as a picture, and for how long its processes would wait."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn

from forgather_fn.model import parameter_sites
from forgather_fn.pipeline.balance import balanced
from forgather_fn.pipeline.cuts import Assignment, SplitSpec, cuts_of, registered
from forgather_fn.pipeline.schedules import Arrangement, arrange, orders
from forgather_fn.pipeline.simulation import Simulation, picture, simulate


@attrs.frozen
class StageSummary:
    """One stage.

    Attributes:
        number: Of the stage.
        rank: Of the process that has it.
        first: The first module with parameters in it.
        last: The last.
        parameters: How many numbers its parameters are; one that several stages use counts in each.
        bytes: How much memory they take.
    """

    number: int
    rank: int
    first: str
    last: str
    parameters: int
    bytes: int


@attrs.frozen(eq=False)
class Explanation:
    """What a pipeline would be; it prints as a page.

    Attributes:
        arrangement: The schedule and its sizes.
        stages: In their order.
        simulation: The schedule run in thought, each stage taking as long as it has parameters.
        even: The same with stages that take equally long.
        width: Of the page, in columns.
    """

    arrangement: Arrangement
    stages: tuple[StageSummary, ...]
    simulation: Simulation
    even: Simulation
    width: int = 100

    @property
    def bubble(self) -> float:
        """The share of all processes' time in which they wait, if all stages take equally long."""
        return self.even.bubble

    def __str__(self) -> str:
        sizes = self.arrangement
        head = (
            f"{sizes.kind.name}: {sizes.stages} stages on {sizes.ranks} ranks ({sizes.kind.placement}), "
            f"{sizes.microbatches} microbatches"
        )
        wide = max(len(f"{stage.first} ... {stage.last}") for stage in self.stages)
        rows = [f"{'stage':>5} {'rank':>4}  {'modules':<{wide}} {'parameters':>16} {'MiB':>10}"]
        for stage in self.stages:
            modules = f"{stage.first} ... {stage.last}"
            rows.append(
                f"{stage.number:>5} {stage.rank:>4}  {modules:<{wide}} {stage.parameters:>16,} "
                f"{stage.bytes / 2**20:>10,.1f}"
            )
        legend = "n forward, [n] backward, in / wn backward of inputs / weights, ' a rank's next stage, . waiting"
        return "\n".join(
            [
                head,
                "",
                *rows,
                "",
                picture(self.even, width=self.width),
                legend,
                "",
                f"bubble: {self.even.bubble:.1%} of the time of all ranks, if all stages take equally long",
                f"        {self.simulation.bubble:.1%}, if each takes as long as it has parameters",
            ]
        )


def explain(
    model: nn.Module,
    split_spec: SplitSpec | str,
    *,
    schedule: str = "1F1B",
    ranks: int,
    microbatches: int,
    stages: int | None = None,
    width: int = 100,
) -> Explanation:
    """Say what a pipeline would be, without processes, and without a run of the model.

    Args:
        model: Its tensors may be on the meta device, so that it takes no memory.
        split_spec: Where it is cut, or ``"auto"``.
        schedule: Its name.
        ranks: How many processes.
        microbatches: In a step.
        stages: How many, where the cuts are found: as many as ranks, or twice that for schedules that need two each.
        width: Of the page, in columns.

    Raises:
        SplitError: The model cannot be cut there.
        ScheduleError: The schedule cannot run with these sizes.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
        >>> print(explain(model, "auto", ranks=2, microbatches=3))
        1F1B: 2 stages on 2 ranks (loop), 3 microbatches
        <BLANKLINE>
        stage rank  modules       parameters        MiB
            0    0  0 ... 1          525,312        2.0
            1    1  2 ... 3          525,312        2.0
        <BLANKLINE>
        rank 0  0 1 . . [0] 2 [1] . [2]
        rank 1  . 0 [0] 1 [1] 2 [2] . .
        n forward, [n] backward, in / wn backward of inputs / weights, ' a rank's next stage, . waiting
        <BLANKLINE>
        bubble: 25.0% of the time of all ranks, if all stages take equally long
                25.0%, if each takes as long as it has parameters
    """
    spec = auto(model, schedule, ranks, stages) if isinstance(split_spec, str) else split_spec
    cuts = cuts_of(model, spec)
    arrangement = arrange(schedule, ranks=ranks, stages=len(cuts) + 1, microbatches=microbatches)
    found = _stages(model, arrangement, registered(model, cuts))
    order = orders(arrangement)
    mean = sum(stage.parameters for stage in found) / len(found)
    costs = [max(stage.parameters / mean, 1e-3) if mean else 1.0 for stage in found]
    return Explanation(arrangement, found, simulate(order, len(found), costs), simulate(order, len(found)), width)


def auto(model: nn.Module, schedule: str, ranks: int, stages: int | None = None) -> dict[str, Any]:
    """Choose cuts for a schedule: as many stages as it needs."""
    from forgather_fn.pipeline.schedules import kind_of

    return balanced(model, stages or ranks * (kind_of(schedule).stages or 1))


def _stages(model: nn.Module, arrangement: Arrangement, assignment: Assignment) -> tuple[StageSummary, ...]:
    sizes: Mapping[str, tuple[int, int]] = {
        name: (site.tensor.numel(), site.tensor.numel() * site.tensor.element_size())
        for site, name in parameter_sites(model)
    }
    found = []
    for number in range(arrangement.stages):
        own = [name for name, used in assignment.params.items() if number in used]
        modules = [name.rpartition(".")[0] or "the model" for name in own] or ["nothing"]
        found.append(
            StageSummary(
                number,
                arrangement.rank_of(number),
                modules[0],
                modules[-1],
                sum(sizes[name][0] for name in own),
                sum(sizes[name][1] for name in own),
            )
        )
    return tuple(found)

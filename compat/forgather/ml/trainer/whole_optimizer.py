"""The state of an optimizer that is spread over processes, as torch's ``state_dict`` of the whole, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from forgather.ml.trainer.live_optimizer import first_names
from forgather_fn.world import World


@attrs.frozen(eq=False)
class Spread:
    """An optimizer of which each process has the parameters of its stages.

    Attributes:
        optimizer: This process's.
        model: Whose parameters they are.
        world: The processes.
        order: The trained parameters of the whole model, in its order.
    """

    optimizer: Any
    model: nn.Module
    world: World
    order: Sequence[str]

    def _own(self) -> list[list[str]]:
        names = first_names(self.model)
        return [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]

    def _numbers(self) -> dict[str, int]:
        """Number the parameters of the whole as torch does: group by group, in the order of the model."""
        told: list[list[list[str]]] = self.world.gather(self._own())
        groups = [{name for own in told for name in own[i]} for i in range(len(told[0]))]
        ordered = [name for group in groups for name in self.order if name in group]
        return {name: number for number, name in enumerate(ordered)}

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the whole; collective."""
        numbers, own = self._numbers(), self._own()
        local = self.optimizer.state_dict()
        names = [name for group in own for name in group]
        state = {names[i]: {slot: _on_cpu(value) for slot, value in row.items()} for i, row in local["state"].items()}
        rows: dict[int, Any] = {}
        for found in self.world.gather((own, state)):
            rows |= {numbers[name]: row for name, row in found[1].items() if numbers[name] not in rows}
        groups = []
        for i, group in enumerate(local["param_groups"]):
            members = {name for told in self.world.gather(own[i]) for name in told}
            groups.append({**group, "params": [numbers[name] for name in numbers if name in members]})
        return {"state": dict(sorted(rows.items())), "param_groups": groups}

    def load_state_dict(self, whole: Mapping[str, Any]) -> None:
        """Take this process's part of the state of the whole; collective."""
        numbers, own = self._numbers(), self._own()
        names = [name for group in own for name in group]
        place = {numbers[name]: i for i, name in enumerate(names)}
        groups = []
        for group, mine in zip(whole["param_groups"], own, strict=True):
            groups.append({**group, "params": [place[numbers[name]] for name in mine]})
        state = {place[number]: row for number, row in whole["state"].items() if number in place}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value

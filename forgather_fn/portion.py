"""Which portion of a state a process has, where no process has all of it."""

import attrs


@attrs.frozen(eq=False)
class Portion:
    """What of a model a process has, and what of that it writes to a checkpoint.

    Attributes:
        number: Which of the portions this is, from 0.
        count: How many there are.
        writes: Whether this process writes it; others may have the same one.
        order: All trained parameters of the whole model, in its order.
        own: The parameters that the process has.
        named: Those of them that it writes; a tied one is written by one process.
        buffers: The buffers that it writes; all processes have all of them.
    """

    number: int
    count: int
    writes: bool
    order: tuple[str, ...]
    own: frozenset[str]
    named: frozenset[str]
    buffers: frozenset[str]

    def foreign(self, path: str) -> bool:
        """Tell whether the path of a tensor ends in the name of a parameter that this process does not have."""
        name = path.rpartition("/")[2]
        return name in self.order and name not in self.own

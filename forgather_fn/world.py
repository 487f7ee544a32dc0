"""The processes of a run, as one of them sees them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import attrs

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

STEP: Final = "a step"
"""What processes begin most often; see :meth:`World.begin`."""


class PeerError(RuntimeError):
    """Another process of the run has failed; its rank, its error and its traceback come first in the message."""


E = TypeVar("E", bound=BaseException)


def known_to_all(error: E) -> E:
    """Mark an error that every process of the run raises at the same point, so that none has to be told of it."""
    error.known_to_all = True  # type: ignore[attr-defined]  # errors take attributes
    return error


def check_same(told: Sequence[str], why: str) -> None:
    """Make sure that all processes of a run have told the same; what they told was gathered.

    Args:
        told: By rank.
        why: They must, and what to do; a line for each process follows it.

    Raises:
        ValueError: They have not, which all of them find.

    Example:
        >>> check_same(["seed 1", "seed 2"], "init: one seed for all:")
        Traceback (most recent call last):
        ValueError: init: one seed for all:
          rank 0: seed 1
          rank 1: seed 2
    """
    if len(set(told)) > 1:
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(told))
        raise known_to_all(ValueError(f"{why}{lines}"))


@attrs.define(eq=False)
class ProgramNumber:
    """One of the programs that the processes of a run step together.

    Attributes:
        number: From 1, in the order in which the programs were initialised; 0 before.
    """

    number: int = 0


class Watch(Protocol):
    """Knows when another process of the run has ended, or has failed, and tells the others of this one."""

    def begin(self, what: str, /, program: "ProgramNumber | None" = None) -> None:
        """Note that a step of a program begins here, or anything else that takes all processes.

        Raises:
            PeerError: Another process has ended before it, or begins something else in its place.
        """
        ...

    def fail(self, error: BaseException, /) -> None:
        """Tell the others that this process cannot go on, and why; they end at once."""
        ...

    def cause(self, seconds: float, /) -> PeerError | None:
        """Wait up to so many seconds for word of a process that has failed; None if there was none."""
        ...

    def close(self) -> None:
        """Leave the others in peace."""
        ...


@attrs.frozen(eq=False)
class World:
    """The processes of a run, as one of them sees them. All methods are collective: every process calls them, in order.

    Attributes:
        rank: Which process this is, from 0.
        size: How many there are.
        local_rank: Which of its machine's processes it is.
        group: Over which tensors on the device are reduced; None where it is alone.
        control: Over which objects are exchanged, on the CPU; None where it is alone.
        votes: Over which polls are held, beside what else is exchanged; None where that is ``control`` as well.
        watch: Who tells of processes that fail; None where nobody does.
        program: Which program they run together, where it is one of several; None for what is of no program.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    control: Any = None
    votes: Any = None
    watch: Watch | None = None
    program: ProgramNumber | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that reports, and commits files."""
        return self.rank == 0

    def of_program(self) -> "World":
        """Give the same processes as those of one more program, so that its steps are not taken for another's."""
        return attrs.evolve(self, program=ProgramNumber())

    def gather(self, value: Any) -> list[Any]:
        """Give every process what each of them has, by rank; values are pickled."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self.explained():
            distributed.all_gather_object(found, value, group=self.control)
        return found

    def rows(self, numbers: "Tensor") -> "Tensor":
        """Give every process the few numbers of each, by rank: on the CPU, shape (processes, numbers)."""
        import torch
        from torch import distributed

        rows = torch.empty(self.size, len(numbers), dtype=numbers.dtype)
        with self.explained():
            distributed.all_gather_single(rows.view(-1), numbers, group=self.control)
        return rows

    def broadcast(self, value: Any = None) -> Any:
        """Give every process what the first has; it is pickled."""
        if self.size == 1:
            return value
        from torch import distributed

        found = [value]
        with self.explained():
            distributed.broadcast_object_list(found, group_src=0, group=self.control)
        return found[0]

    def beside(self) -> "World":
        """Open a way of its own for objects, so that a thread beside the training can use it."""
        if self.size == 1:
            return self
        from torch import distributed

        with self.explained():
            return attrs.evolve(self, control=distributed.new_group(backend="gloo"))

    def each(self, function: Callable[[], T], /) -> list[T]:
        """Run a function that is not collective on every process, and give all of them what each found, by rank.

        Raises:
            PeerError: It failed on another process; on those where it failed, their own error is raised.
        """
        found: T | None = None
        error: Exception | None = None
        try:
            found = function()
        except Exception as raised:
            error = raised
        if self.size == 1 and error is not None:
            raise error
        told = self.gather((found, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise known_to_all(error)
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise known_to_all(PeerError(f"rank {rank} failed: {text}"))
        return [value for value, _ in told]

    def first(self, function: Callable[[], T], /) -> T:
        """Run a function on the first process alone, and give all of them what it found; its failure is everyone's.

        Raises:
            PeerError: It failed; on the first process its own error is raised.
        """
        return cast(T, self.each(lambda: function() if self.main else None)[0])

    def polled(self) -> Callable[[int], int]:
        """Open a poll: a function that takes a number at each step, and gives the greatest that any process gave.

        It never waits for the other processes: what several give is known one call later, to all of them in the same
        call. A single process has its own number at once.
        """
        if self.size == 1:
            return lambda number: number
        return Poll(self).vote

    def begin(self, what: str, /) -> None:
        """Note that a step begins here, or anything else that takes all processes: before the first word is sent.

        What fails before this may be tried again, by one process alone.

        Args:
            what: Begins: :data:`STEP`, for which nobody is waited for unless the last was of another program, or
                another noun with its article, which all processes begin together, so that one that does so alone is
                told, and waits for nobody for ever.

        Raises:
            PeerError: Another process has ended before it, or begins something else in its place.
        """
        if self.watch is not None:
            self.watch.begin(what, self.program)

    def fail(self, error: BaseException, /) -> None:
        """Tell the other processes that this one cannot go on; they end."""
        if self.watch is not None:
            self.watch.fail(error)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other processes of an error that leaves the block: they wait for what this one cannot do any more.

        Whoever catches it can go on alone only.
        """
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            self.fail(error)
            raise

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Tell, of a collective that broke, which process failed and why.

        Raises:
            PeerError: One has, and said so, or ended.
        """
        try:
            yield
        except RuntimeError as error:
            cause = self.watch.cause(2.0) if self.watch is not None else None
            if cause is None:
                raise
            raise cause from error


@attrs.define(eq=False)
class Poll:
    """What processes are agreeing on while they compute."""

    world: World
    _asked: Any = None
    _number: Any = None

    def vote(self, number: int) -> int:
        """Give a number, and get the greatest of those that were given at the call before."""
        import torch
        from torch import distributed

        agreed = 0
        with self.world.explained():
            if self._asked is not None:
                self._asked.wait()
                agreed = int(self._number)
            self._number = torch.tensor(number)
            group = self.world.control if self.world.votes is None else self.world.votes
            self._asked = distributed.all_reduce(self._number, distributed.ReduceOp.MAX, group=group, async_op=True)
        return agreed


ALONE = World()
"""A process that has no others."""

"""Sources that are read one sample after the other, and how each is taken up again where it was left."""

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import attrs
from torch.utils.data import DataLoader, IterableDataset

from forgather_fn.signature import checked

Json: TypeAlias = Any
"""None, numbers, strings, and lists and mappings of them."""


class Reader(Protocol):
    """One epoch of a source that is being read."""

    def __next__(self) -> Any:
        """Give the next sample; ``StopIteration`` at the end of the epoch."""
        ...

    def state(self) -> Json:
        """Say where the source goes on after the last sample given; asked for once a batch."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """A source of samples that can be opened where a state says, and so has a cursor of its own.

    Attributes:
        name: What it is, with a version that is raised when its states change their meaning. Part of the stream's
            fingerprint and of every cursor: a state that another source, or another version, has written is refused.
    """

    @property
    def name(self) -> str:
        """Name it, with its version."""
        ...

    def open(self, *, seed: int, epoch: int, samples: int, state: Json) -> Reader:
        """Read an epoch, from its start or from where a state says.

        A reader gives its own samples, or raises, whatever is opened after it.

        Args:
            seed: The data seed, for a source that shuffles.
            epoch: Which pass over the source, from 0.
            samples: How many samples of the epoch were consumed.
            state: What :meth:`Reader.state` gave after them; None at the start of an epoch.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """An iterable that says and takes where it is: an ``IterableDataset`` of Hugging Face, a ``StatefulDataLoader``."""

    def state_dict(self) -> Any:
        """Say where it is."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go there, when it is iterated next."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


@attrs.frozen(eq=False)
class Counted:
    """A source without a state: it is read from the start of the epoch, and what was consumed is passed over.

    Going on costs as much as reading what is passed over. The source must give the same samples in each reading of an
    epoch; one that has ``set_epoch`` is told which epoch it is.
    """

    made: Callable[[int], Iterable[Any]]
    name: str = "counted/1"

    def open(self, *, seed: int, epoch: int, samples: int, state: Json) -> Reader:
        """Read an epoch from its start, and pass over what was consumed.

        Raises:
            ValueError: It is shorter now.
        """
        reader = iter(self.made(epoch))
        passed = sum(1 for _ in itertools.islice(reader, samples))
        if passed < samples:
            raise ValueError(
                f"epoch {epoch} of the source gave only {passed} samples, but {samples} of it were consumed before: it "
                "must give the same samples each time it is read"
            )
        return _Plain(reader)


@attrs.define(eq=False)
class _Plain:
    samples: Iterator[Any]

    def __next__(self) -> Any:
        return next(self.samples)

    def state(self) -> Json:
        return None


@attrs.define(eq=False)
class Remembered:
    """A source with ``state_dict`` and ``load_state_dict``. It is one object, so the latest reader takes it over."""

    source: Stateful
    first: Any = attrs.field()
    readers: int = 0
    name: str = "stateful/1"

    @first.default
    def _before_any_reading(self) -> Any:
        return copy.deepcopy(self.source.state_dict())

    def open(self, *, seed: int, epoch: int, samples: int, state: Json) -> Reader:
        """Set the source to the state, or to its first one, and read on."""
        self.readers += 1
        set_epoch(self.source, epoch)
        self.source.load_state_dict(copy.deepcopy(self.first if state is None else state))
        return _Remembering(self, self.readers, iter(self.source))


@attrs.define(eq=False)
class _Remembering:
    opened: Remembered
    number: int
    samples: Iterator[Any]

    def __next__(self) -> Any:
        self._check()
        return next(self.samples)

    def state(self) -> Json:
        self._check()
        return plain(self.opened.source.state_dict(), type(self.opened.source).__name__)

    def _check(self) -> None:
        if self.number != self.opened.readers:
            raise ValueError(
                f"this {type(self.opened.source).__name__} was started again meanwhile, elsewhere in this process: it "
                "keeps one state, so it can be read by one at a time. Make another object for the other."
            )


@checked
def counted(source: Iterable[Any] | Callable[[], Iterable[Any]]) -> Counted:
    """Read a source one sample after the other, and take it up again by counting.

    For sources that cannot say where they are, or whose own state is not exact.

    Args:
        source: What gives a new iterator each time it is iterated, or a function that gives one: a generator function
            with its arguments (``lambda: read(path)``), a torch ``IterableDataset``.

    Raises:
        ValueError: It is an iterator, which can be read once only; or nothing that can be iterated.

    Example:
        >>> import itertools
        >>> from forgather_fn import batches
        >>> stream = batches(counted(lambda: iter("abc")), batch_size=2, order="sequential", collate="".join)
        >>> [batch.data for batch in itertools.islice(stream.start(seed=0, samples=0), 3)]
        ['ab', 'ca', 'bc']
    """
    if isinstance(source, Iterator):
        raise ValueError(MSG_ONCE.format(kind=type(source).__name__))
    if isinstance(source, Iterable):
        return Counted(lambda epoch: set_epoch(source, epoch))
    return Counted(lambda epoch: source())


def resumable(source: Any) -> Resumable | None:
    """Find out how a source is read one sample after the other; None if it is not one of those.

    Raises:
        ValueError: It can be read once only, or its own state is not exact.
    """
    if isinstance(source, Resumable):
        return source
    if isinstance(source, Iterator):
        raise ValueError(MSG_ONCE.format(kind=type(source).__name__))
    if isinstance(source, DataLoader) and source.batch_size is not None:
        raise ValueError(
            f"a {type(source).__name__} gives batches, where samples are expected. Give that of the DataLoader, "
            "its .dataset; or make it with batch_size=None, if it must be this loader that reads"
        )
    indexed = not isinstance(source, IterableDataset)
    indexed &= hasattr(source, "__getitem__") and hasattr(source, "__len__") and not hasattr(source, "load_state_dict")
    if indexed or not (isinstance(source, Iterable) or callable(source)):
        return None
    if isinstance(source, Stateful):
        if _refills(source):
            raise ValueError(MSG_REFILLS)
        return Remembered(source)
    return counted(source)


def set_epoch(source: Any, epoch: int) -> Any:
    """Tell a source which epoch is read, if it wants to know, and give it."""
    tell = getattr(source, "set_epoch", None)
    if callable(tell):
        tell(epoch)
    return source


def plain(state: Any, source: str) -> Json:
    """Bring a state to the form that a checkpoint gives back.

    Raises:
        ValueError: It cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the state of {source} cannot be written as JSON ({error}): a cursor consists of numbers, strings, "
            "lists and mappings. Give such a state, or read the source by counting: ff.data.counted(source)."
        ) from None


def _refills(source: Any) -> bool:
    """Tell whether a dataset of Hugging Face has a buffer of shuffled samples, which its state leaves out."""
    inner = getattr(source, "_ex_iterable", None)
    while inner is not None:
        if "BufferShuffled" in type(inner).__name__:
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False


MSG_ONCE: Final = (
    "a {kind} can be read only once: a job that goes on, or begins another epoch, could not start it again. Give what "
    "makes it: ff.batches(lambda: read(path), ...), a generator function, or an object whose __iter__ starts anew."
)
MSG_REFILLS: Final = (
    "this dataset shuffles in a buffer, and its state leaves out what is in the buffer: a resumed job would miss those "
    "samples. Shuffle its shards only, or have it taken up by counting, at the cost of reading again "
    "what was consumed: ff.batches(ff.data.counted(dataset), ...)."
)

"""What torch allocates while something runs, counted also where nothing is allocated."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forgather_fn import tree


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """Adds up the memory of all tensors that are made while it is on, and takes off what is given back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leave out what is there already."""
        for tensor in tensors:
            self._watch(tensor, counted=False)

    def _watch(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._known:
            return
        size = storage.nbytes() if counted else 0

        def gone(reference: Any) -> None:
            del self._known[number]
            self.now -= size

        self._known[number] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree.tensors([made]):
            if tensor.device.type != "meta":
                self._watch(tensor)
        return made

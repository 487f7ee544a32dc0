"""Reading ahead in threads of this process, so that a step need not wait for its batch."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from forgather_fn.data.loading import Answers, Request, pinned, unchanged


class Answered(Protocol):
    """What gives the answer to a request."""

    def __getitem__(self, request: Request, /) -> Any: ...


def in_threads(
    fetch: Answered, requests: Iterator[Request], *, threads: int, prefetch: int, pin_memory: bool
) -> Answers:
    """Answer requests in threads, in order, ahead of time. Closing the generator ends the threads.

    The first request of a start, whose draws from the global generators are looked at, is answered in the caller's
    thread, while nothing else draws. An error is raised where its answer is due, after all answers before it.

    Args:
        fetch: Called from several threads at once, if there are several.
        requests: Taken in the caller's thread, ``threads * prefetch`` ahead of the answers.
        threads: How many.
        prefetch: Requests that each has in hand.
        pin_memory: Copy the answers to page-locked memory.
    """
    finish: Callable[[Any], Any] = pinned if pin_memory else unchanged

    def answer(request: Request) -> Any:
        return finish(fetch[request])

    pool = ThreadPoolExecutor(threads, thread_name_prefix="forgather-data")
    waiting: collections.deque[tuple[Request, Future[Any]]] = collections.deque()
    try:
        for request in requests:
            waiting.append((request, _done(answer(request)) if request.first else pool.submit(answer, request)))
            if len(waiting) > threads * prefetch:
                asked, found = waiting.popleft()
                yield asked, found.result()
        while waiting:
            asked, found = waiting.popleft()
            yield asked, found.result()
    finally:
        # A read that runs cannot be broken off: it is waited for. Those not yet begun are not.
        pool.shutdown(wait=True, cancel_futures=True)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future

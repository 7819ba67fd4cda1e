"""Make batches ahead in a background thread, so that the training loop finds them ready."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; to a CUDA card through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Prefetch(Generic[T]):
    """Iterate over what `make` yields; a daemon thread stays up to `depth` items ahead.

    An exception in the thread is raised at the place where its item would have come. The thread ends with the
    iterator: at `close`, or when nobody holds the Prefetch any more.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int = 2) -> None:
        self.wait_seconds = 0.0  # how long the consumer had to wait in all
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        # The thread must not hold `self`, or an abandoned Prefetch would live for ever.
        self._thread = threading.Thread(target=_work, args=(make, self._queue, self._stop), daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        start = time.perf_counter()
        kind, item = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if kind == "item":
            return item  # type: ignore[return-value]
        self._ended = True
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended = True
        self._stop.set()
        self._thread.join()


def _work(
    make: Callable[[], Iterator[T]], out: queue.Queue[tuple[str, T | BaseException | None]], stop: threading.Event
) -> None:
    def put(kind: str, item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                out.put((kind, item), timeout=0.1)
                return
            except queue.Full:
                continue

    try:
        for item in make():
            put("item", item)
            if stop.is_set():
                return
        put("end", None)
    except BaseException as error:
        put("error", error)

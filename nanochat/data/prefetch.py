"""Make batches ahead in a background thread, and copy them to the device while the one before is computed with.

Reading and tokenizing release the GIL (Arrow and Rust do the work), so a thread is enough; no process, no pickling.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nanochat.ops.cpu import HELPER

T = TypeVar("T")
EXIT_SECONDS = 10.0  # to wait for the threads when the program ends
_running: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    # A daemon thread that is inside C++ (Arrow, the tokenizer) while the interpreter is taken down aborts the process.
    for stop in list(_running.values()):
        stop.set()
    for thread in list(_running):
        thread.join(EXIT_SECONDS)


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; to a CUDA card through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only from pinned memory does a copy run beside the kernels
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Prefetch(Generic[T]):
    """Iterate over what `make` yields; a daemon thread stays up to `depth` items ahead.

    An exception in the thread is raised where its item would have come. The thread ends at `close`, or when the
    Prefetch is garbage.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int = 2) -> None:
        self._queue: queue.Queue[Future[T]] = queue.Queue(depth)  # each is done: an item, or the error that ends it all
        self._stop = threading.Event()
        self._ended = False
        self._held: Future[T] | None = None  # the end or an error that next_if_ready met: for the next `next`
        # The thread must not hold `self`: one that is dropped could never become garbage.
        self._thread = threading.Thread(target=_work, args=(make, self._queue, self._stop), name=HELPER, daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        _running[self._thread] = self._stop
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        entry = self._held or self._queue.get()
        self._ended = entry.exception() is not None
        return entry.result()  # or raises what the thread has met, StopIteration at the end

    def next_if_ready(self) -> T | None:
        """The next item if it is there already, else None (also at the end, and where an error is to come)."""
        if self._ended or self._held is not None:
            return None
        try:
            entry = self._queue.get_nowait()
        except queue.Empty:
            return None
        if entry.exception() is None:
            return entry.result()
        self._held = entry
        return None

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended = True
        self._stop.set()
        self._thread.join()


class DeviceFeed(Generic[T]):
    """Iterate over (item, its array as a tensor on `device`).

    On a CUDA card there are two buffers: while one batch is computed with, the copy of the next one from pinned memory
    is under way on a stream of its own. Elsewhere the array is simply handed over.
    """

    def __init__(self, source: Prefetch[T], array: Callable[[T], npt.NDArray[np.int64]], device: torch.device) -> None:
        self._source, self._array, self._device = source, array, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_the_way: tuple[T, torch.Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[T, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[T, torch.Tensor]:
        item, tensor = self._on_the_way or self._send(next(self._source))
        self._on_the_way = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)  # the kernels that come now must see the whole copy
            # The allocator only knows the stream that asked for the memory: without this it could hand it to the next
            # copy while kernels of this batch still read it.
            tensor.record_stream(current)
            # Never wait here: a batch that is not made yet would delay the one that is ready.
            following = self._source.next_if_ready()
            if following is not None:
                self._on_the_way = self._send(following)
        return item, tensor

    def _send(self, item: T) -> tuple[T, torch.Tensor]:
        if self._stream is None:
            return item, to_device(self._array(item), self._device)
        with torch.cuda.stream(self._stream):
            return item, to_device(self._array(item), self._device)


def _work(make: Callable[[], Iterator[T]], out: queue.Queue[Future[T]], stop: threading.Event) -> None:
    items: Iterator[T] | None = None
    while not stop.is_set():
        entry: Future[T] = Future()
        try:
            items = make() if items is None else items
            entry.set_result(next(items))
        except BaseException as error:  # StopIteration too
            entry.set_exception(error)
        while not stop.is_set():
            try:
                out.put(entry, timeout=0.1)  # no longer: it may never be taken, and `stop` must be seen
                break
            except queue.Full:
                continue
        if entry.exception() is not None:
            return

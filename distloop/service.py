"""Batches made by the tf.data service, for hosts that cannot feed their devices, in the order of a run without it.

The unit of work is the step: the service shares out step numbers among its workers, each makes what this process needs
of its steps and sends it with the number. The service promises neither order nor that every step comes: what a worker
held when it died is lost. So steps are put in order here, and a step that does not come is made here.
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, final

import grpc
import numpy as np
import tensorflow as tf

from distloop.data import Stream, batches_by_number, endless
from distloop.errors import UsageError
from distloop.pipeline import Batch
from distloop.records import Records
from distloop.say import say

FIRST_SECS = 120  # how long the first step may take to come before the run is refused,
PATIENCE_SECS = 10  # and any other before it is made here
RETRY_SECS = 30  # while the service is silent, how often it is asked anew
WINDOW = 32  # so many later steps come before a step is taken as lost; a wrong guess costs making it twice

PROMISE = "promises no order and loses what a dying worker holds; both are made good here: same order, same numbers"

_ANSWER_SECS = 5
_END = np.iinfo(np.int64).max
_service = tf.data.experimental.service


def check_service(address: str, stream: Stream) -> None:
    """Raise UsageError unless a tf.data service with a worker answers at `address` and can make the batches."""
    base = stream.pipeline.base
    if isinstance(base, tf.data.Dataset):
        raise UsageError(
            "train_data is a tf.data.Dataset, which is read from front to back, but the tf.data service makes steps in "
            "any order; give what is read by index, as load_tfrecords(...) or a dict of arrays, or drop --data_service."
        )
    if not isinstance(base, Records) and any(isinstance(array, np.memmap) for array in base.values()):
        raise UsageError(
            "train_data is decoded and on this machine's disk (on_disk), from where the tf.data service cannot read "
            "it; drop --data_service."
        )
    try:
        workers = _workers(address)
    except grpc.RpcError as error:
        raise UsageError(
            f"data_service is {address}, but no dispatcher of the tf.data service answers there; start "
            "python -m launch.data_service and give the address that it prints."
        ) from error
    if not workers:
        raise UsageError(
            f"the tf.data service at {address} has no worker; wait until one has started, or add some: "
            f"python -m launch.data_service --dispatcher={address}."
        )


def _workers(address: str) -> bytes:
    """Ask the dispatcher for its workers; return a message that is empty if there are none."""
    with grpc.insecure_channel(address) as channel:
        return channel.unary_unary("/tensorflow.data.DispatcherService/GetWorkers")(b"", timeout=_ANSWER_SECS)


@tf.autograph.experimental.do_not_convert
def batches_from_service(
    stream: Stream, context: tf.distribute.InputContext, *, first_step: int, address: str
) -> tf.data.Dataset:
    """Return the elements of `per_replica_batches`, made by the service at `address`. Waits for the first of them.

    Raises UsageError if the service is not there or cannot make it. Later it may fail or end at any time, which costs
    speed only; a line on stderr says so.
    """
    check_service(address, stream)
    first = first_step * (context.num_replicas_in_sync // context.num_input_pipelines)
    by_number = batches_by_number(stream, context)

    def batches(number: int) -> tf.data.Dataset:
        return by_number(tf.data.Dataset.range(number, _END)).with_options(_options())

    element: Any = batches(first).element_spec
    spec = element[1]
    feed = _Feed(batches, address, first)

    def take(number: tf.Tensor) -> list[tf.Tensor]:
        batch = feed.take(int(number))
        return [batch[name] for name in spec]

    def to_batch(number: tf.Tensor) -> Batch:
        tensors = tf.py_function(take, [number], [tensor.dtype for tensor in spec.values()])
        for tensor, known in zip(tensors, spec.values(), strict=True):
            tensor.set_shape(known.shape)
        return dict(zip(spec, tensors, strict=True))

    return endless(tf.data.Dataset.range(first, _END).map(to_batch))


class _Arrivals:
    """What the thread that reads from the service shares with the feed."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(
            2
        )  # `(number, batch)` or an exception; TensorFlow's client holds more
        self.closed = threading.Event()

    def put(self, item: Any) -> None:
        """Wait for a place in the queue, unless closed."""
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                return self.queue.put(item, timeout=1)


def _read(arrivals: _Arrivals, batches: tf.data.Dataset, address: str) -> None:
    """Read from the service until closed or an error. It holds no reference to the feed."""
    # No name for the job: it is this iterator's alone, and a run that is started again starts its own.
    send = _service.distribute(_service.ShardingPolicy.DYNAMIC, f"grpc://{address}", compression=None)
    try:
        for number, batch in batches.apply(send):
            arrivals.put((int(number), batch))
            if arrivals.closed.is_set():
                return
    except Exception as error:  # of any kind: it is told, and what comes next is made here
        arrivals.put(error)


@final
class _Feed:
    """Batches in the order of their numbers, whatever comes from the service and whenever."""

    def __init__(self, batches: Callable[[int], tf.data.Dataset], address: str, first: int) -> None:
        self._batches, self._address = batches, address
        self._early: dict[int, Batch] = {}
        self._silent = False
        self._here: tuple[int, Iterator[Any]] = (-1, iter([]))  # what is made here: the next number, and on from it
        self._wanted = first
        self._ask(first)
        try:
            item = self._arrivals.queue.get(timeout=FIRST_SECS)
        except queue.Empty:
            item = TimeoutError(f"nothing came within {FIRST_SECS} s")
        if isinstance(item, Exception):
            raise UsageError(
                f"the tf.data service at {address} cannot make the batches ({_first_line(item)}); its workers need "
                "the same TensorFlow and the data under the same paths: mend that, or train without --data_service."
            ) from item
        number, batch = item
        self._early[number] = batch

    def _ask(self, number: int) -> None:
        """Start a thread that reads from the service, beginning with batch `number`."""
        self._heard = time.monotonic()
        self._arrivals = _Arrivals()
        weakref.finalize(self, self._arrivals.closed.set)
        threading.Thread(target=_read, args=(self._arrivals, self._batches(number), self._address), daemon=True).start()

    def _ask_anew(self) -> None:
        """Ask again if the service is there again: one whose workers have all died is not heard by those who read."""
        self._heard = time.monotonic()
        with contextlib.suppress(grpc.RpcError):
            if _workers(self._address):
                self._arrivals.closed.set()
                self._ask(self._wanted + WINDOW)  # until it answers, batches are made here

    def take(self, number: int) -> Batch:
        """Return batch `number`; to be called for one after the other."""
        self._wanted = number
        while number not in self._early:
            # What has not come by the time that later ones fill the window was lost with a worker.
            if len(self._early) >= WINDOW or not self._let_one_in():
                return self._make_here(number)
        return self._early.pop(number)

    def _let_one_in(self) -> bool:
        """Wait for something from the service; tell whether something came. Later calls do not wait once none did."""
        try:
            item = self._arrivals.queue.get(block=not self._silent, timeout=PATIENCE_SECS)
        except queue.Empty:
            item = TimeoutError(f"nothing came for {PATIENCE_SECS} s")
        if isinstance(item, Exception):
            if not self._silent:
                self._tell(f"is silent ({_first_line(item)}); this process makes its batches itself until it is back")
            self._silent = True
            if time.monotonic() - self._heard > RETRY_SECS:
                self._ask_anew()
            return False
        self._heard = time.monotonic()
        number, batch = item
        if number >= self._wanted:  # else it was made here
            self._early[number] = batch
            if self._silent:
                self._tell("is back")
            self._silent = False
        return True

    def _make_here(self, number: int) -> Batch:
        next_number, made = self._here
        if next_number != number:
            made = iter(self._batches(number))
        _, batch = next(made)
        self._here = (number + 1, made)
        return batch

    def _tell(self, sentence: str) -> None:
        say(f"the tf.data service at {self._address} {sentence}.")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.autotune.enabled = False  # parallel maps then use all cores, and no thread is left behind
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # Reading by index counts as state for TensorFlow; what a source draws or keeps was looked at when it was made.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return options

"""What a launch of a case measures, with distloop's own steps and loop."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, final

import tensorflow as tf

from benchmarks import bare_steps, facts, feeding, flops, leave_out, peers
from benchmarks.cases import Case
from benchmarks.timing import Call, Called, Timing, warm_up, windows
from distloop import startup
from distloop.cluster import Cluster
from distloop.config import RunConfig
from distloop.data import Stream
from distloop.errors import Stopped
from distloop.lifecycle import Lifecycle
from distloop.loop import train_steps
from distloop.steps import CompiledSteps, compile_steps, separate_seeds
from distloop.storage import as_path

FIRST_LOSSES = 10  # steps whose losses are recorded, so that peers can be seen to do the same
_BARE = ("input", "comm")  # steps that train nothing
_LEFT_OUT = {"nocomm": [leave_out.reduction], "noupdate": [leave_out.reduction, leave_out.update]}


@final
class Stopwatch:
    """Add the seconds since the last lap to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
        self._began = now


def measure(
    case: Case, timing: Timing, config: RunConfig, workers: Cluster, startup_secs: dict[str, float]
) -> dict[str, Any]:
    """Return facts and windows of this worker, as the schema of the records has them. Every worker calls it."""
    watch = Stopwatch(startup_secs)
    life = Lifecycle(workers)
    strategy = startup.start_strategy(config.task, config, workers)
    watch.lap("devices")
    with life.telling(), life.listening() as stop, contextlib.ExitStack() as stack:
        setup = startup.set_up(config.task, config, as_path(config.workdir or ""), workers, *strategy)
        separate_seeds(setup.strategy, setup.state)
        watch.lap("build")
        stream = startup.train_stream(setup)
        watch.lap("data")
        reduced: list[leave_out.Reduced] = []
        call, flops_per_example = stack.enter_context(started(case, setup, stream, stop, reduced))
        watch.lap("trace")
        losses = [call(1).loss]
        watch.lap("first_step")
        if case.mode in ("step", "h2d"):
            losses += [call(1).loss for _ in range(FIRST_LOSSES - 1)]
        agreed = agreed_on(setup.strategy)
        plan = warm_up(call, timing, steps_per_call=config.steps_per_call, agreed=agreed)
        if case.peer != "distloop":  # a call of a peer may be many compiled calls: what it does in between is seldom
            plan = plan._replace(call_steps=plan.call_steps * plan.calls, calls=1)
            call(plan.call_steps)
        step = min(watch.seconds["first_step"], plan.step_secs)
        watch.seconds |= {"compile": watch.seconds["first_step"] - step, "first_step": step}
        agreed(0.0)  # all begin together
        measured = list(windows(call, call_steps=plan.call_steps, calls=plan.calls, count=timing.windows))
        if case.mode == "startup":
            _save_and_restore(setup, watch)
        life.leave_together()
    unsteady = "the windows had not become steady when the warm-up ended"
    return {
        "facts": {
            **facts.of_model(case, setup, stream, reduced),
            "flops_per_example": flops_per_example,
            "startup_s": startup_secs,
            "losses": [] if case.mode in _BARE else [loss if math.isfinite(loss) else None for loss in losses],
            "calls_per_step": 1 / plan.call_steps,
            "call_overhead_s": plan.overhead_secs,
            "warnings": [] if plan.steady else [unsteady],
        },
        "windows": measured,
    }


def _save_and_restore(setup: startup.Setup, watch: Stopwatch) -> None:
    watch.lap("steps")
    setup.checkpointer.save({})
    setup.checkpointer.wait()
    watch.lap("save")
    setup.checkpointer.restore()
    watch.lap("restore")
    del watch.seconds["steps"]


def compiled(
    setup: startup.Setup, stream: Stream, mode: str, stop: tf.Variable, reduced: list[leave_out.Reduced]
) -> CompiledSteps:
    """Trace the steps of a mode; `reduced` gets what they exchange."""
    step_fn = bare_steps.read if mode == "input" else setup.task.train_step
    if mode == "comm":  # what its gradients are like is known once the step of the task is traced
        compiled(setup, stream, "step", stop, reduced)
        step_fn = functools.partial(bare_steps.exchange, reduced[-1].rows)
    with contextlib.ExitStack() as stack:
        for part in _LEFT_OUT.get(mode, []):
            stack.enter_context(part())
        stack.enter_context(leave_out.nothing(reduced))
        return compile_steps(
            setup.strategy, step_fn, setup.state, feeding.dataset(setup, stream, mode), training=True, stop=stop
        )


@contextlib.contextmanager
def started(
    case: Case, setup: startup.Setup, stream: Stream, stop: tf.Variable, reduced: list[leave_out.Reduced]
) -> Iterator[tuple[Call, float | None]]:
    """Yield what runs the steps of a case, distloop's own loop or a peer's, and the FLOPs an example if they count."""
    if case.peer == "distloop":
        steps = compiled(setup, stream, case.mode, stop, reduced)
        trains = case.mode in ("step", "h2d", "startup")
        yield caller(steps, stream), flops.per_example(steps, case.global_batch // case.workers) if trains else None
        return
    with peers.started(case.peer, setup, feeding.for_peers(setup, stream)) as train:

        def call(num_steps: int) -> Called:
            began = time.perf_counter()
            loss = train(num_steps)
            return Called(time.perf_counter() - began, loss=loss)

        yield call, None


def caller(steps: CompiledSteps, stream: Stream) -> Call:
    """Return the function that runs so many steps through `train_steps`, in one call. Raises Stopped if asked to."""
    endless = feeding.without_epochs(stream)
    loops: dict[int, Any] = {}

    def call(num_steps: int) -> Called:
        if num_steps not in loops:
            loops[num_steps] = train_steps(
                steps, endless, start_step=0, total_steps=feeding.ENDLESS // 2**20, stops=(num_steps,)
            )
        progress = next(loops[num_steps])
        if progress.stopping:
            raise Stopped("stopped while measuring, as asked; nothing of this launch is kept.")
        waited = math.nan if progress.input_wait is None else progress.input_wait * progress.seconds
        return Called(progress.seconds, waited, progress.metrics.get("loss", math.nan))

    return call


def agreed_on(strategy: tf.distribute.Strategy) -> Callable[[float], float]:
    """Return the function that makes of each worker's number their mean, the same on all; it waits for all."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return lambda value: value

    @tf.function(autograph=False)
    def mean(value: tf.Tensor) -> tf.Tensor:
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, strategy.run(tf.identity, args=(value,)), axis=None)

    return lambda value: float(mean(tf.constant(value, tf.float64)))

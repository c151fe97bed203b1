"""Interrupts and errors anywhere in a call leave a layer in its old or in its new state."""

import contextlib
import contextvars
import copy
import dis
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from layer_cases import KINDS, everything, trained, twin

import cybn
from cybn import _dispatch, _memory, _runtime, _trials

pytestmark = pytest.mark.row(31)

every_kind = pytest.mark.parametrize("name", KINDS)
FEW = ("BatchNorm2d", "residual", "InstanceNorm2d", "LayerNorm")  # all others together are slow
few_at_first = pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[] if k in FEW else pytest.mark.slow) for k in KINDS]
)
LAYERS = str(Path(cybn.__file__).parent / "layers")
MODULES = str(Path(cybn.__file__).parent / "torch")
WATCHED = (LAYERS, MODULES, _trials.__file__)


def steps_of(kind, rng):
    """Return the calls that change a layer, by name."""
    x, dy = kind.data(rng, 2)
    donor = trained(kind, rng)
    steps = {
        "forward": lambda layer: kind.forward(layer, x),
        "backward": lambda layer: layer.backward(dy),
        "load": lambda layer: layer.load_state_dict(donor.state_dict()),
    }
    if hasattr(donor, "snapshot"):
        snapshot = donor.snapshot()
        steps["restore"] = lambda layer: layer.restore(snapshot)
    return steps


# ---- interrupts --------------------------------------------------------------------------

# CPython checks for signals at the start of a function, after a call, and when a loop jumps back.
LOOKS = ("CALL", "JUMP_BACKWARD")


class Disturber:
    """A trace function that interrupts at the n-th place where CPython checks for signals.

    Only places in layers are counted, because the code that layers call does not know them. A
    call of a Python function is also counted, although CPython only checks inside the function.
    """

    def __init__(self, at):
        self.at, self.places, self.looked = at, 0, {}

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        frame.f_trace_opcodes = True
        if event == "call":
            self.looked[frame] = True
        elif event == "opcode":
            self.places += self.looked.pop(frame, False)
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            self.looked[frame] = name.startswith(LOOKS)
            if self.places == self.at:
                raise KeyboardInterrupt
        return self


@contextlib.contextmanager
def interrupted(at):
    before, disturber = sys.gettrace(), Disturber(at)
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 needs this when tracing begins
    sys.settrace(disturber)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield disturber
    finally:
        sys.settrace(before)


@few_at_first
@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_an_interrupt_at_every_place_where_one_can_come(name, mode, rng, figure):
    kind = KINDS[name]
    layer, interrupts, torn = trained(kind, rng).train(mode), 0, []
    for step, do in steps_of(kind, rng).items():
        before, whole = everything(layer), twin(layer)
        do(whole)
        after = everything(whole)
        for place in range(1, 10**6):
            trial = twin(layer)
            with interrupted(place) as disturber:
                do(trial)
            if disturber.places < place:  # the step went through
                assert everything(trial) == after
                break
            interrupts += 1
            if everything(trial) not in (before, after):
                torn.append((step, place))
        assert place > 3
    figure(31, "places interrupted", interrupts, how="sum")
    figure(31, "states that are neither the old nor the new one", len(torn), how="sum")
    assert not torn


TORN = """
from cybn import LayerNorm

class Torn(LayerNorm):
    def load_state_dict(self, state):
        self.gamma[...] = state["gamma"]
        hash(self)
        self.beta[...] = state["beta"]
"""


def test_the_test_above_can_fail():
    """It detects a layer with a call between its two writes, which can be interrupted halfway."""
    namespace = {}
    exec(compile(TORN, f"{LAYERS}/torn.py", "exec"), namespace)
    seen = set()
    for place in range(1, 30):
        layer = namespace["Torn"](5)
        with interrupted(place):
            layer.load_state_dict({"gamma": 2, "beta": 2})
        seen.add((layer.gamma[0], layer.beta[0]))
    assert seen == {(1, 0), (2, 0), (2, 2)}


def test_no_interrupt_leaves_a_thread_in_a_preview(figure):
    x, left = np.ones((4, 3), np.float32), []

    def interrupt_and_train(bn, place):
        with interrupted(place) as disturber, bn.preview() as same:
            assert same(x).shape == x.shape
        bn(x)
        return disturber.places

    for place in range(1, 10**6):
        bn = cybn.BatchNorm1d(3)
        places = contextvars.copy_context().run(interrupt_and_train, bn, place)
        if bn.num_batches_tracked != 1:
            left.append(place)
        if places < place:
            break
    figure(31, "places interrupted", place - 1, how="sum")
    figure(31, "states that are neither the old nor the new one", len(left), how="sum")
    assert place > 30
    assert not left


def test_previews_are_forgotten(rng):
    """A preview that has ended keeps no layer alive, and the list of previews does not grow."""
    bn, x = cybn.BatchNorm1d(3), np.ones((4, 3), np.float32)

    def work():
        for _ in range(3):
            preview = bn.preview()
            with preview:
                bn(x)
            with pytest.raises(RuntimeError, match="entered before"):
                preview.__enter__()
            assert len(_trials._trials.get()) == 1
            with cybn.BatchNorm1d(3).preview() as other:
                gone = weakref.ref(other)
            del other
            assert gone() is None
        bn(x)
        assert _trials._trials.get() == ()

    contextvars.copy_context().run(work)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm"])
def test_an_alarm_in_a_long_call(name, rng, figure):
    """A signal's handler runs after the kernel; the layer then has its old or its new state."""
    make = {
        "BatchNorm2d": lambda: cybn.BatchNorm2d(6),
        "InstanceNorm2d": lambda: cybn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        "GroupNorm": lambda: cybn.GroupNorm(3, 6),
    }[name]
    layer = make()
    x = rng.standard_normal((16, 6, 120, 120), dtype=np.float32)
    layer(x)
    times = []
    for _ in range(5):  # the minimum, because other processes may run
        whole = twin(layer)
        start = time.perf_counter()
        whole(x)
        whole.backward(x)
        times.append(time.perf_counter() - start)
    seconds = min(times)
    after_forward = twin(layer)
    after_forward(x)
    states = [everything(one) for one in (layer, after_forward, whole)]
    handler, interrupts = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    try:
        for delay in np.linspace(0.05, 1, 8) * seconds:
            trial = twin(layer)
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                trial(x)
                trial.backward(x)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            assert everything(trial) in states
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    figure(31, "alarms in long calls", interrupts, how="sum")
    assert interrupts


def test_a_handler_anywhere_in_the_memory_of_results():
    """A handler that allocates, too, neither waits for the interrupted call nor takes its block."""
    like, handled = np.empty(1 << 18, np.float32), []

    def trace(frame, event, _):
        if frame.f_code.co_filename != _memory.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            sys.settrace(None)
            handled.append(_memory.empty_like(like))
            handled[-1][[0, -1]] = len(handled)
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    for _ in range(3):
        sys.settrace(trace)
        try:
            result = _memory.empty_like(like)
        finally:
            sys.settrace(before)
        result.fill(0)
        assert len(handled) > 20
        for i, array in enumerate(handled, 1):
            assert (array[0], array[-1]) == (i, i)
        handled.clear()
    assert not _memory.blocks._busy


# ---- errors ------------------------------------------------------------------------------


def failing(function, after):
    """Return a function that raises MemoryError before or after it calls `function`."""

    def call(*arguments, **keywords):
        if after:
            function(*arguments, **keywords)
        raise MemoryError("for the test")

    return call


PLACES = [
    (_dispatch, "forward"),
    (_dispatch, "learn"),
    (_dispatch, "inference"),
    (_dispatch, "backward"),
    (_dispatch, "statistics"),
    (_dispatch, "absorb"),
    (_dispatch, "normalize_rows"),
    (_dispatch, "normalize_rows_backward"),
    (np, "empty"),
    (np, "empty_like"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@every_kind
def test_a_failure_of_each_kernel_and_allocation(name, after, rng, monkeypatch, figure):
    kind = KINDS[name]
    layer, failures = trained(kind, rng), 0
    steps = steps_of(kind, rng)
    before = everything(layer)
    for module, place in PLACES:
        with monkeypatch.context() as patch:
            found = getattr(module, place)
            broken = (
                {key: failing(kernel, after) for key, kernel in found.items()}
                if isinstance(found, dict)
                else failing(found, after)
            )
            patch.setattr(module, place, broken)
            for step in ("forward", "backward"):
                trial = twin(layer)
                try:
                    steps[step](trial)
                except MemoryError:
                    failures += 1
                    assert everything(trial) == before, (place, step)
    figure(31, "failed calls", failures, how="sum")
    assert failures >= 2


@every_kind
def test_gradients_that_overflow_the_layer_are_infinite_and_whole(name, rng):
    """float64 data may have gradients too large for float32; no warning interrupts the update."""
    kind = KINDS[name]
    layer = kind.make()
    x, dy = kind.data(rng, 2).astype(np.float64)
    kind.forward(layer, x)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        layer.backward(np.abs(dy) * 1e300 + 1e300)
    for gradient in layer.gradients()[1:]:
        assert np.isinf(gradient).all()
    with pytest.raises(RuntimeError):
        layer.backward(dy)


# ---- PyTorch modules ---------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_pytorch_modules(momentum, rng, figure):
    torch = pytest.importorskip("torch")
    from cybn.torch import BatchNorm2d

    x = torch.from_numpy(rng.standard_normal((4, 6, 3, 5)).astype(np.float32))

    def state(module):
        return [(name, value.numpy().tobytes()) for name, value in module.state_dict().items()]

    module = BatchNorm2d(6, momentum=momentum)
    module(x)
    whole = copy.deepcopy(module)
    whole(x)
    before, after, torn = state(module), state(whole), 0
    for place in range(1, 10**6):
        trial = copy.deepcopy(module)
        with interrupted(place) as disturber:
            trial(x)
        torn += state(trial) not in (before, after)
        if disturber.places < place:
            break
    figure(31, "places interrupted", place - 1, how="sum")
    figure(31, "states that are neither the old nor the new one", torn, how="sum")
    assert place > 20
    assert torn == 0


def test_no_one_is_left_holding_the_lock():
    """The lock is free, although the tests above interrupted calls that held it."""
    from threading import Thread

    got = []

    def take_and_give_back():
        got.append(_runtime.turn.acquire(timeout=5))
        if got[0]:
            _runtime.turn.release()

    thread = Thread(target=take_and_give_back)
    thread.start()
    thread.join()
    assert got == [True]

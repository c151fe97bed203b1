"""Row 30: no call changes the floating-point environment of the caller.

It also has tests of row 9, for functions that lack their own: subnormals are kept everywhere.
"""

import ctypes
import mmap
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from call_cases import BAD, GOOD, error_of, quietly
from cases import FAMILIES, same_bits
from family_cases import group, instance, layer, rms

import cybn
from cybn import _kernels, reference

X86 = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
needs_x86 = pytest.mark.skipif(not X86, reason="MXCSR is a register of x86-64, read on Linux")

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO, ROUND_DOWN = 1 << 15, 1 << 6, 1 << 13
CONTROL = 0xFFC0  # the low six bits are flags of past exceptions


def machine_code(code):
    """Return a function that passes an address in rdi to x86-64 machine code."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    call = function(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    call.page = page  # keeps the code alive as long as the function
    return call


class Registers:
    """Access to MXCSR and the x87 control word of this thread."""

    def __init__(self):
        self._store, self._load = machine_code("0fae1f c3"), machine_code("0fae17 c3")
        self._store_x87 = machine_code("d93f c3")
        self._word = ctypes.c_uint32(0)

    def _read(self, call):
        self._word.value = 0
        call(ctypes.addressof(self._word))
        return self._word.value

    def control(self):
        return self._read(self._store) & CONTROL, self._read(self._store_x87)

    def set_mxcsr(self, value):
        self._word.value = value
        self._load(ctypes.addressof(self._word))


@pytest.fixture(scope="module")
def registers():
    return Registers()


# ---- registers ---------------------------------------------------------------------------


@needs_x86
@pytest.mark.row(30)
@pytest.mark.usefixtures("level")
def test_every_call_leaves_the_registers_as_they_were(registers, figure):
    before = registers.control()
    changed = 0
    for call in [*GOOD, *(partial(error_of, call) for call in BAD)]:
        quietly(call)
        changed += registers.control() != before
    figure(30, "calls that changed MXCSR or x87", changed, how="sum")
    figure(30, "MXCSR", hex(before[0]), how="last")
    assert changed == 0


@needs_x86
@pytest.mark.row(30)
@pytest.mark.parametrize("bits", [FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, ROUND_DOWN])
def test_what_the_caller_has_set_stays_set(registers, bits):
    before, _ = registers.control()
    registers.set_mxcsr(before | bits)
    try:
        for call in GOOD[:20]:
            call()
        assert registers.control()[0] == before | bits
    finally:
        registers.set_mxcsr(before)


@needs_x86
@pytest.mark.row(30)
def test_import(figure):
    """Importing cybn in a new process, which loaded only NumPy before, changes no register."""
    source = Path(__file__).read_text("utf-8")
    start, end = source.index("FLUSH_TO_ZERO,"), source.index("@pytest.fixture")
    code = (
        "import ctypes, mmap\nimport numpy as np\n"
        + source[start:end]
        + "registers = Registers()\nprint(*registers.control(), np.geterr())\n"
        + "import cybn\nprint(*registers.control(), np.geterr())\n"
        + "cybn.batch_norm(np.ones((99, 99, 99), 'f'), num_threads=2)\n"
        + "print(*registers.control(), np.geterr())\n"
    )
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    before, *after = done.stdout.splitlines() or [done.stderr]
    assert after == [before] * 2, done.stderr
    figure(30, "MXCSR before and after import", hex(int(before.split()[0])), how="last")


@pytest.mark.row(30)
def test_no_module_of_ours_sets_the_environment():
    """The modules contain neither gcc's crtfastmath (from -ffast-math) nor C functions for it."""
    modules = list(Path(_kernels.__path__[0]).glob("*.so"))
    assert modules
    for module in modules:
        code = module.read_bytes()
        for name in (b"set_fast_math", b"crtfastmath", b"fesetenv", b"fesetround", b"feenable"):
            assert name not in code, (module.name, name)


# ---- errno, and NumPy's error state ------------------------------------------------------


@pytest.mark.row(30)
@pytest.mark.skipif(sys.platform != "linux", reason="needs __errno_location of glibc or musl")
def test_errno_is_left_alone(rng):
    location = ctypes.CDLL(None).__errno_location
    location.restype = ctypes.c_void_p
    errno = ctypes.c_int.from_address(location())
    small, large = np.ones((4, 3)), rng.standard_normal((300, 300), np.float32)
    extremes = np.clip(large, -3, 3) * np.float32(1e38), large * np.float32(1e-42)
    for x in (small, large, *extremes):
        for activation in (None, "sigmoid", "tanh", "silu"):
            errno.value = 77
            y, m = cybn.batch_norm(x, activation=activation, num_threads=2)
            assert errno.value == 77
            errno.value = 77
            cybn.batch_norm_backward(y, x, m, activation=activation, num_threads=2)
            assert errno.value == 77


@pytest.mark.row(30)
def test_numpy_error_state_stays_and_has_no_say(level):
    """A result may overflow to infinity, but raises nothing, in the call or in the next ufunc."""
    usual = [type(error_of(call)) for call in BAD]
    for mode in ("raise", "ignore"):
        with np.errstate(all=mode, call=print):
            before = np.geterr(), np.geterrcall(), np.getbufsize()
            for call in GOOD:
                call()
                np.add(np.ones(3), 1)
            assert [type(error_of(call)) for call in BAD] == usual
            assert (np.geterr(), np.geterrcall(), np.getbufsize()) == before


# ---- subnormals --------------------------------------------------------------------------

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def subnormals(rng, shape, dtype):
    return (rng.integers(-1000, 1001, shape) * np.finfo(dtype).smallest_subnormal).astype(dtype)


def apart(got, want):
    """Return the largest difference, in units of the smallest subnormal."""
    smallest = np.finfo(got.dtype).smallest_subnormal
    return float(np.abs((got.astype(np.longdouble) - want) / np.longdouble(smallest)).max())


@pytest.mark.row(9)
@each_dtype
@pytest.mark.parametrize("shape", FAMILIES[:5], ids=str)
def test_gradients_of_subnormals(rng, shape, dtype, level, figure):
    """dx is linear in dy, so it is wrong by a few subnormals at most."""
    x, dy = rng.standard_normal(shape).astype(dtype), subnormals(rng, shape, dtype)
    _, m = cybn.batch_norm(x)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m)
    wide = (a.astype(np.longdouble) for a in (dy, x))
    exact, _, sums = reference.batch_norm_backward(*wide, m)
    worst = apart(dx, exact)
    figure(9, "largest error of dx, in smallest subnormals", worst)
    assert worst <= 8
    assert apart(dbeta, sums) <= 1
    assert (dgamma != 0).all()


@pytest.mark.row(9)
@each_dtype
def test_the_family_on_subnormals(rng, dtype, level, figure):
    """With eps = 1, y is x - mean and dx is dy minus its mean, within a few roundings."""
    cases = [layer(9, 33), layer(2, 70001), rms(9, 33), group(2, 3, 4, 9), group(2, 2, 4, 515)]
    for case in [*cases, instance(3, 5, 11), instance(2, 3, 600)]:
        x, dy = subnormals(rng, (2, *case.shape), dtype)
        y, statistics = case.forward(x, eps=1.0)
        rows = case.rows(x).astype(np.longdouble)
        exact = rows - rows.mean(2, keepdims=True) if case.centred else rows
        dx = case.backward(dy, x, statistics, eps=1.0)[0]
        rows = case.rows(dy).astype(np.longdouble)
        exact_dx = rows - rows.mean(2, keepdims=True) if case.centred else rows
        worst = max(apart(case.rows(y), exact), apart(case.rows(dx), exact_dx))
        figure(9, "largest error of the other norms, in smallest subnormals", worst)
        assert worst <= 2


@pytest.mark.row(9)
@each_dtype
def test_activations_of_subnormals(rng, dtype, level):
    x = subnormals(rng, (40, 5), dtype)
    zeros, ones = np.zeros(5), np.ones(5)
    wide = x.astype(np.longdouble)
    for activation, exact in {
        "relu": np.maximum(wide, 0),
        "leaky_relu": np.where(x < 0, wide * dtype(0.01), wide),
        "tanh": wide,
        "silu": wide / 2,
    }.items():
        y = cybn.batch_norm_inference(x, zeros, ones, eps=0, activation=activation)
        assert apart(y, exact) <= 1, activation


@pytest.mark.row(9)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_keep_subnormals(name, level):
    kind = np.dtype(name if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    words = np.arange(1, 0x400 if name == "float16" else 0x80, dtype=np.uint16)
    x = np.concatenate([words, words | 0x8000]).view(kind).reshape(-1, 1)
    assert same_bits(cybn.batch_norm_inference(x, np.zeros(1), np.ones(1), eps=0), x)


@pytest.mark.row(9)
@each_dtype
def test_running_statistics_keep_subnormals(rng, dtype):
    x = np.abs(subnormals(rng, (16, 3), dtype))
    bn = cybn.BatchNorm(3, momentum=0.5, dtype=dtype)
    bn(x)
    assert (bn.running_mean > 0).all()
    assert apart(bn.running_mean, x.astype(np.longdouble).mean(0) / 2) <= 1

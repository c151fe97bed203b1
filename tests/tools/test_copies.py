"""The marks with which copies.py counts the compiled copies of the kernels' loops."""

import shutil
import subprocess
import sys
from pathlib import Path

import copies
import pytest

CODE = """
#define CYTHON_INLINE inline __attribute__((always_inline))
static CYTHON_INLINE int __pyx_fuse_0__pyx_f_4cybn_8_kernels_5loops_add(int __pyx_v_way, int *x) {
  int sum = 0;
  for (int i = 0; i < 3; i++) sum += __pyx_v_way ? x[i] : -x[i];
  return sum;
}
static int __pyx_f_4cybn_8_kernels_5loops_one(void) {
  return 1;
}
int call(int way) {
  int x[] = {1, 2, 3};
  if (way == 1) return __pyx_fuse_0__pyx_f_4cybn_8_kernels_5loops_add(1, x);
  if (way == 2) return __pyx_fuse_0__pyx_f_4cybn_8_kernels_5loops_add(0, x);
  return __pyx_f_4cybn_8_kernels_5loops_one();
}
"""


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("__pyx_fuse_1__pyx_f_4cybn_8_kernels_5loops_sum_run", "sum_run[double]"),
        ("__pyx_f_4cybn_8_kernels_10batch_norm_apply.isra.0", "apply"),
        ("call", "call"),
    ],
)
def test_names(symbol, name):
    assert copies.name_of(symbol) == name


def test_only_functions_with_loops_are_marked():
    assert copies.marked(CODE, "kernel").count("pushsection") == 1


@pytest.mark.skipif(
    shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="needs gcc"
)
def test_the_copy_that_no_call_reaches_is_found(tmp_path):
    """The library runs in its own process, because it writes its marks when the process ends."""
    if subprocess.run(["gcc", "-dumpmachine"], capture_output=True).stdout[:6] != b"x86_64":
        pytest.skip("needs x86-64, whose assembly the marks use")
    source, library = tmp_path / "kernel.c", tmp_path / "kernel.so"
    code = copies.marked(CODE, "kernel")
    source.write_text(code.replace("int call", "int __pyx_call"))
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", source, "-o", library], check=True)
    program = f"import ctypes; assert ctypes.CDLL({str(library)!r}).__pyx_call(2) == -6"
    environment = {"CYBN_COPIES": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    found = set(copies.copies(library, sorted(Path(tmp_path).glob("kernel-*"))))
    assert found == {
        ("__pyx_call", "add[float] way=$1", False),
        ("__pyx_call", "add[float] way=$0", True),
    }

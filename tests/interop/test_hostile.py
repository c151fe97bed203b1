"""Files that are damaged or malicious: loading gives the right arrays or an error.

The error is a TypeError or a ValueError, and nothing has changed. A size that a file declares never
causes a MemoryError, and code in a file never runs.
"""

import ast
import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fold_cases import random_norm
from hostile_cases import Bomb, damaged

import cybn
from cybn import interop

pytestmark = pytest.mark.row(35)

PACKAGE = Path(cybn.__file__).parent
MOST_MEMORY = 64 << 10  # KiB, for reading hostile files of a few KiB


def random_header(dice):
    """Return an npy header, usually well-formed, with extreme values."""
    number = dice.choice([0, 1, 3, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30])
    shape = dice.choice([(number,), (3, number), (number, 0), (), (3,), 3, "(3,)", (3.0,), None])
    descr = dice.choice(
        ["<f4", "<f8", ">f2", "|O", "<U4", "|V4", "<M8[s]", "f4,f4", [("a", "<f4")], "g", "?"]
        + ["S2147483647", "V999999999", "<c16", 3, None, ["<f4"], ""]
        + [{"names": ["a"], "formats": ["O"]}]
    )
    header = {"descr": descr, "fortran_order": dice.choice([False, True, 0, None]), "shape": shape}
    if dice.random() < 0.1:
        header[dice.choice(["more", "shape "])] = 1
    if dice.random() < 0.1:
        del header[dice.choice(list(header))]
    return repr(header)


def npy(text, data):
    text = text.encode()[:60000] + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def random_npz(dice):
    """Return a zip archive whose members or directory make false claims."""
    buffer = io.BytesIO()
    method = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", method) as archive:
        good = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"
        archive.writestr("good.npy", npy(good, b"\0" * 12))
        data = dice.choice([b"", b"\0" * 12, b"\0" * 24, pickle.dumps(Bomb()), b"\0" * 100_000])
        name = dice.choice(["bad.npy", "../bad.npy", "/etc/bad.npy", "bad", "\u00e9.npy", ".npy"])
        archive.writestr(name, npy(random_header(dice), data))
    content = bytearray(buffer.getvalue())
    if dice.random() < 0.5:  # wrong sizes in the central directory
        at = content.rfind(b"PK\1\2")
        size = dice.choice([0, 1, 12, 2**31, 2**32 - 2, 2**32 - 1])
        where = at + dice.choice([20, 24, 42])
        content[where : where + 4] = struct.pack("<I", size)
    if dice.random() < 0.1:  # falsely marked as encrypted
        at = content.rfind(b"PK\1\2")
        content[at + 8] |= 1
    return content


def random_safetensors(dice):
    """Return a header with extreme shapes, offsets and types, duplicate keys, or deep nesting."""
    number = dice.choice([0, 1, 3, -1, 4, 2**31, 2**62, 2**63, 2**64, 1.5, "3", None, True])
    shape = dice.choice([[3], [number], [3, number], [number, number], 3, "3", {}, [[3]]])
    offsets = dice.choice([[0, 12], [0, number], [number, 12], [12, 0], [4, 16], [0], [], "0,12"])
    kind = dice.choice(["F32", "F64", "F16", "BF16", "I64", "O", "pickle", 3, None, "f32"])
    entry = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    if dice.random() < 0.2:
        del entry[dice.choice(list(entry))]
    metadata = dice.choice([{}, {"cybn": "{}"}, {"a": 1}, 3])
    header = json.dumps({"a": entry, "__metadata__": metadata})
    if dice.random() < 0.1:
        header = header[:-1] + f', "a": {json.dumps(entry)}}}'
    if dice.random() < 0.1:
        header = "[" * 100_000
    size = dice.choice([len(header)] * 6 + [0, 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + header.encode() + b"\0" * dice.choice([0, 11, 12, 13, 24])


SETTINGS = {
    "class": ["BatchNorm", "BatchNorm1d", "InstanceNorm1d", "object", 3, None, ["BatchNorm"]],
    "num_features": [3, 0, -3, 2, 3.0, "3", None, 2**40, 10**400, True, [3]],
    "axis": [1, -1, 10**30, "1", None, 1.5],
    "eps": [1e-5, 0, -1, "small", None, float("nan"), float("inf"), 1e400, []],
    "momentum": [0.1, None, 2, -1, "0.1", float("nan"), {}],
    "affine": [True, False, None, [], "no"],
    "track_running_stats": [True, False, None],
    "running_ddof": [0, 1, 2, None, "1"],
    "dtype": ["float32", "float64", "O", "object", "f4,f4", "float16", 3, None, {"a": "f4"}],
    "activation": [None, "relu", "eval", 3, ["relu"], {}],
    "slope": [0.01, float("nan"), "a", None],
    "nan_policy": ["propagate", "skip", "eval", 3, None, []],
    "virtual_batch_size": [None, 4, 0, -1, 1.5, "4"],
    "renorm": [None, {"r_max": 3, "d_max": 5}, {"r_max": 0}, {"a": 1}, 3, [], "Renorm()"],
    "__class__": ["object"],
}


def random_layers(path, dice):
    """Write a file of one layer whose settings are changed at random."""
    bn = cybn.BatchNorm(3)
    settings = {"class": "BatchNorm", "num_features": 3}
    for name in dice.sample(list(SETTINGS), dice.randint(0, 3)):
        settings[name] = dice.choice(SETTINGS[name])
    outer = {"version": 1, "single": False, "layers": {"a": settings}}
    if dice.random() < 0.15:
        outer[dice.choice(list(outer))] = dice.choice([None, 1, 2, [], {}, "a", {"a": None}])
    arrays = {f"a.{key}": value for key, value in bn.state_dict().items()}
    if dice.random() < 0.2:
        del arrays[dice.choice(list(arrays))]
    text = json.dumps(outer)
    if path.suffix == ".npz":
        np.savez(path, **arrays, __cybn__=np.frombuffer(text.encode(), np.uint8))
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path, {"cybn": text})


@pytest.fixture(params=["npz", "safetensors"])
def path(request, tmp_path):
    pytest.importorskip("safetensors")
    return tmp_path / f"state.{request.param}"


def peak():
    """Return the peak memory of this process in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1])


def restart_peak():
    """Reset the recorded peak to the current memory, and return it."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak()


def attempt(path):
    """Return how many of the loaders refuse a file."""
    refused = 0
    for load in (interop.load_arrays, interop.load_layers):
        try:
            found = load(path)
        except ValueError:
            refused += 1
        else:
            for value in found.values() if isinstance(found, dict) else ():
                assert isinstance(value, (np.ndarray, cybn.BatchNorm))
                assert isinstance(value, cybn.BatchNorm) or value.dtype.kind in "biufc"
    return refused


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header")
@pytest.mark.parametrize("way", ["damaged", "made"])
def test_hostile_files(way, path, rng, figure):
    dice = random.Random(f"{way}-{path.suffix}")
    interop.save_layers(path, {"a": random_norm(rng, 3, np.float32), "b": cybn.BatchNorm2d(4)})
    whole, refused, files = path.read_bytes(), 0, 400
    before = restart_peak()
    for _ in range(files):
        if way == "damaged":
            path.write_bytes(damaged(whole, dice))
        else:
            make = random_npz if path.suffix == ".npz" else random_safetensors
            path.write_bytes(make(dice))
        refused += attempt(path)
    grown = peak() - before
    assert grown < MOST_MEMORY, f"{grown} KiB for files of {len(whole)} bytes"
    assert refused > files
    figure(35, "hostile files refused", refused, how="sum")
    figure(35, "most memory for them, KiB", grown)


def test_hostile_settings(path, figure):
    dice, refused = random.Random(6), 0
    for _ in range(200):
        random_layers(path, dice)
        try:
            loaded = interop.load_layers(path)
        except ValueError:
            refused += 1
        else:
            layers = loaded.values() if isinstance(loaded, dict) else [loaded]
            assert all(isinstance(bn, cybn.BatchNorm) for bn in layers)
    assert 50 < refused < 200
    figure(35, "hostile files refused", refused, how="sum")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """A file of 60 KiB would unpack to 1000 times 10 MiB: its members are all the same bytes."""
    header = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10485760,)}", b"")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(header + b"\0" * (10 << 20)) + packer.flush()
    names = [f"{i}.npy".encode() for i in range(1000)]
    size, crc = len(header) + (10 << 20), zlib.crc32(header + b"\0" * (10 << 20))
    fields = (20, 0, 8, 0, 33, crc, len(packed), size)
    local = b"PK\3\4" + struct.pack("<HHHHHIII", *fields) + struct.pack("<HH", len(names[0]), 0)
    directory = b"".join(
        b"PK\1\2"
        + struct.pack("<HHHHHHIII", 20, *fields)
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0)
        + name
        for name in names
    )
    body = local + names[0] + packed
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1000, 1000, len(directory), len(body), 0)
    path = tmp_path / "bomb.npz"
    path.write_bytes(body + directory + end)
    before = restart_peak()
    with pytest.raises(ValueError, match="unpacks to 10485"):
        interop.load_arrays(path)
    assert peak() - before < MOST_MEMORY


# ---- no pickle ---------------------------------------------------------------------------

LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize(
    "path", sorted(p for p in PACKAGE.rglob("*.py") if p.name != "mpi.py"), ids=lambda p: p.name
)
def test_nothing_in_the_package_unpickles_or_runs_text(path):
    """The syntax tree has no pickle module, no allow_pickle other than False, and no np.load.

    mpi.py is left out: ranks of one program run the same code and exchange pickled values, as
    mpi4py does.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & LOADERS
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in LOADERS
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        assert not (isinstance(node.func, ast.Name) and name in RUNNERS), name
        if name == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            assert node.args[0].value.split(".")[0] not in LOADERS
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle":
                assert keyword.value.value is False
            assert keyword.arg != "weights_only" or keyword.value.value is True
        module = getattr(getattr(node.func, "value", None), "id", "")
        assert (module, name) not in {("np", "load"), ("numpy", "load"), ("torch", "load")}


def test_the_bomb_of_these_tests_goes_off():
    with pytest.raises(AssertionError, match="was run"):
        pickle.loads(pickle.dumps(Bomb()))

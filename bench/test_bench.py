"""Every case of `bench.cases`, small calls of cybn.torch, and training steps of whole networks.

A way to run a network is words joined by +: contiguous (otherwise channels-last), convert, fuse,
compile, bfloat16, bare (no norms), and inference (no training). To let glibc keep freed memory, set
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import ExitStack
from copy import deepcopy
from functools import lru_cache, partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import pytest

from .cases import MODES, NETWORKS, Case, every_case, short, small_modules
from .race import Race
from .task import THREADS, Data

CASES = [
    pytest.param(case, id=case.name, marks=[getattr(pytest.mark, m) for m in case.marks])
    for case in every_case()
]
SMALL = {
    f"small-{kind}-{short(s)}{'-last' * last}": (kind, s, last) for kind, s, last in small_modules()
}
FIRST_LOSS = 1e-4  # largest relative difference between the first losses of cybn and PyTorch
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

batch = lru_cache(maxsize=1)(Data)  # consecutive cases of one shape share their arrays


@pytest.mark.parametrize("case", CASES)
def test_case(case: Case, race: Race, request: pytest.FixtureRequest) -> None:
    gc.collect()
    info = {"group": case.group, "case": case.name, "shape": short(case.shape)}
    race.group = case.name
    for task in case.every:
        for peer in request.config.cybn_peers:
            named = peer.everywhere if case.peers is None else peer.name in case.peers
            if peer.name == "cybn" or (named and task not in case.alone):
                race.enter(peer, task, batch(case.shape), info | {"layers": case.layers})
    race.run()


@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, race: Race) -> None:
    """Compare a module of PyTorch with its conversion, and with that for small calls."""
    kind, shape, last = SMALL[name]
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("cybn.torch").convert
    torch.set_num_threads(THREADS)
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(memory_format=form) for _ in range(2))
    options = {"GroupNorm": (8, shape[1]), "InstanceNorm2d": (shape[1], 1e-5, 0.1, True)}
    stock = getattr(torch.nn, kind)(*options.get(kind, shape[1:2]))
    modules = {"PyTorch": stock, "cybn.torch": convert(deepcopy(stock))}
    modules["cybn.torch, kernels"] = convert(deepcopy(stock), small_calls=True)
    race.group = name
    info = {"group": "small", "case": name, "sizes": list(shape), "threads": THREADS}
    info |= {"shape": f"{kind} {short(shape)}{', channels-last' * last}", "nbytes": 4 * prod(shape)}

    def call(module: Any, given: Any) -> Any:
        y = module(given)
        if given.requires_grad:
            y.backward(dy)
            y, given.grad = given.grad, None
        return y

    for mode in MODES:
        training, graph = mode == "training step", mode != "inference"
        given, before = x.clone().requires_grad_(graph), partial(torch.set_grad_enabled, graph)
        before()
        right = call(deepcopy(stock).train(training), given)
        for peer, module in modules.items():
            one = partial(call, deepcopy(module).train(training), given)
            torch.testing.assert_close(one(), right, rtol=1e-3, atol=1e-3)
            info |= {"operation": mode, "work": mode, "least_bytes": (2 + graph) * info["nbytes"]}
            race.add(one, before, peer=peer, **info)
    race.run()
    torch.set_grad_enabled(True)


def step(process: Any, own: list[dict[str, Any]]) -> None:
    """Let a process do a step, and store what it prints."""
    print(file=process.stdin, flush=True)
    own.append(json.loads(process.stdout.readline()))


@pytest.mark.skipif(not find_spec("torchvision"), reason="torchvision is not installed")
@pytest.mark.parametrize("network", NETWORKS)
def test_training(network: str, race: Race, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    sizes = [option("--batch") or NETWORKS[network], 3, *[option("--side")] * 2]
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in option("--ways").split(",")}
    script = Path(__file__).with_name("networks.py")
    command = [sys.executable, "-P", script, network, *map(str, (sizes[0], sizes[-1], THREADS))]
    info = {"group": "training", "case": race.group, "shape": network, "sizes": sizes}
    with ExitStack() as stack:
        for way, own in told.items():
            process = stack.enter_context(subprocess.Popen([*command, way], **PIPES))
            step(process, own)
            race.add(partial(step, process, own), peer=way, work="training step", **info)
        stock = next(iter(told.values()))
        for way, (first,) in told.items():
            apart = abs(first["loss"] / stock[0]["loss"] - 1)
            if apart > FIRST_LOSS and not {"bare", "bfloat16"} & {*way.split("+")}:
                race.errors.append(f"{way}: the first loss differs by {apart:.1g} from PyTorch's")
        race.run()
    for one, own in zip(race.contestants, told.values(), strict=True):
        pairs = zip(own, stock, strict=False)  # of the same steps
        one.info["apart"] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        one.info |= {key: own[-1][key] for key in ("faults", "peak")}
        gains = sorted(a / b for a, b in zip(race.contestants[0].turns, one.turns, strict=True))
        one.info["gains"] = gains[len(gains) // 2], gains[0], gains[-1]

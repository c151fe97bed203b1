"""Every case of `bench.cases`, and training steps of whole networks.

Networks race as stock PyTorch, with cybn.torch, and without batch norm; to see the same where glibc
keeps freed memory, set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .cases import THREADS
from .race import Race

CONTESTANTS = ("PyTorch", "cybn, convert", "cybn, convert, fuse", "no batch norm")
FIRST_LOSS = 1e-4  # how far cybn's and PyTorch's may be apart before anything was learned
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def test_case(field: Race) -> None:
    field.run()


def step(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Let a process do a step, and return what it tells."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    told: dict[str, Any] = json.loads(process.stdout.readline())
    return told


@pytest.mark.parametrize(("network", "batch"), [("ResNet-50", 16), ("MobileNetV2", 32)])
def test_training(network: str, batch: int, race: Race, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch")
    script = Path(__file__).with_name("training.py")
    race.group = f"training-{network}"
    size = 64 if request.config.getoption("--quick") else 224
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with ExitStack() as stack:
        for name, own in told.items():
            words = [script, network, name, *map(str, (batch, size, THREADS))]
            process = subprocess.Popen([sys.executable, "-P", *words], **PIPES)
            stack.enter_context(process)  # ends it, as its lines end
            own.append(step(process))
            race.add(
                lambda process=process, own=own: own.append(step(process)),
                group="training",
                case=race.group,
                peer=name,
                work="training step",
                shape=network,
                operation="training",
                sizes=[batch, 3, size, size],
            )
        first = {name: own[0]["loss"] for name, own in told.items()}
        for name in CONTESTANTS[1:3]:
            if abs(first[name] / first["PyTorch"] - 1) > FIRST_LOSS:
                race.fail(f"{name}: the first loss is {first[name]}, PyTorch's {first['PyTorch']}")
        race.run()
    for runner, own in zip(race.runners, told.values(), strict=True):
        runner.info |= {key: own[-1][key] for key in ("faults", "peak")}
        pairs = zip(own, told["PyTorch"], strict=False)  # of the same steps
        runner.info["apart"] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)

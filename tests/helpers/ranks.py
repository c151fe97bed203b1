"""Start programs of several processes in tests: real ranks, each of which reports its results.

A program is a file whose functions are its cases. The test calls `start`. The program calls
`report` in each rank, which calls the case and writes its result or its error to a file.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import cybn

HELPERS = Path(__file__).resolve().parent
CLONE = Path(cybn.__file__).resolve().parents[1]


def environment():
    """Return the environment of a rank, with one thread and this cybn."""
    paths = [str(CLONE), str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def launchers_of_mpi(mpiexec, ranks, *options):
    """Return the command and environment that start all ranks of an MPI program."""
    return [([mpiexec, *options, "-n", ranks], {})]


def launchers_of_torch(ranks):
    """Return a command and an environment for each process of torch.distributed."""
    return [([], {"RANK": str(rank), "WORLD_SIZE": str(ranks)}) for rank in range(ranks)]


def start(launchers, folder, program, case, *arguments, ranks, within=240):
    """Run a case in real ranks; return their reports, exit codes and the output of the launchers.

    The report of a rank that was killed is None.
    """
    rest = [sys.executable, program, case, folder, ranks, *arguments]
    running = [
        subprocess.Popen(
            [str(part) for part in (*command, *rest)],
            env=environment() | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, extra in launchers
    ]
    try:
        outputs = [process.communicate(timeout=within)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = [_read(folder / f"{rank}.json") for rank in range(ranks)]
    for rank, report in enumerate(found):
        if report is not None and "error" in report:
            raise AssertionError(f"rank {rank} of {ranks}:\n{report['error']}")
    return found, [process.returncode for process in running], "\n".join(outputs)


def every(launchers, folder, program, case, *arguments, ranks, within=240):
    """Return the report of each rank; raise AssertionError if one is missing."""
    found, codes, output = start(
        launchers, folder, program, case, *arguments, ranks=ranks, within=within
    )
    assert None not in found, f"{codes}\n{output}"
    return found


def _read(path):
    return json.loads(path.read_text()) if path.exists() else None


def report(cases, rank):
    """Call the case that the command line names, and write its result to a file."""
    _, case, folder, ranks, *arguments = sys.argv
    try:
        found = cases[case](*arguments)
    except BaseException:
        found = {"error": traceback.format_exc()}
    part = Path(folder, f"{rank}.part")
    part.write_text(json.dumps(found))
    part.rename(part.with_suffix(".json"))
    return found, int(ranks)


def linger(folder, ranks, within):
    """Wait until `ranks` ranks have reported, so that none is killed when another one exits."""
    end = time.monotonic() + within
    while time.monotonic() < end and len(list(Path(folder).glob("*.json"))) < ranks:
        time.sleep(0.05)


def attempt(call):
    """Return the type and the text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]

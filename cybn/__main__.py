"""The command line: ``cybn info``, ``cybn bench``, ``cybn demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, show_config
from ._bench import BenchError
from .demo import DemoError


def at_least_1(text: str) -> int:
    """Convert text to a number of threads."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads; give 1 or more")
    return int(text)


def info(options: argparse.Namespace) -> None:
    """Print versions, instruction levels, OpenMP and the number of threads."""
    show_config()


def demo(options: argparse.Namespace) -> None:
    """Train on the digits, with and without batch normalization."""
    from .demo import run

    run(options.output, seed=options.seed, quick=options.quick)


def bench(options: argparse.Namespace) -> None:
    """Time cybn on this machine against a memory copy, NumPy, and PyTorch if it is installed."""
    from . import _bench

    _bench.run(json_file=options.json, num_threads=options.threads)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="cybn", description="Batch normalization for NumPy arrays on the CPU."
    )
    top.add_argument("--version", action="version", version=f"cybn {__version__}")
    top.set_defaults(command=lambda options: top.print_help())
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    one = commands.add_parser(
        "info", help="print versions, instruction levels, OpenMP, threads; at once"
    )
    one.set_defaults(command=info)

    one = commands.add_parser(
        "bench", help="time cybn against a memory copy, NumPy and PyTorch; under 30 seconds"
    )
    one.add_argument("--threads", type=at_least_1, metavar="N", help="default: all CPUs")
    one.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    one.set_defaults(command=bench)

    one = commands.add_parser(
        "demo",
        help="train small networks on handwritten digits, with and without batch normalization; "
        "half a minute",
    )
    one.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="folder for the results, created if missing; default: the current folder",
    )
    one.add_argument(
        "--seed", type=int, default=0, help="default: 0; the same seed gives the same bits"
    )
    one.add_argument(
        "--quick", action="store_true", help="train for a few steps only: a smoke test of 5 seconds"
    )
    one.set_defaults(command=demo, extra="demo")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Command and options. None means those of the process.

    Returns
    -------
    int
        0, or 1 if an optional package is missing or a command has failed.
    """
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except (BenchError, DemoError) as error:
        print(f"cybn: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if "extra" not in options or (error.name or "").startswith("cybn"):
            raise
        print(f"{error.name} is missing: pip install 'cybn[{options.extra}]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fuzz cybn against its reference: `python tests/tools/fuzz.py --cases 300000 --seed 1`.

Case k of a seed is always the same, so `--only K` runs it again. With `--log FILE` the count is
stored, and a run that was stopped continues from there. Prints cases, failures and the seed.
"""

import argparse
import json
import random
import secrets
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from fuzz_cases import draw
from fuzz_checks import check
from levels import bind

from cybn import _runtime


def case_of(seed, k):
    return draw(random.Random(f"{seed}-{k}"))


def run(seed, numbers, stop_after=20, tell=lambda k: None):
    """Run cases; return how many ran, and (number, case, error) of each that failed."""
    failures, ran = [], 0
    try:
        for k in numbers:
            case = case_of(seed, k)
            try:
                check(case)
            except Exception as error:
                failures.append((k, case, error))
                if len(failures) >= stop_after:
                    return ran + 1, failures
            ran += 1
            tell(ran)
    finally:
        bind(_runtime.level)
    return ran, failures


def report(seed, failures):
    for k, case, error in failures:
        print(f"\nseed {seed} case {k}: {type(error).__name__}: {error}\n  {case}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, help="seed of the cases, random by default")
    parser.add_argument("--only", type=int, help="run only this case, with its traceback")
    parser.add_argument("--log", type=Path, help="keep the count here, and continue from it")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if options.only is not None:
        case = case_of(seed, options.only)
        print(case)
        check(case)
        return
    done = failed = 0
    if options.log and options.log.exists():
        old = json.loads(options.log.read_text("utf-8"))
        if old["seed"] == seed:
            done, failed = old["cases"], old["failures"]
    start = time.perf_counter()
    try:
        from tqdm import tqdm

        bar = tqdm(total=options.cases, initial=done, unit="case", mininterval=5)
    except ImportError:
        bar = None
    while done < options.cases:
        piece = range(done, min(done + 500, options.cases))
        ran, failures = run(seed, piece, stop_after=len(piece) + 1)
        report(seed, failures)
        done, failed = done + ran, failed + len(failures)
        if bar:
            bar.update(ran)
        if options.log:
            text = json.dumps({"seed": seed, "cases": done, "failures": failed})
            options.log.write_text(text, "utf-8")
    seconds = time.perf_counter() - start
    print(f"fuzz: {done} cases, {failed} failures, seed {seed}, {seconds:.0f} s")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    try:
        main()
    except AssertionError:
        traceback.print_exc()
        raise SystemExit(1) from None

"""The developers' bench, on pytest-benchmark, in an environment with ``cybn[bench]``.

    pytest bench --quick                          the main cases; under two minutes
    pytest bench -m bars                          the cases of the speed targets, and their figures
    pytest bench -k "resnet50 and backward"       cases by their names
    pytest bench -k "steps or small"              plain.pyx to the kernels; calls of cybn.torch
    pytest bench -k "training and UNet" --batch 4 --ways channels-last,convert,fuse+compile
    pytest bench --peers pytorch,onednn           some peers only
    pytest bench --benchmark-json=figures.json    keep the figures; the machine is in the file
    python -m bench.report figures.json --pages docs/performance.md docs/performance-tables.md

A peer is a library that is compared with cybn, and a contestant is a call of a peer that does the
task of a case. Its result is checked against `cybn.reference` before it is timed. All contestants
of a case take turns, and the figure of a contestant is the median of its turns. cases.py has the
cases, peers/ a file per peer, bars.py the speed targets, race.py the timing, report.py the tables.
"""

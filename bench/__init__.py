"""The developers' bench, on pytest-benchmark, in an environment with ``cybn[bench]``.

    pytest bench --quick                          the main cases; under two minutes
    pytest bench -m bars                          what the bars need, and each bar with its figure
    pytest bench -k "resnet50 and backward"       what the names say
    pytest bench -k "steps or small"              plain.pyx to the kernels; calls of cybn.torch
    pytest bench -k "training and UNet" --batch 4 --ways channels-last,convert,fuse+compile
    pytest bench --peers pytorch,onednn           some peers only
    pytest bench --benchmark-json=figures.json    keep the figures; the machine is in the file
    python -m bench.report figures.json --pages docs/performance.md docs/performance-tables.md

Each result is checked against `cybn.reference` before it is timed, all contestants of a case take
turns, and the figure is the median of their turns. What is where: cases.py has the cases, peers/ a
file a peer, bars.py the claims, race.py the timing, report.py the tables.
"""

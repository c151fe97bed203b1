"""Statistics over processes with a fake communicator; test_mpi.py uses a real one."""

import numpy as np
import pytest

import cybn


class Others:
    """A communicator that returns given values for the other ranks."""

    def __init__(self, *before):
        self.before = before
        self.sent = []

    def allgather(self, value):
        self.sent.append(value)
        return [*self.before, value]


def test_allreduce_merges_in_the_order_of_the_ranks(rng):
    x = rng.standard_normal((30, 4))
    parts = [cybn.Moments.empty(4).update(part) for part in np.split(x, 3)]
    found = parts[2].allreduce(Others(*parts[:2]))
    assert found == parts[0].merge(parts[1]).merge(parts[2])
    assert found.count == 30


def test_allreduce_of_other_values():
    m = cybn.Moments.empty(2)
    with pytest.raises(TypeError, match="comm is of type int; it must have a method allgather"):
        m.allreduce(3)
    with pytest.raises(TypeError, match="must be Moments"):
        m.merge(cybn.Moments(1, [0, 0], [0, 0])).allreduce(Others(m, "nonsense"))


def test_population_statistics_are_of_all_processes(rng):
    x = rng.standard_normal((20, 3))
    bn = cybn.BatchNorm(3)
    other = cybn.Moments.empty(3).update(x[:8])
    found = cybn.population_statistics(bn, [x[8:]], comm=Others([other]))[bn]
    assert found.count == 20
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)


def test_errors_of_other_processes_are_quoted(rng):
    x, bn = rng.standard_normal((20, 3)), cybn.BatchNorm(3)
    with pytest.raises(RuntimeError, match="rank 0 raised ValueError: no data"):
        cybn.population_statistics(bn, [x], comm=Others("ValueError: no data"))
    with pytest.raises(ValueError, match="2 batch norms ran on rank 0, and 1 here"):
        cybn.population_statistics(bn, [x], comm=Others([None, None]))
    comm = Others()
    with pytest.raises(ValueError, match="no batches"):
        cybn.population_statistics(bn, [], comm=comm)
    assert comm.sent == ["ValueError: batches has no batches"]

"""Statistics of a whole dataset, recorded while the user's own forward function runs."""

from functools import partial

import numpy as np
import pytest
from bounds import column
from layer_cases import snapshot

import cybn
from cybn import population_statistics

C = 3


@pytest.fixture
def data(rng):
    return (rng.standard_normal((50, C, 4)) * column(np.arange(1, C + 1), 3, 1) + 5).astype(float)


def uneven(x, size=16):
    return [x[i : i + size] for i in range(0, len(x), size)]


class Network:
    """Two batch norms around a nonlinear function, and one batch norm that is used twice."""

    def __init__(self):
        self.first, self.second = cybn.BatchNorm(C, dtype=float), cybn.BatchNorm1d(C, dtype=float)
        self.twice = cybn.BatchNorm(C, dtype=float)
        self.second.gamma[:] = 2

    def __call__(self, x):
        hidden = np.tanh(self.second(np.abs(self.first(x))))
        return self.twice(self.twice(hidden) + hidden)


def check(m, x):
    assert m.count == x.size // C
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(m.var(), x.var((0, 2)), rtol=1e-12)


def test_one_layer_exactly_where_averages_are_wrong(data):
    bn, batches = cybn.BatchNorm(C), uneven(data)
    data[:16] += 4  # the batches differ from each other
    m = population_statistics(bn, batches)[bn]
    check(m, data)
    average = np.mean([b.var((0, 2)) for b in batches], axis=0)
    assert (np.abs(average / m.var() - 1) > 0.02).all()
    bn.set_statistics(m)
    np.testing.assert_allclose(bn.running_var, data.var((0, 2), ddof=1), rtol=1e-6)


def test_a_network_by_the_batch(data):
    net, batches = Network(), uneven(data)
    result = population_statistics(net, batches)
    assert list(result) == [net.first, net.second, net.twice]
    check(result[net.first], data)
    plain = partial(cybn.batch_norm, eps=1e-5)
    hidden = [np.abs(plain(b)[0]) for b in batches]
    check(result[net.second], np.concatenate(hidden))
    h = [np.tanh(2 * plain(b)[0]) for b in hidden]
    both = [*h, *(plain(b)[0] + b for b in h)]
    check(result[net.twice], np.concatenate(both))


def test_a_network_by_the_running_statistics(data):
    """If layers are set from first to last, results are right and do not depend on the batches."""
    results = []
    for size in (16, 7, 50):
        net = Network()
        for layer in (net.first, net.second):
            m = population_statistics(net, uneven(data, size), upstream="running")[layer]
            layer.set_statistics(m)
        results.append(np.array([net.first.running_var, net.second.running_var]))
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-12)
    net.first.eval()
    check(m, np.abs(net.first(data)))


@pytest.mark.parametrize("upstream", ["batch", "running"])
@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_nothing_in_the_layers_changes(mode, upstream, data):
    net = Network()
    layers = [net.first, net.second, net.twice]
    for layer in layers:
        getattr(layer, mode)()
    before = [snapshot(layer) for layer in layers]
    population_statistics(net, uneven(data), upstream=upstream)

    def spoilt():
        yield data
        yield data[:, :2]

    with pytest.raises(ValueError, match="num_features"):
        population_statistics(net, spoilt(), upstream=upstream)
    assert [snapshot(layer) for layer in layers] == before
    net.first.train().unfreeze()(data)  # training works as before
    assert net.first.num_batches_tracked == 1


def test_a_frozen_network_still_records(data):
    bn = cybn.BatchNorm(C).freeze()
    check(population_statistics(bn, uneven(data))[bn], data)


@pytest.mark.parametrize("upstream", ["batch", "running"])
@pytest.mark.parametrize("use", [True, False])
def test_switches_hold(use, upstream, data):
    """A layer with use_batch_statistics set still follows it, and is recorded."""
    first, second = cybn.BatchNorm(C, dtype=float), cybn.BatchNorm(C, dtype=float)
    first.use_batch_statistics = use
    first.running_mean = [1.0, 2.0, 3.0]
    batches = uneven(data)
    result = population_statistics([first, np.abs, second], batches, upstream=upstream)
    check(result[first], data)
    by_hand = first.train(mode=not use)  # the switch overrides the mode
    by_hand.update_statistics = False
    check(result[second], np.concatenate([np.abs(by_hand(b)) for b in batches]))


def test_a_list_of_layers(data):
    bn, last = cybn.BatchNorm(C), cybn.BatchNorm(C)
    result = population_statistics([bn, np.abs, last], uneven(data))
    assert list(result) == [bn, last]
    assert result[last].mean.min() > 0.5


def test_batches_are_a_generator_and_progress_sees_them(data):
    bn, seen = cybn.BatchNorm(C), []

    def bar(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    check(population_statistics(bn, iter(uneven(data)), progress=bar)[bn], data)
    assert seen == [16, 16, 16, 2]


def test_ghost_batches_are_recorded_whole(data):
    bn = cybn.BatchNorm(C, virtual_batch_size=4, renorm=cybn.Renorm())
    check(population_statistics(bn, uneven(data))[bn], data)


def test_layers_without_running_statistics_are_left_out(data):
    bn, other = cybn.BatchNorm(C), cybn.BatchNorm(C, track_running_stats=False)
    assert list(population_statistics([other, bn], uneven(data))) == [bn]
    with pytest.raises(ValueError, match="no batch norm that tracks running statistics ran in any"):
        population_statistics(other, uneven(data))


def test_what_it_refuses(data):
    bn = cybn.BatchNorm(C)
    with pytest.raises(ValueError, match="has no batches"):
        population_statistics(bn, [])
    with pytest.raises(TypeError, match="model_or_layers is of type int"):
        population_statistics(3, [data])
    with pytest.raises(TypeError, match="model_or_layers is of type list"):
        population_statistics([bn, 3], [data])
    with pytest.raises(ValueError, match="upstream is 'eval'"):
        population_statistics(bn, [data], upstream="eval")
    with pytest.raises(ValueError, match="one value a channel"):
        population_statistics(bn, [data, data[:1, :, :1]])
    lone = population_statistics(bn, [data, data[:1, :, :1]], upstream="running")[bn]
    assert lone.count == 201


def test_a_preview_inside_is_not_recorded(data):
    """The innermost of nested trials decides, so a preview in the model is not recorded."""
    bn, shown = cybn.BatchNorm(C, dtype=float), cybn.BatchNorm(C, dtype=float)

    def model(x):
        with shown.preview():
            return shown(bn(x))

    assert list(population_statistics(model, uneven(data))) == [bn]
    assert (bn.num_batches_tracked, shown.num_batches_tracked) == (0, 0)


# ---- batches with more than one part, and models of PyTorch ------------------------------------


def test_batches_with_labels(data):
    """A layer or a list of layers gets the first part; a function gets the whole batch."""
    bn = cybn.BatchNorm(C)
    for kind in (tuple, list):
        batches = [kind((b, np.arange(len(b)))) for b in uneven(data)]
        check(population_statistics(bn, batches)[bn], data)
        check(population_statistics([np.abs, bn], batches)[bn], np.abs(data))
        check(population_statistics(lambda batch: bn(batch[0]), batches)[bn], data)
        first = population_statistics(lambda x: bn(x), batches, inputs=lambda batch: batch[0])
        check(first[bn], data)


def test_errors_tell_what_was_passed(data):
    bn = cybn.BatchNorm(C)
    with pytest.raises((TypeError, ValueError)) as caught:
        population_statistics(lambda x: bn(x), [(data, np.arange(50), "a")])
    (note,) = caught.value.__notes__
    assert note == (
        "population_statistics called the model with batch 0, a tuple of (ndarray of shape "
        "(50, 3, 4), ndarray of shape (50,), str); inputs=operator.itemgetter(0) would give it the "
        "first part"
    )
    with pytest.raises(ValueError, match="num_features") as caught:
        population_statistics(bn, [data, (data[:, :2], 1)])
    (note,) = caught.value.__notes__
    assert "batch 1, ndarray of shape (50, 2, 4), of a tuple of (ndarray of shape" in note
    with pytest.raises(TypeError, match="x is object") as caught:
        population_statistics(bn, [{"x": data}])
    assert "batch 0, dict" in caught.value.__notes__[0]


@pytest.fixture
def network():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    first, second = torch.nn.BatchNorm1d(C), torch.nn.BatchNorm1d(C, momentum=None)
    layers = [first, torch.nn.ReLU(), torch.nn.Conv1d(C, C, 1), second]
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(C, track_running_stats=False))


def recorded(network, batches):
    """Return the inputs of both batch norms, computed by hand with statistics of each batch."""
    torch = pytest.importorskip("torch")
    inputs = [[], []]
    with torch.no_grad():
        for batch in batches:
            x = torch.from_numpy(batch)
            inputs[0].append(x)
            x = network[2](torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)))
            inputs[1].append(x)
    return [torch.cat(parts).numpy() for parts in inputs]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_a_model_of_pytorch(mode, ours, network, data):
    torch = pytest.importorskip("torch")
    if ours:
        pytest.importorskip("cybn.torch").convert(network)
    network.train(mode)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batches = uneven(data.astype(np.float32))
    found = population_statistics(network, [(torch.from_numpy(b), 0) for b in batches])
    assert list(found) == [network[0], network[3]]
    for m, x in zip(found.values(), recorded(network, batches), strict=True):
        assert m.count == x.size // C
        np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.var(), x.var((0, 2)), rtol=1e-5)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    for norm in (network[0], network[3]):
        assert (norm.training, norm.track_running_stats) == (mode, True)
        assert not norm._forward_pre_hooks
    with pytest.raises(ValueError, match="with 2 channels on axis 1") as caught:
        population_statistics(network, [torch.zeros(4, 2, 4)])
    assert "Tensor of shape (4, 2, 4)" in caught.value.__notes__[0]
    assert network[0].track_running_stats
    assert network[0].training is mode


def test_a_model_of_pytorch_by_running_statistics(network, data):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(data.astype(np.float32))
    norm = network[0]
    moments = population_statistics(network, [x])[norm]
    norm.running_mean.copy_(torch.tensor(moments.mean))  # as the docstring advises
    norm.running_var.copy_(torch.tensor(moments.var(ddof=1)))
    results = [
        population_statistics(network, torch.split(x, size), upstream="running")[network[3]]
        for size in (16, 50)
    ]
    np.testing.assert_allclose(results[0].mean, results[1].mean, rtol=1e-5)
    half = population_statistics(norm, [x.half(), x[:0].half()])[norm]
    np.testing.assert_allclose(half.mean, moments.mean, rtol=1e-3)

"""Synchronized batch norms of PyTorch in real gloo processes, which run `torch_program.py`."""

from pathlib import Path

import pytest
from ranks import every, launchers_of_torch, start

torch = pytest.importorskip("torch", reason="needs the extra torch: pip install 'cybn[torch]'")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

PROGRAM = Path(__file__).with_name("torch_program.py")


def run(folder, case, *arguments, ranks):
    return every(
        launchers_of_torch(ranks), folder, PROGRAM, case, *arguments, ranks=ranks, within=240
    )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_resnet_under_ddp_is_that_of_one_process(tmp_path, ranks, channels_last):
    """Three steps run in float64; one process has one image, and one of three has none."""
    for report in run(tmp_path, "ddp", channels_last, ranks=ranks):
        assert max(report.values()) < 1e-10, report


def test_a_module_alone(tmp_path):
    for report in run(tmp_path, "module", ranks=3):
        assert report["float32"] < 2e-5
        assert report["bfloat16"] < 0.3  # gradients of weights are sums of rounded dy


@pytest.mark.row(39)
def test_bad_input_in_one_process_raises_in_all(tmp_path):
    reports = run(tmp_path, "bad_input", ranks=2)
    kinds = {"channels": "ValueError", "rank": "ValueError", "dtype": "TypeError"}
    kinds["changed"] = "RuntimeError"  # raised by autograd, which detects the change
    for name, kind in kinds.items():
        assert reports[1][name][0] == kind, reports[1][name]
        assert reports[0][name][0] == "RuntimeError"
        assert reports[0][name][1].startswith(f"rank 1 raised {kind}: ")
    for report in reports:
        assert report["few"][0] == "ValueError"
        assert "outside torch.jit" in report["trace"][1]
        assert report["one graph"][0] == "Unsupported"  # fullgraph=True allows no graph break
        assert report["number"][0] == "ValueError"
        assert "channels" in report["number"][1]


@pytest.mark.row(39)
def test_a_killed_process_is_an_error_in_the_others(tmp_path):
    reports, codes, _ = start(launchers_of_torch(3), tmp_path, PROGRAM, "killed", ranks=3)
    assert codes[1] == -9
    for report in (reports[0], reports[2]):
        assert report["raised"][0] != "nothing"
        assert report["seconds"] < 70  # the group waits 60 s


def test_the_contract_is_that_of_pytorch(tmp_path):
    for report in run(tmp_path, "contract", ranks=3):
        assert report["extra"].startswith("SyncBatchNorm(6, eps=1e-05, momentum=0.1")


def test_without_a_process_group_it_is_a_batch_norm():
    import cybn.torch

    x = torch.randn(5, 4, 3)
    bn, plain = cybn.torch.SyncBatchNorm(4), cybn.torch.BatchNorm1d(4)
    assert torch.equal(bn(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(bn.buffers(), plain.buffers(), strict=True))


def test_convert_makes_and_reverts_it():
    import cybn.torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    before = list(model.state_dict())
    cybn.torch.convert(model, sync=True)
    assert type(model[1]) is cybn.torch.SyncBatchNorm
    assert model[1].process_group is None
    assert list(model.state_dict()) == before
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)
    cybn.torch.revert(model)
    assert type(model[1]) is torch.nn.BatchNorm2d

import pytest

from forgather_fn.diagnostics.flops import flops_per_token, peak_flops


def test_operations_are_those_of_the_paper():
    # Table 21 and appendix B of PaLM: 540 B parameters, 118 layers, 48 heads of 256, sequences of 2048.
    found = flops_per_token(540_350_000_000, layers=118, heads=48, head_size=256, context=2048)
    assert found == 6 * 540_350_000_000 + 12 * 118 * 48 * 256 * 2048
    # At 238.3 thousand tokens per second on 6144 chips of 275 teraflops, 46.2 % with attention and 45.7 % without.
    assert 238.3e3 * found / (6144 * 275e12) == pytest.approx(0.462, abs=1e-3)
    assert 238.3e3 * flops_per_token(540_350_000_000) / (6144 * 275e12) == pytest.approx(0.457, abs=1e-3)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"parameters": 0}, "cannot be negative"),
        ({"parameters": 5, "layers": -1}, "cannot be negative"),
        ({"parameters": 5, "layers": 2, "heads": 2}, "missing: head_size, context"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        flops_per_token(**counts)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_peaks_of_devices_by_their_names(device, teraflops):
    assert peak_flops(device) == teraflops * 1e12


@pytest.mark.parametrize("device", ["cpu", "NVIDIA GeForce RTX 9999", "NVIDIA A1000", "Quadro T400"])
def test_a_device_that_is_not_known_is_refused(device):
    with pytest.raises(ValueError, match=r"is not known; give it .* Known are A10G, A100"):
        peak_flops(device)

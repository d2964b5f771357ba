"""What training says of its device, without one."""

from __future__ import annotations

import pytest
import torch

from deepspec.train.meter import Meter, peak_of


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("Some laptop-cpu", torch.float32, None),
        ("NVIDIA T4", torch.float16, None),
    ],
)
def test_a_device_is_known_by_its_own_name(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_of(name, dtype) == peak


def test_products_of_one_step_are_counted_backwards_too() -> None:
    meter = Meter(torch.device("cpu"), torch.float32, world=2)
    meter.counts, meter.peak = True, 1e12
    x, weight = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    with meter.counting(False, 10):
        (x @ weight).sum().backward()
    assert meter.read(1e9).keys() == {"memory_gb"}
    for _ in range(2):  # the second is not counted
        with meter.counting(True, 10):
            (x @ weight).sum().backward()
    # 2 · 5·7·3 forwards and as many for the weight's gradient, for 5 of the 10 tokens of two processes.
    assert meter.per_token == 2 * (2 * 5 * 7 * 3) / 5
    found = meter.read(1e9)
    assert found["tflops"] == pytest.approx(84 * 1e9 / 2 / 1e12)
    assert found["mfu"] == pytest.approx(0.042)
    assert 0 < found["memory_gb"] < 1000

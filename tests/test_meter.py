"""What training says of its device, without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec.cost.machines import machine_called
from deepspec.maths.losses import _add_product
from deepspec.train.meter import Meter, _Products


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("Some laptop-cpu", None),
    ],
)
def test_a_device_is_known_by_its_own_name_and_not_by_that_of_a_variant(name: str, row: str | None) -> None:
    found = machine_called(name)
    assert (found and found.name) == row


class _Card(TorchDispatchMode):
    """A card on which products are done at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["out"] if func._overloadpacket is torch.ops.aten.addmm else func(*args, **kwargs)


def counted(out: Tensor, left: Tensor, right: Tensor) -> float:
    with _Products() as products:
        _add_product(out, left, right)
    return products.flops


def test_a_sum_of_products_is_counted_on_an_accelerator_and_in_place() -> None:
    """torch's counter stops at the first and leaves the second out."""
    assert counted(torch.zeros(2, 3), torch.randn(2, 5), torch.randn(5, 3)) == 2 * 2 * 5 * 3
    with FakeTensorMode(), _Card():
        shapes = (((2, 3), torch.float32), ((2, 5), torch.bfloat16), ((5, 3), torch.bfloat16))
        there = [torch.empty(shape, device="cuda", dtype=dtype) for shape, dtype in shapes]
        assert counted(*there) == 2 * 2 * 5 * 3


def test_counting_changes_no_bit_of_a_gradient() -> None:
    """Operations that are taken apart round in between."""
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    plain = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)[0]
    with _Products():
        counted = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)[0]
    assert torch.equal(plain, counted)


def test_products_of_one_step_are_counted_backwards_too() -> None:
    meter = Meter(torch.device("cpu"), "float32", world=2)
    meter.counts, meter.peak = True, 1e12
    x, weight = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    with meter.counting(False, 10):
        (x @ weight).sum().backward()
    assert meter.read(1e9, 1.0).keys() == {"memory_gb", "features_share"}
    for _ in range(2):  # the second is not counted
        with meter.counting(True, 10):
            (x @ weight).sum().backward()
    # 2 · 5·7·3 forwards and as many for the weight's gradient, for 5 of the 10 tokens of two processes.
    assert meter.per_token == 2 * (2 * 5 * 7 * 3) / 5
    found = meter.read(1e9, 2.0)
    assert found["tflops"] == pytest.approx(84 * 1e9 / 2 / 1e12)
    assert found["mfu"] == pytest.approx(0.042)
    assert 0 < found["memory_gb"] < 1000


def test_waiting_for_features_is_a_share_of_the_steps_since_the_last_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And counted where the source fails, too."""
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("deepspec.train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(torch.device("cpu"), "float32", world=1, seconds=100.0)
    source: Any = meter.timed(lambda rows, width: rows[width])
    assert source(["a"], 0) == "a" and source(["a", "b"], 1) == "b"
    assert meter.read(1.0, 110.0)["features_share"] == pytest.approx(0.5)
    with pytest.raises(IndexError):
        source([], 0)
    assert meter.read(1.0, 112.0)["features_share"] == pytest.approx(0.5)

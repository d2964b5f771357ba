"""What the host decides goes to an accelerator without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on a device. The copy from the host's memory is queued, from pinned pages: the host
    continues while it runs. Values that are there already stay as they are."""
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

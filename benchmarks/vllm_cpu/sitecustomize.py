"""On PYTHONPATH of a vLLM without a GPU: Triton's own interpreter runs the kernels of vLLM's V2 runner, which
DSpark needs. Slow (some tokens per second), and good for counts only. Set TRITON_INTERPRET=1 as well."""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch
    import triton.backends
    from triton.runtime import driver

    class Processor:
        """A driver that is always there and has one device; the interpreter asks it for nothing more."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> object:
            return torch.cpu

        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=Processor)
    driver.set_active(Processor())

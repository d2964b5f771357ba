"""On PYTHONPATH of a vLLM without a GPU, for DSpark and DFlash, if TRITON_INTERPRET=1. It mends two things:

- vLLM's V2 runner, which these drafts need, needs Triton, which does not run on a CPU: Triton's own
  interpreter runs its kernels. This is slow (some tokens per second), and good for counts only.
- vLLM's `rms_norm` on the CPU is given one weight for each layer, and uses the first for all (0.32.0): all
  layers of a draft then norm the context's keys with the first layer's weight, so that fewer tokens are
  accepted.
"""

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

OPERATIONS = "vllm._custom_ops"


def run_kernels_in_the_interpreter() -> None:
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


class NormPerLayer(MetaPathFinder):
    """Replaces `rms_norm` once vLLM's operations are imported. This file must not import them itself, because
    every Python process reads it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != OPERATIONS:
            return None
        sys.meta_path.remove(self)
        found = find_spec(name)
        if found is not None and found.loader is not None:
            mend_norm(found.loader)
        return found


def mend_norm(loader: Loader) -> None:
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        one = module.rms_norm

        def rms_norm(out, input, weight, epsilon):  # type: ignore[no-untyped-def]
            if weight is None or weight.dim() == 1:
                return one(out, input, weight, epsilon)
            for layer in range(len(weight)):
                one(out[layer], input[layer], weight[layer], epsilon)

        module.rms_norm = rms_norm

    loader.exec_module = exec_module  # type: ignore[method-assign]


if os.environ.get("TRITON_INTERPRET") == "1":
    run_kernels_in_the_interpreter()
    sys.meta_path.insert(0, NormPerLayer())

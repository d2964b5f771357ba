"""A CUDA device that is not there: tensors without numbers, and an account of what a GPU would do with them.

Operators on the device run on shapes alone (torch's `FakeTensorMode`), those on the host run for real. A mix
of both raises, as on a GPU. What an operator reads and writes, its FLOPs, the memory that lives and the
moments at which the host would wait for the device are written down, each with the line of code that asked
for it.

A build of torch without CUDA has no device guard and no hooks for it, which indexing and autograd ask for.
`pretend_cuda`, called before torch is imported, compiles some that do nothing (g++, a few seconds, kept).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BRIDGE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device; using c10::DeviceIndex; using c10::Stream;
static const Device card(c10::kCUDA, 0);
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return card; }
  Device exchangeDevice(Device) const override { return card; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, card); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
"""


def pretend_cuda(folder: Path) -> None:
    """Register the hooks and the guard, compiled into `folder`. Raises RuntimeError without a compiler."""
    assert "torch" not in sys.modules, "torch looks its hooks up once, when it is imported"
    found = find_spec("torch")
    assert found is not None and found.submodule_search_locations
    home = Path(found.submodule_search_locations[0])
    version = (home / "version.py").read_text()
    library = folder / f"cuda-{hashlib.sha256((BRIDGE + version).encode()).hexdigest()[:12]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}.so")
        command = f"g++ -std=c++20 -shared -fPIC -x c++ - -o {own} -I{home}/include -L{home}/lib"
        try:
            subprocess.run(
                [*command.split(), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"],
                input=BRIDGE,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"g++ cannot compile the pretended CUDA: {error}") from error
        own.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import torch

    class NoGrad(torch.no_grad):
        """Stands for `torch.inference_mode`, under which no operator of a tensor without numbers is found."""

        def __new__(cls, mode: Any = True) -> Any:
            return torch.no_grad()(mode) if callable(mode) else super().__new__(cls)

        def __init__(self, mode: Any = True) -> None:
            super().__init__()

    torch.inference_mode = NoGrad


@dataclass(frozen=True)
class Card:
    """What a card reaches: operations per second on bfloat16 and on float32, and bytes per second."""

    name: str
    narrow: float
    wide: float
    bandwidth: float


H200 = Card("H200", 790e12, 50e12, 4.3e12)
"""Reached, not peak: 790 of 989 TFLOP/s, 4.3 of 4.8 TB/s, float32 without TF32."""


SAVED = object()
"""Stands for an argument that is kept for the backward pass."""


@contextmanager
def traced(card: Card) -> Iterator[Any]:
    """A `Trace` of everything that runs inside, on a device that is called "cuda"."""
    import torch
    import torch.nn.functional as F
    import transformers.masking_utils as masks
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    from deepspec.maths.fused import compiling

    aten, fake = torch.ops.aten, FakeTensorMode(allow_non_fake_inputs=True)
    asks = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
    free = {"device", "detach", "lift_fresh", "_unsafe_view"} | {
        f"{kind}empty{how}" for kind in ("", "new_") for how in ("", "_like", "_strided")
    }

    class Trace(TorchDispatchMode):
        """seconds, flops, bytes by kind of kernel; waits by line; mismatches; live and peak memory."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: Counter[str] = Counter()
            self.flops: Counter[str] = Counter()
            self.bytes: Counter[str] = Counter()
            self.lines: Counter[str] = Counter()
            self.waits: Counter[str] = Counter()
            self.kernels = self.live = self.peak = 0
            self.phase = ""
            self.masks = False
            self.held: dict[int, tuple[Any, int, str]] = {}
            self.at_peak: Counter[str] = Counter()
            self.pinned: set[int] = set()
            self.one_kernel: Kernel | None = None

        def forget(self) -> None:
            """Start counting again; what lives is the new peak."""
            for counter in (self.seconds, self.flops, self.bytes, self.lines, self.waits):
                counter.clear()
            self.kernels, self.peak = 0, self.live

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            there = any(isinstance(x, FakeTensor) for x in given)
            to = kwargs.get("device")
            if not there and (to is None or torch.device(to).type != "cuda"):
                return func(*args, **kwargs)
            name = func._overloadpacket.__name__
            self.check_wait(name, given, to, kwargs)
            if name in asks:
                return self.answer(name, given[0])
            if name == "_to_copy" and torch.device(to or "cuda").type == "cpu":
                copy = torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
                if kwargs.get("non_blocking"):  # torch then takes pinned pages
                    self.pinned.add(copy.untyped_storage().data_ptr())
                return copy
            with fake:
                if name == "_to_copy" and not there:
                    dtype = kwargs.get("dtype") or given[0].dtype
                    out = torch.empty(given[0].shape, dtype=dtype, device="cuda")
                else:
                    out = func(*args, **kwargs)
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            if self.one_kernel is not None:
                if made:
                    self.one_kernel.see(func, given, kwargs.get("out"), made)
                return out
            for tensor in made:
                self.hold(tensor, name)
            if not func.is_view and name not in free:
                self.account(func, name, args, kwargs, out)
            return out

        def check_wait(self, name: str, given: list[Any], to: Any, kwargs: dict[str, Any]) -> None:
            """Write down where the host waits: it asks for a number, or copies without pinned pages."""
            on_host = [x for x in given if not isinstance(x, FakeTensor)]
            what = ""
            if name in asks:
                what = name
            elif name == "_to_copy" and to is not None and torch.device(to).type == "cpu":
                what = "" if kwargs.get("non_blocking") else "copy to the host"
            elif name in ("_to_copy", "copy_") and on_host:
                pinned = on_host[0].untyped_storage().data_ptr() in self.pinned
                quick = kwargs.get("non_blocking") and pinned
                what = "" if quick else "copy of pageable memory"
            elif name in ("index", "index_put", "index_put_") and any(x.dim() for x in on_host):
                what = "index on the host"
            elif name in ("index", "index_put", "index_put_"):
                what = "boolean index" if any(x.dtype == torch.bool for x in given[1:]) else ""
            if what:
                self.waits[f"{what}: {self.phase}, {line()}"] += 1

        def answer(self, name: str, of: Any) -> Any:
            if name == "_local_scalar_dense":
                return 1.0 if of.dtype.is_floating_point else (of.dtype != torch.bool and 1)
            if name == "equal" or name == "is_nonzero":
                return False
            raise NotImplementedError(f"{name} asks the device for {list(of.shape)} numbers at {line()}")

        def hold(self, tensor: Any, name: str) -> None:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if tensor.device.type != "cuda" or key in self.held:
                return

            def gone(_: Any) -> None:
                self.live -= self.held.pop(key)[1]

            about = f"{name} {list(tensor.shape)} {tensor.dtype} {self.phase} {line()}"
            self.held[key] = (weakref.ref(storage, gone), size, about)
            self.live += size
            if self.live > self.peak:
                self.peak = self.live
                if self.live > 1.002 * sum(self.at_peak.values()):
                    self.at_peak = Counter()
                    for _, held, text in self.held.values():
                        self.at_peak[text] += held

        def account(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
            reads = tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"}))
            reads = [x for x in reads if isinstance(x, torch.Tensor)]
            writes = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            if name in ("copy_", "fill_", "zero_"):
                reads = reads[1:]
            if name in ("embedding", "index", "index_select", "gather"):
                moved = 2 * sum(map(size, writes))
            elif name in ("scatter_add_", "index_put_", "index_copy_", "index_fill", "scatter_"):
                moved = 3 * size(reads[-1])
            else:
                moved = sum({id(x): size(x) for x in [*reads, *writes]}.values())
            flops, packet = 0, func._overloadpacket
            if packet in flop_registry:
                shaped = [x for x in args if isinstance(x, torch.Tensor)]
                flops = flop_registry[packet](*shaped, out_val=out)
            attention = "attention" in name
            if attention and any(x is True for x in args):
                flops //= 2  # a causal kernel skips what lies above the diagonal
            # The last one is a factor: the first may be what the product is added to.
            wide = bool(flops) and not attention and reads[-1].dtype == torch.float32
            took = max(moved / card.bandwidth, flops / (card.wide if wide else card.narrow))
            kind = "attention" if attention else "products" if flops else "passes"
            self.put_down(f"{name} {line()}", kind, moved, flops, took)

        def put_down(self, what: str, kind: str, moved: int, flops: int, took: float) -> None:
            """One kernel in the accounts."""
            kind = f"{self.phase}: {kind}"
            self.kernels += 1
            self.seconds[kind] += took
            self.flops[kind] += flops
            self.bytes[kind] += moved
            self.lines[f"{self.phase}: {what}"] += took

    def size(x: Any) -> int:
        """Bytes that are really there: an expanded dimension is read once."""
        count = x.element_size()
        for stride, length in zip(x.stride(), x.shape, strict=True):
            count *= length if stride else 1
        return int(count)

    class Kernel:
        """What a compiler's one kernel moves: a wide tensor from outside is read once, and again after each
        sum over its rows that has to be complete before more of it can be done; results are written once."""

        def __init__(self, given: list[Any]) -> None:
            self.sizes: Counter[int] = Counter()
            for x in {id(x): x for x in given}.values():
                self.sizes[key(x)] += size(x)
            self.state = {k: (0, frozenset([k])) for k in self.sizes}  # storage -> (sums before it, sources)
            self.reads: set[tuple[int, int]] = set()
            self.written: dict[int, Any] = {}
            self.alive: list[Any] = []

        def see(self, func: Any, given: list[Any], target: Any, made: list[Any]) -> None:
            name = func._overloadpacket.__name__
            known = [(x, *self.state.get(key(x), (0, frozenset()))) for x in given if x is not target]
            level = max((at for _, at, _ in known), default=0)
            sources = frozenset().union(*(of for _, _, of in known))
            if func.is_view:
                level, sources = known[0][1:]
            elif name == "gather":
                sources = frozenset()  # single numbers
            elif name == "index_select":  # as many rows as are asked for, from the memory
                sources = frozenset([key(made[0])])
                self.sizes[key(made[0])] = size(made[0])
            elif "softmax" in name or 8 * most(made) < most(given):
                self.reads |= {(source, level) for source in sources}
                level, sources = level + 1, sources if "softmax" in name else frozenset()
            self.alive += made
            for x in made:
                self.state[key(x)] = level, sources
                if key(x) in self.sizes and not func.is_view:
                    self.written[key(x)] = x

        def moved(self, out: list[Any]) -> int:
            out = [*out, *self.written.values()]
            for x in out:
                level, sources = self.state.get(key(x), (0, frozenset()))
                self.reads |= {(source, level) for source in sources}
            return sum(self.sizes[source] for source, _ in self.reads) + sum(map(size, out))

    def most(tensors: list[Any]) -> int:
        return max((x.numel() for x in tensors), default=0)

    def key(x: Any) -> int:
        return int(x.untyped_storage()._cdata)

    def as_one(name: str, function: Any, given: list[Any]) -> Any:
        """The function's result, put down as one kernel."""
        trace.one_kernel = kernel = Kernel(given)
        try:
            found = function()
        finally:
            trace.one_kernel = None
        out = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        moved = kernel.moved(out)
        for x in out:
            trace.hold(x, name)
        trace.put_down(f"{name} {line()}", "passes", moved, 0, moved / card.bandwidth)
        return found

    def blank(x: Any) -> Any:
        """Makes a tensor like x, whose numbers nobody reads."""
        return partial(torch.empty, x.shape, dtype=x.dtype, device="cuda")

    def kept_inputs(function: Any, args: Any, wanted: Any) -> set[int]:
        """Storages of the inputs that the gradient is computed from: those that autograd keeps, or all of
        them if it also keeps what is between."""
        inputs, saved = {key(x) for x in args if isinstance(x, torch.Tensor)}, set()
        own = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        trace.one_kernel = Kernel([])  # is in no account
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add(key(x)) or x, lambda x: x),
        ):
            for x, want in zip(own, wanted, strict=True):
                if want:
                    x.requires_grad_()
            function(*own)
        trace.one_kernel = None
        return saved if saved <= inputs else inputs

    def compiled(function: Any, **_: Any) -> Any:
        """`torch.compile` for functions of tensors that are one kernel, and one for the gradient, which
        computes everything from the inputs again."""

        class Compiled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                kept = kept_inputs(function, args, ctx.needs_input_grad)
                ctx.save_for_backward(*(x for x in tensors if key(x) in kept))
                ctx.args = [
                    x if not isinstance(x, torch.Tensor) else SAVED if key(x) in kept else blank(x)
                    for x in args
                ]
                return as_one(function.__name__, lambda: function(*args), tensors)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                saved, wanted = iter(ctx.saved_tensors), [i for i, w in enumerate(ctx.needs_input_grad) if w]

                def again() -> Any:
                    own = [
                        next(saved).detach() if x is SAVED else x() if isinstance(x, partial) else x
                        for x in ctx.args
                    ]
                    with torch.enable_grad():
                        for i in wanted:
                            own[i].requires_grad_()
                        return torch.autograd.grad(function(*own), [own[i] for i in wanted], gradients)

                found = as_one(f"{function.__name__} backward", again, [*ctx.saved_tensors, *gradients])
                return tuple(found[wanted.index(i)] if i in wanted else None for i in range(len(ctx.args)))

        def run(*args: Any) -> Any:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                return Compiled.apply(*args)
            return as_one(function.__name__, lambda: function(*args), tensors)

        return run

    class Norm(torch.autograd.Function):
        """`F.rms_norm`, which is one kernel on CUDA: it keeps its input, and one number of each row."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, weight, _ = ctx.saved_tensors
            return x + gradient, None if weight is None else torch.zeros_like(weight)

    class Kernels(TorchFunctionMode):
        """What CUDA would choose where a CPU's build of torch would choose something else."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.pin_memory:
                if args[0].untyped_storage().data_ptr() in trace.pinned:
                    return args[0]
                trace.pinned.add((copy := args[0].clone()).untyped_storage().data_ptr())
                return copy
            if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
                return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to("cuda")
            on_card = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
            if on_card and func is F.rms_norm:
                return Norm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"))
            if on_card and func is F.scaled_dot_product_attention:
                q, k, v, mask = (*args, kwargs.get("attn_mask"))[:4]
                causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
                if mask is not None:
                    assert trace.masks, "attention with a mask"
                    mask = mask.expand(*q.shape[:3], k.shape[2])
                    kernel = aten._scaled_dot_product_efficient_attention
                    return kernel(q, k, v, mask, False, 0.0, causal, scale=scale)[0]
                return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
            return func(*args, **kwargs)

    def tolist(of: Any) -> Any:
        """One copy, where a tensor without numbers would be asked for each of them."""
        trace.waits[f"tolist: {trace.phase}, {line()}"] += 1
        return torch.ones(of.shape, dtype=of.dtype).tolist()

    trace = Trace()
    with ExitStack() as stack:
        stack.callback(setattr, FakeTensor, "tolist", FakeTensor.tolist)
        FakeTensor.tolist = tolist
        # transformers takes a tensor without numbers for an export, and would build a mask.
        for module, name in ((masks, "is_tracing"), (torch.cuda, "_lazy_init")):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, lambda *_: False)
        stack.callback(setattr, torch, "compile", torch.compile)
        torch.compile = compiled
        stack.enter_context(compiling(True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Kernels())
        stack.enter_context(trace)
        yield trace


def line() -> str:
    """The innermost line of deepspec, or else of transformers, that led here."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/deepspec/" in name:
            return f"{name.rpartition('/deepspec/')[2]}:{frame.f_lineno}"
        if not other and "/transformers/" in name:
            other = f"{name.rpartition('/transformers/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "autograd"

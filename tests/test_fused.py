"""What `maths.fused` marks, compiled for the CPU: the same numbers from fewer tensors."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deepspec.drafts.attention import unroll_attention
from deepspec.drafts.layers import ACTIVATIONS
from deepspec.maths import fused
from deepspec.maths.fused import compiling, gated, normed, turned
from deepspec.maths.head import Head
from deepspec.maths.losses import HeadLoss, head_loss
from deepspec.maths.terms import TERMS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # of torch's own compiler
compiled_here = pytest.mark.skipif(shutil.which("g++") is None, reason="compiled with g++")
ROWS, WORDS, WIDTH, RANK = 12, 5000, 16, 4


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST", 1)


def loss_of(terms: tuple[str, ...], dtype: torch.dtype, rows: int) -> tuple[HeadLoss, list[Tensor]]:
    """A loss with a Markov head, each teacher shared by two rows, and the gradients of its inputs."""
    draw = torch.Generator().manual_seed(rows)
    normal = partial(torch.randn, generator=draw)
    inputs = [normal(rows, WIDTH), normal(rows, RANK), normal(WORDS, RANK)]
    hidden, z, w2 = (x.to(dtype).requires_grad_() for x in inputs)
    head = Head(normal(WORDS, WIDTH).to(dtype))
    found = head_loss(
        hidden,
        head,
        weights={term: torch.rand(rows, generator=draw) for term in terms},
        labels=torch.randint(WORDS, (rows,), generator=draw),
        teacher_hidden=normal(rows // 2, WIDTH).to(dtype),
        teacher_head=head,
        teacher_of=torch.arange(rows) // 2,
        markov=(z, w2),
    )
    found.total.backward()
    return found, [x.grad for x in (hidden, z, w2) if x.grad is not None]


@compiled_here
@pytest.mark.parametrize(
    ("terms", "dtype"), [(("ce", "l1"), torch.bfloat16), (tuple(TERMS), torch.float32)], ids=["dspark", "all"]
)
def test_compiled_losses_and_gradients_are_those_of_the_operations_one_by_one(
    terms: tuple[str, ...], dtype: torch.dtype
):
    near = {"rtol": 1e-3, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    for rows in (ROWS, ROWS + 6):  # of one compilation
        plain, gradients = loss_of(terms, dtype, rows)
        with compiling(True):
            found, same = loss_of(terms, dtype, rows)
        assert len(gradients) == 3
        torch.testing.assert_close(same, gradients, **near)
        for term in terms:
            torch.testing.assert_close(found.rows[term], plain.rows[term], rtol=1e-4, atol=1e-5)
        assert plain.accept is not None and found.accept is not None
        torch.testing.assert_close(found.accept, plain.accept, rtol=1e-4, atol=1e-6)
        assert plain.correct is not None and found.correct is not None
        assert torch.equal(found.correct, plain.correct)


def wide_tensors(run: Any) -> int:
    """Tensors of rows x vocabulary in float32 that a run allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    sizes = [e.self_cpu_memory_usage for e in seen.events()]
    return sum(size >= ROWS * WORDS * 4 for size in sizes)


@compiled_here
def test_compiled_loss_keeps_almost_nothing_as_wide_as_the_vocabulary(monkeypatch: pytest.MonkeyPatch):
    """The draft's and the teachers' distributions, which the products write, and on a CPU (which alone would
    rather store an exponential) one more."""
    run = partial(loss_of, ("ce", "l1"), torch.float32, ROWS)
    monkeypatch.setattr("deepspec.maths.losses.cpu_block_rows", lambda *_: ROWS)  # as on a GPU
    by_operations = wide_tensors(run)
    with compiling(True):
        run()
        compiled = wide_tensors(run)
    assert compiled <= 3 < by_operations


FUNCTIONS = {
    "gated": lambda x, y: gated(x, y, ACTIVATIONS["silu"]),
    "turned": lambda x, y: turned(x, y.cos(), y.sin()),
    "normed": lambda x, y: normed(x, y[0, 0], 1e-6),
}


@compiled_here
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_and_their_gradients_are_those_of_the_operations(name: str):
    draw = torch.Generator().manual_seed(1)
    found = []
    for wanted in (False, True):
        x, y = (torch.randn(5, 3, 8, generator=draw.manual_seed(i)).requires_grad_() for i in (1, 2))
        with compiling(wanted):
            out = FUNCTIONS[name](x, y)
            (out * torch.arange(8.0)).sum().backward()
        found.append([out.detach(), x.grad, y.grad])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@compiled_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_unrolled_attention_has_the_output_and_the_gradients_of_the_operations(dtype: torch.dtype):
    """Its columns are taken in place, into views."""
    draw, found = torch.Generator().manual_seed(0), []
    sizes = [(2, 6, 9, 8), *[(2, 2, 9, 8)] * 6]  # queries, and keys and values of three steps
    given = [torch.randn(size, generator=draw).to(dtype) for size in sizes]
    for wanted in (False, True):
        q, *keys = (x.clone().requires_grad_() for x in given)
        pairs = list(zip(keys[::2], keys[1::2], strict=True))
        with compiling(wanted):
            out = unroll_attention(q, pairs[0], pairs[1:], None, 0.3)
            (out * torch.arange(8.0)).sum().backward()
        found.append([out.detach(), *(x.grad for x in (q, *keys))])
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(*found, **near)


def test_what_cannot_be_compiled_runs_as_it_is_written_after_one_warning(monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def broken(function: Any, **_: Any) -> Any:
        def run(*_: Any) -> Any:
            raise BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    x = torch.randn(4, 8)
    with compiling(True):
        with pytest.warns(UserWarning, match=r"gated runs uncompiled.*no compiler") as warned:
            first, second = gated(x, x, F.silu), gated(x, x, F.silu)
        assert len(warned) == 1
        assert torch.equal(first, F.silu(x) * x) and torch.equal(first, second)


@compiled_here
@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_a_gradient_that_cannot_be_compiled_is_noticed_before_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
):
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    lowered = GraphLowering.run

    def broken(graph: GraphLowering, *given: Any) -> Any:
        if graph.is_backward:
            raise RuntimeError("no gradient today")
        return lowered(graph, *given)

    monkeypatch.setattr(GraphLowering, "run", broken)
    x = torch.randn(4, 8).requires_grad_()
    with compiling(True), config.patch(force_disable_caches=True):
        with pytest.warns(UserWarning, match=r"gated runs uncompiled.*no gradient today"):
            out = gated(x, x, F.silu)
        out.sum().backward()
    want = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


def test_errors_of_the_function_itself_are_not_taken_for_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with compiling(True), pytest.raises(RuntimeError, match="must match"):
        gated(torch.ones(2, 3), torch.ones(2, 4), F.silu)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is compiled from now on, which runs as it is."""
    found: list[str] = []

    def compiled(function: Any, **_: Any) -> Any:
        found.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    return found


def test_small_tensors_and_processes_that_did_not_ask_compile_nothing(
    monkeypatch: pytest.MonkeyPatch, compilations: list[str]
):
    gated(torch.ones(64), torch.ones(64), F.silu)
    monkeypatch.setattr(fused, "LEAST", 65)
    with compiling(True):
        gated(torch.ones(64), torch.ones(64), F.silu)
        assert not compilations
        gated(torch.ones(65), torch.ones(65), F.silu)
    gated(torch.ones(65), torch.ones(65), F.silu)
    assert compilations == ["gated"]


def test_decoding_compiles_nothing(compilations: list[str]):
    """Each kind of its tensors would be a compilation, and torch has a limit."""
    with compiling(True), torch.inference_mode():
        gated(torch.ones(64), torch.ones(64), F.silu)
    assert not compilations


@compiled_here
def test_more_kinds_of_tensors_than_torch_compiles_still_run():
    """Its limit is for one function; what is over it runs as it is written."""
    with torch._dynamo.config.patch(recompile_limit=2), compiling(True):
        for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x = torch.linspace(-2, 2, 24, dtype=kind).view(3, 8)
            torch.testing.assert_close(gated(x, x, F.relu), F.relu(x) * x)


@compiled_here
def test_one_run_after_the_other_does_not_use_up_what_torch_compiles():
    with torch._dynamo.config.patch(recompile_limit=1):
        for kind in (torch.float32, torch.float64):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            with compiling(True):
                gated(torch.ones(4, 8, dtype=kind), torch.ones(4, 8, dtype=kind), F.relu)
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1

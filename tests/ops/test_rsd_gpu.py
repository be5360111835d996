"""The RSD op on a CUDA device: values, no synchronisation, graph capture, compilation, autocast (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES, relative

import xdfast
from xdfast.ops.rsd.reference import rsd_loss_reference

pytestmark = pytest.mark.gpu

# Resident and streamed columns, both forms, tails, more than one tile everywhere.
SHAPES = [(16, 33), (33, 16), (128, 768), (300, 257), (257, 300), (1025, 768), (640, 1030), (2, 5), (50, 1)]


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest):
    with xdfast.backend(request.param):
        yield request.param


def inputs(n: int, d: int, dtype: torch.dtype, both: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    student = torch.randn(n, d, generator=generator)
    teacher = 0.5 * student + 2 * torch.randn(n, d, generator=generator) + 1
    student, teacher = student.to("cuda", dtype), teacher.to("cuda", dtype)
    return student.requires_grad_(), teacher.requires_grad_(both)


def truth(student: torch.Tensor, teacher: torch.Tensor, eps_mode: str = "std") -> tuple[torch.Tensor, ...]:
    s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
    invariance, decorrelation, _ = rsd_loss_reference(s, t, 1e-5, eps_mode)
    loss = invariance + 0.01 * decorrelation
    return loss.detach(), *torch.autograd.grad(loss, (s, t))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("both", [False, True], ids=["student", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, both, dtype, precision) -> None:
    student, teacher = inputs(*shape, dtype, both)
    eps_mode = "var" if both else "std"
    loss = xdfast.rsd_loss(student, teacher, eps_mode=eps_mode, precision=precision)
    wanted = truth(student, teacher, eps_mode)
    exact = precision == "float32"
    size = max(wanted[0].item(), 0.1 * shape[1])
    assert abs(loss.item() - wanted[0].item()) < TOLERANCES["value", dtype if exact else "bfloat16 products"] * size
    if shape[0] > 2:  # with two samples the gradient is a difference of nearly equal numbers
        limit = max(TOLERANCES["gradient", dtype], 0 if exact else TOLERANCES["gradient", "bfloat16 products"])
        for got, exact_gradient in zip(torch.autograd.grad(loss, [student, teacher][: 1 + both]), wanted[1:]):
            assert got.dtype == dtype and relative(got, exact_gradient) < limit


def test_both_backends_and_prepared_teachers_agree(backend) -> None:
    student, teacher = inputs(128, 768, torch.float32)
    prepared = xdfast.prepare_teacher(teacher)
    loss, again = xdfast.rsd_loss(student, teacher), xdfast.rsd_loss(student, prepared)
    assert relative(again, loss) < 1e-6
    assert relative(torch.autograd.grad(again, student)[0], torch.autograd.grad(loss, student)[0]) < 5e-6


@pytest.mark.parametrize("shape", [(128, 768), (1025, 768)], ids=str)
def test_no_host_synchronisation(backend, shape) -> None:
    student, teacher = inputs(*shape, torch.float32)
    xdfast.rsd_loss(student, teacher).backward()  # compiles the kernels, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        xdfast.rsd_loss(student, teacher).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(128, 768), (1025, 768)], ids=str)
def test_capture_in_a_cuda_graph(backend, shape) -> None:
    student, teacher = inputs(*shape, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(xdfast.rsd_loss(student, teacher), student)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = xdfast.rsd_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
    for seed in range(3):
        new = inputs(*shape, torch.float32)[0].detach() * (seed + 1) + torch.randn(shape, device="cuda")
        with torch.no_grad():
            student.copy_(new)
        graph.replay()
        wanted = truth(student, teacher)
        assert relative(loss, wanted[0]) < TOLERANCES["value", torch.float32]
        assert relative(gradient, wanted[1]) < TOLERANCES["gradient", torch.float32]


def test_the_same_input_gives_the_same_bits() -> None:
    with xdfast.backend("triton"):
        student, teacher = inputs(300, 700, torch.bfloat16, True)
        results = []
        for _ in range(5):
            loss = xdfast.rsd_loss(student, teacher, precision="bfloat16")
            results.append((loss, *torch.autograd.grad(loss, (student, teacher))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_streams_do_not_meet() -> None:
    """Counters and scratch belong to the call: two streams at once give what one gives."""
    with xdfast.backend("triton"):
        pairs = [inputs(128 + i, 768, torch.float32) for i in range(2)]
        alone = [xdfast.rsd_loss(*p).item() for p in pairs]
        streams = [torch.cuda.Stream() for _ in pairs]
        losses: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    losses[i].append(xdfast.rsd_loss(*pairs[i]))
        torch.cuda.synchronize()
    for i in range(2):
        assert all(value.item() == alone[i] for value in losses[i])


def test_compiles_without_graph_breaks(backend) -> None:
    student, teacher = inputs(64, 96, torch.float32)
    compiled = torch.compile(lambda s, t: 2 * xdfast.rsd_loss(s.sin(), t), fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), 2 * xdfast.rsd_loss(student.sin(), teacher))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, half) -> None:
    student, teacher = inputs(64, 96, torch.float32)
    with torch.autocast("cuda", dtype=half):
        exact, lowered = xdfast.rsd_loss(student, teacher), xdfast.rsd_loss(student, teacher, precision="auto")
    wanted = truth(student, teacher)[0]
    assert relative(exact, wanted) < TOLERANCES["value", torch.float32]
    assert relative(lowered, wanted) < TOLERANCES["value", "bfloat16 products"]


def test_memory_is_proportional_to_n_times_d() -> None:
    from xdfast.bench.harness import peak_memory

    with xdfast.backend("triton"):
        student, teacher = inputs(64, 8192, torch.float32)
        xdfast.rsd_loss(student, teacher).backward()
        student.grad = None
        peak = peak_memory(lambda: xdfast.rsd_loss(student, teacher).backward(), "cuda")
    assert peak < 10 * 64 * 8192 * 4  # the D×D matrix alone would be 128 times N·D


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 100 * 2**30,
    reason="needs about 90 GiB of device memory",
)
def test_two_to_the_31_elements() -> None:
    """N·D above 2³¹: offsets are 64 bits wide. bfloat16, 4.3 GB each."""
    n, d = 8, 2**28 + 64
    with xdfast.backend("triton"):
        student = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        loss = xdfast.rsd_loss(student, student.detach(), precision="bfloat16", reduction="feature")
        (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.shape == student.shape and gradient[:, -64:].isfinite().all()
    assert loss.isfinite()

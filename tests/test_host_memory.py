"""A GPU's cache in host memory: how much it takes, when it goes, and what is copied when."""

from __future__ import annotations

import gc
import math
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda import cuda as cuda
from helpers import mask, small_bytes, trajectory_of
from test_store import FP8, FREE, RULES, drive, walk
from torch import Tensor

from dicache import DiCacheConfig, DiCacheSession, DiCacheWarning
from dicache.core import host_memory
from dicache.core.host_memory import HostMemory, give_back
from dicache.core.rules import resolve
from dicache.core.store import PackedBuffer, PackedStore
from dicache.core.trajectory import Trajectory

PAGE = mmap.PAGESIZE
HOST: dict[str, Any] = {"cache_device": "cpu"}
DEFAULT = {**RULES["default"], **HOST}


def pages(num_bytes: float) -> int:
    """Bytes of the pages that as many bytes need."""
    return math.ceil(num_bytes / PAGE) * PAGE


@pytest.fixture
def nothing_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to holds NaN in every dtype."""
    empty, make_room = torch.empty, PackedBuffer._make_room

    def spoilt_empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        tensor.untyped_storage().fill_(0xFF)
        return tensor

    def make_spoilt_room(buffer: PackedBuffer) -> None:
        was_full = buffer.is_full
        make_room(buffer)
        if not was_full:
            buffer.tensor.untyped_storage().fill_(0xFF)

    monkeypatch.setattr(torch, "empty", spoilt_empty)
    monkeypatch.setattr(PackedBuffer, "_make_room", make_spoilt_room)


# --- how much it is, and when it goes ------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, FP8], ids=["own", "bf16", "fp8"])
@pytest.mark.parametrize("rules", ["default", "published", "delta_minus"])
def test_a_run_takes_whole_pages_and_gives_them_back(
    rules: str, dtype: torch.dtype | None, granularity: str, cuda: FakeCuda
) -> None:
    config = DiCacheConfig(**RULES[rules], **HOST, cache_dtype=dtype, granularity=granularity)
    _, session = drive(config, walk(6))
    elements = 3 * 4 * 16
    blocks = [2 * elements] * 2 + [elements] * {"published": 1, "delta_minus": 2}.get(rules, 0)
    expected = sum(pages(block * (dtype or torch.float32).itemsize) for block in blocks)
    if dtype == FP8:
        expected += sum(pages(block / 16 * 4) for block in blocks)  # a scale a token
    small = small_bytes(3, {"published": 5, "delta_minus": 6}.get(rules, 4))
    assert cuda.num_bytes == expected
    assert session.stats.cache_bytes == expected + small
    gc.disable()  # nothing waits for the collector
    try:
        session.reset()
    finally:
        gc.enable()
    assert not cuda.locked


def test_it_is_no_power_of_two(cuda: FakeCuda) -> None:
    memory = HostMemory(torch.device("cpu"))
    shapes = [(3, 1_000_003), (5,), (0, 7)]
    tensors = [memory.empty(shape, torch.bfloat16) for shape in shapes]
    assert [tuple(each.shape) for each in tensors] == shapes
    assert sorted(cuda.locked.values()) == [PAGE, PAGE, pages(2 * 3 * 1_000_003)]
    assert memory.num_bytes == cuda.num_bytes
    assert all(each.data_ptr() % PAGE == 0 for each in tensors[:2])
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert tensors[0].eq(0).all() and tensors[1].eq(1).all()  # none lies in another


@pytest.mark.parametrize("how", ["reset", "end", "another run"])
def test_memory_stays_as_long_as_copies_are_on_their_way(how: str, cuda: FakeCuda) -> None:
    _, session = drive(DiCacheConfig(**DEFAULT), walk(6))
    packed = weakref.ref(trajectory_of(session).store["probe_window"])
    held = dict(cuda.locked)
    cuda.is_busy = True
    session.reset()
    assert packed() is None and cuda.locked == held
    blocks = [block for blocks, _, _ in host_memory._leaving for block in blocks]
    assert {each.pages.data_ptr(): each.pages.numel() for each in blocks} == held  # not freed
    cuda.is_busy = False
    if how == "reset":
        session.reset()
    elif how == "end":
        session.end(None)
    else:
        drive(DiCacheConfig(**DEFAULT), walk(2))
    assert not held.keys() & cuda.locked.keys() and not host_memory._leaving


def test_what_was_never_copied_goes_at_once(cuda: FakeCuda) -> None:
    cuda.is_busy = True
    memory = HostMemory(torch.device("cpu"))
    memory.empty((7,), torch.float32)
    del memory
    assert not cuda.locked


def test_a_capture_is_not_disturbed(cuda: FakeCuda) -> None:
    """The fake refuses what would break it off."""
    _, session = drive(DiCacheConfig(**DEFAULT), walk(6))
    cuda.is_capturing = True
    session.reset()
    assert cuda.locked
    cuda.is_capturing = False
    give_back()
    assert not cuda.locked


def test_what_cuda_does_not_answer_for_any_more_is_dropped(cuda: FakeCuda) -> None:
    """After a failure, or in a fork of the process."""
    _, session = drive(DiCacheConfig(**DEFAULT), walk(6))
    cuda.is_busy = True
    session.reset()
    assert host_memory._leaving
    cuda.is_broken = True
    session.reset()
    assert not host_memory._leaving


def test_tensors_outlive_their_place_in_locked_memory(cuda: FakeCuda) -> None:
    memory = HostMemory(torch.device("cpu"))
    tensor = memory.empty((1000,), torch.float32).fill_(3.0)
    del memory
    assert not cuda.locked
    assert tensor.eq(3.0).all()


@pytest.fixture
def launches_raise(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a kernel launch raises the error that was there before it."""
    ones = torch.ones

    def launch(*args: Any, **kwargs: Any) -> Tensor:
        if cuda.leaves_error:
            cuda.leaves_error = False
            raise RuntimeError("CUDA error: operation not supported")
        return ones(*args, **kwargs)

    monkeypatch.setattr(torch, "ones", launch)
    yield


@pytest.mark.usefixtures("launches_raise")
def test_memory_that_must_not_be_locked_is_ordinary_memory(cuda: FakeCuda) -> None:
    cuda.error = 801
    with pytest.warns(DiCacheWarning, match=r"could not be locked \(CUDA error 801\)"):
        outputs, session = drive(DiCacheConfig(**DEFAULT), walk(12))
    expected, _ = drive(DiCacheConfig(**RULES["default"]), walk(12))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not cuda.leaves_error
    session.reset()  # the fake refuses to unlock what is not locked
    assert not host_memory._leaving


# --- what is copied, and beside what -------------------------------------------------------------


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, FP8], ids=["own", "bf16", "fp8"])
def test_on_a_stream_of_its_own_every_bit_is_the_same(dtype: Any, rules: dict[str, Any]) -> None:
    outputs, session = drive(DiCacheConfig(**rules, **HOST, cache_dtype=dtype), walk(12))
    expected, plain = drive(DiCacheConfig(**rules, cache_dtype=dtype), walk(12))
    assert session.stats.to_dict()["contexts"] == plain.stats.to_dict()["contexts"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert "R" in mask(session.stats.records())


def test_nothing_is_copied_before_something_was_saved(cuda: FakeCuda) -> None:
    steps, session = walk(3), DiCacheSession(DiCacheConfig(**DEFAULT))
    taken = []
    for x, p, y in steps:
        del cuda.log[:]
        with session.step("cond") as step:
            step.needs_probe and step.probe(x, p)
            step.record(x, p, y)
        taken.append(cuda.log.count(("fills",)))
    assert taken[0] == 0 and min(taken[1:]) >= 2  # the two windows


@pytest.mark.parametrize("work", ["save", "fetch"])
def test_a_copy_waits_for_what_was_queued_and_is_noted_also_where_it_fails(
    work: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = PackedBuffer(torch.zeros(2, 3), None, "cpu")
    buffer.fill()
    buffer.save()
    buffer.empty()
    if work == "save":
        buffer._make_room()
    expected = [
        ("waits", "side", "main"),
        ("enters", "side"),
        ("copies",),
        ("leaves", "side"),
        ("records", "side"),
        ("keeps", True),
    ]
    name = "_pack" if work == "save" else "_unpack"
    for error in (False, True):

        def copy(buffer: PackedBuffer, error: bool = error) -> None:
            cuda.log.append(("copies",))
            if error:
                raise MemoryError

        monkeypatch.setattr(PackedBuffer, name, copy)
        del cuda.log[:]
        try:
            getattr(buffer, work)()
        except MemoryError:
            assert error
        assert cuda.log == expected
        if work == "fetch":
            buffer.empty()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("fails_at", ["_make_room", "_unpack"])
def test_after_an_error_on_the_way_to_a_probe_the_next_step_is_computed(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, steps = DiCacheSession(DiCacheConfig(**DEFAULT)), walk(6)
    for x, p, y in steps[:2]:
        with session.step("cond") as step:
            step.record(x, p, y)

    def fail(buffer: PackedBuffer) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(PackedBuffer, fails_at, fail)
        session.step("cond")
    for (x, p, y), asked in zip(steps[2:], (False, True, True, True), strict=True):
        with session.step("cond") as step:
            assert step.needs_probe == asked
            if step.needs_probe:
                step.probe(x, p)
            step.record(x, p, y)


# --- memory that nobody has written to -----------------------------------------------------------


@pytest.mark.usefixtures("cuda", "nothing_is_zero")
@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "how",
    [{}, HOST, {"cache_dtype": torch.bfloat16}, {**HOST, "cache_dtype": FP8}],
    ids=["plain", "host", "bf16", "host, fp8"],
)
def test_what_was_never_written_spoils_nothing(
    how: dict[str, Any], rules: dict[str, Any], holds: bool
) -> None:
    steps = walk(12)
    steps[0][2][1, 0, 0] = math.nan  # the entries of a sample are dropped, or all
    with pytest.warns(DiCacheWarning, match="NaN"):
        outputs, session = drive(DiCacheConfig(**{**rules, "threshold": 9.0}, **how), steps, holds)
    assert [bool(each.isfinite().all()) for each in outputs] == [False, *[True] * 11]
    assert "R" in mask(session.stats.records())


@pytest.mark.usefixtures("cuda", "nothing_is_zero")
@pytest.mark.parametrize("how", [{}, HOST, {"cache_dtype": FP8}], ids=["plain", "host", "fp8"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_three_entries_are_there_after_one_record(granularity: str, how: dict[str, Any]) -> None:
    rules = resolve(DiCacheConfig(**{**FREE, "threshold": 0.4}, granularity=granularity, **how))
    (x, p, y), (later, probe, _) = walk(2)
    trajectory = Trajectory(rules, x, p, has_third=True)
    trajectory.record(trajectory.park(x, p), y)
    found = trajectory.extrapolate(later, probe, [(0.5, -2.0, 0.0)])
    rounds = rules.config.cache_dtype is not None
    torch.testing.assert_close(found, later + (y - x), atol=0.3 if rounds else 1e-6, rtol=0)
    trajectory.drop_entries()
    trajectory.record(trajectory.park(later, probe), y)
    found = trajectory.extrapolate(later, probe, [(0.5, -2.0, 0.0)])
    torch.testing.assert_close(found, y, atol=0.3 if rounds else 1e-6, rtol=0)


@pytest.mark.filterwarnings("error::dicache.DiCacheWarning")  # NaN would be told
@pytest.mark.usefixtures("cuda", "nothing_is_zero")
@pytest.mark.parametrize("how", [HOST, {**HOST, "cache_dtype": FP8}], ids=["own", "fp8"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("fails_at", ["_make_room", "_unpack", "_pack", "empty"])
def test_an_error_anywhere_lets_nobody_read_what_was_never_written(
    fails_at: str, granularity: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {**FREE, "schedule": "CCRRCRCRRC", "error": "delta_y", "alignment": "l1"}
    config = DiCacheConfig(**rules, **how, granularity=granularity)
    original, left, failed = getattr(PackedBuffer, fails_at), 0, 0

    def fail_once(buffer: PackedBuffer) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        original(buffer)

    monkeypatch.setattr(PackedBuffer, fails_at, fail_once)
    for place in range(1, 20):
        session, left = DiCacheSession(config), place
        for x, p, y in walk(10):
            try:
                with session.step("cond") as step:
                    if step.needs_probe:
                        step.probe(x, p)
                    done = step.reuse(x) if step.action == "reuse" else step.record(x, p, y)
                assert done.isfinite().all()
            except MemoryError:
                failed += 1
    assert failed == 19


# --- on a GPU ------------------------------------------------------------------------------------


def on_gpu(steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(x.cuda(), p.cuda(), y.cuda()) for x, p, y in steps]


def locked_pages(session: DiCacheSession) -> list[Tensor]:
    """Pages of a session's cache, which stay readable when they are given back."""
    store = trajectory_of(session).store
    assert isinstance(store, PackedStore)
    hosts = [buffer._host for buffer in store._buffers.values()]
    return [block.pages for host in hosts if host is not None for block in host._blocks]


@pytest.mark.gpu
def test_on_a_gpu_pages_are_locked_and_given_back() -> None:
    _, session = drive(DiCacheConfig(**DEFAULT), on_gpu(walk(6)))
    held = locked_pages(session)
    assert len(held) == 2 and all(each.is_pinned() for each in held)
    torch.cuda.synchronize()
    session.reset()
    assert not any(each.is_pinned() for each in held)


@pytest.mark.gpu
def test_on_a_gpu_pages_stay_while_a_copy_is_on_its_way() -> None:
    session = DiCacheSession(DiCacheConfig(**DEFAULT))
    for index, (x, p, y) in enumerate(on_gpu(walk(4))):
        with session.step("cond") as step:
            if index == 3:  # by now all kernels are loaded, which may wait for the device
                torch.cuda.synchronize()
                torch.cuda._sleep(2_000_000_000)  # about a second; the copies are behind it
            step.record(x, p, y)
    held = locked_pages(session)
    session.reset()
    assert all(each.is_pinned() for each in held) and host_memory._leaving
    torch.cuda.synchronize()
    session.reset()
    assert not any(each.is_pinned() for each in held) and not host_memory._leaving


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["lock", "unlock"])
def test_on_a_gpu_pages_come_and_go_while_the_device_works(what: str) -> None:
    """Nobody promises that registering waits for nothing; an abort must not hang behind others."""
    memory = HostMemory(torch.device("cuda", torch.cuda.current_device()))
    if what == "unlock":
        memory.empty((1 << 20,), torch.float32)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    is_done = torch.cuda.Event()
    is_done.record()
    if what == "lock":
        memory.empty((1 << 20,), torch.float32)
    else:
        del memory
        assert not host_memory._leaving
    assert not is_done.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_on_a_gpu_a_refusal_leaves_no_error_behind() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = HostMemory(device)
    memory.empty((1000,), torch.float32)
    with pytest.warns(DiCacheWarning, match="could not be locked"):
        assert not host_memory._lock(memory._blocks[0].pages, device)  # they are locked already
    assert torch.ones(3, device=device).mul_(2).tolist() == [2.0] * 3

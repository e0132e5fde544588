"""Shared set-up: one thread and no autograd, so that tests are quick and repeat bit by bit."""

import sys

import pytest
import torch
from operator_backends import Backend, why_not
from table_marks import pytest_runtest_makereport as pytest_runtest_makereport


@pytest.fixture(autouse=True)
def _quiet_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _attention_as_before():
    """diffusers takes a model's `set_attention_backend` for one of all models in the process."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        usual = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry.set_active_backend(usual)


@pytest.fixture
def plain_flex_attention(monkeypatch):
    """Sparse attention is the same mask in plain arithmetic, in eager code."""
    monkeypatch.setattr("dicache.sparse_videogen.attention.COMPILED", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(
    params=[
        "reference",
        "cpp",
        "emulated",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """`emulated` is the CUDA kernels on a CPU (tests/cuda_emulator)."""
    name = request.param
    missing = why_not(name)
    if missing is not None:
        pytest.skip(f"{name}: {missing}")
    return Backend(name)

"""A pytest plugin (``-p ptx.plugin``): tests of kernels run the PTX from nvcc, and fail at a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shim import host

from ptx.host import build, nvcc, races

if nvcc() is None:
    raise pytest.UsageError("no nvcc on the PATH; install the CUDA toolkit")
host.build = build


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Ask after each test."""
    races()
    result = yield
    found = races()
    if found:
        pytest.fail(f"{found} races in shared memory", pytrace=False)
    return result

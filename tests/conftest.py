"""What every test stands on: no network, a cache of its own, fixed seeds and threads, and the shared material."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# Read by the libraries when they are imported, and inherited by the processes that tests start.
_cache = tempfile.TemporaryDirectory(prefix="memtune-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HOME=_cache.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

pytest.register_assert_rewrite("contract_promises")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hub_fixtures import hub, waits  # noqa: E402, F401

# The same examples on every run; no deadline, since a busy machine is no bug.
hypothesis.settings.register_profile("memtune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("memtune")

SHARED = Path(os.environ.get("MEMTUNE_SHARED") or Path(__file__).parents[2] / "shared")


def _locally(connect: Callable[..., Any]) -> Callable[..., Any]:
    """A socket's `connect` that reaches this machine alone.

    Not by an audit hook: one would let another thread in while coverage sets a thread's trace function, which Python
    3.11 does not forgive.
    """

    def checked(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            try:
                local = address[0] in ("", "localhost") or ipaddress.ip_address(address[0]).is_loopback
            except ValueError:  # another name
                local = False
            if not local:
                raise RuntimeError(f"a test tried to reach the network: {address}")
        return connect(self, address)

    return checked


for _name in ("connect", "connect_ex"):
    setattr(socket.socket, _name, _locally(getattr(socket.socket, _name)))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same seeds and number of threads for each test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the libraries read
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("MEMTUNE_TEST_THREADS", "1")))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the shared material: no folder {folder} (MEMTUNE_SHARED names another place)")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real backbones; mark the test `shared`."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, `<task>/{train,test}/<class>/`; mark the test `shared`."""
    return _shared("data")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names of parameters that are the same in every process: of a case its name, of a set its sorted members."""
    if isinstance(getattr(val, "name", None), str):
        return val.name  # type: ignore[attr-defined]
    if isinstance(val, dict) and any(isinstance(each, (set, frozenset)) for each in val.values()):
        return str({key: sorted(each) if isinstance(each, (set, frozenset)) else each for key, each in val.items()})
    return None

"""What every test stands on: no network, few threads, a cache of its own, and `fixture_path` for the real things."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import fixtures
import pytest

# Before anything imports torch or huggingface_hub, which read these once. Subprocesses inherit them.
_hub_cache = tempfile.TemporaryDirectory(prefix="burnish-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _hub_cache.name  # datasets' cache too: no test leaves anything behind or finds it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as workflow does: no line of DeepSpeed's among a run's own
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would slow their neighbours on a busy machine


@pytest.fixture(scope="session")
def fixture_path() -> Callable[[str], Path]:
    """`fixture_path("smollm2")`: the folder of a fixture of tests/fixtures.toml.

    Missing, the test is skipped by hand and fails where CI is set.
    """

    def path(name: str) -> Path:
        if not fixtures.is_fetched(name):
            reason = f"the fixture {name} is not here: `make fixtures` fetches it"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return fixtures.folder_of(name)

    return path

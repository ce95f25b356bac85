"""What all tests share: deterministic hypothesis examples, and a torch that does not spin."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: no spinning between operations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repo",
    deadline=None,  # time is measured by benchmarks, never by tests
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repo")

if find_spec("triton") is None:  # it exists for Linux only; the library does without
    collect_ignore = ["attention/test_triton.py", "engine/test_triton_engine.py"]
    collect_ignore += [
        "evaluation/test_compile.py",
        "worker/test_graphs.py",
        "evaluation/test_bench_triton.py",
    ]


@pytest.fixture(scope="session")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site as it is, built strictly. Chapters that did not change are not run."""
    if find_spec("mkdocs") is None:
        pytest.skip("building the site needs the extra `docs`: pip install -e '.[docs]'")
    site = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    if build.returncode != 0:
        pytest.fail(f"mkdocs build --strict:\n{build.stderr}", pytrace=False)
    return site

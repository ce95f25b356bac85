"""What all tests share: deterministic hypothesis examples, and a torch that does not spin."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: no spinning between operations

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
    collect_ignore = ["test_triton.py", "test_triton_engine.py", "test_compile.py"]
    collect_ignore += ["test_graphs.py", "test_bench_triton.py"]

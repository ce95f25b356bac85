"""What all tests share: the full set and what runs by default, the workers, and the built site."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported: threads that do not spin, and no more of them than there are cores,
# because each worker of pytest-xdist has its own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CORES = os.cpu_count() or 1
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from hypothesis import HealthCheck, settings

# PyTorch collects the functions that create tensors when a device is first used as a context. If
# torch.empty were replaced by a test then, "meta" would allocate memory from then on.
with torch.device("meta"):
    torch.empty(0)

settings.register_profile(
    "repo",
    deadline=None,  # time is measured by benchmarks, never by tests
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repo")

HELPERS = Path(__file__).parent / "helpers"
pytest.register_assert_rewrite(*sorted(path.stem for path in HELPERS.glob("*.py")))

import full_set

if find_spec("jaxtyping") and find_spec("beartype"):  # else shapes are not checked, only results
    from jaxtyping import install_import_hook

    # The modules whose signatures have shapes; the hook must be installed before their import.
    SHAPED = """
        attention.batch
        attention.blockwise
        attention.device_batch
        attention.kv_cache
        attention.log_sum_exp
        attention.pool
        attention.reference
        attention.shared_prefix
        attention.torch_decode
        attention.torch_paged
        attention.unpaged
        labs.tensor_parallel
        models.base
        models.gpt2
        models.layers
        models.linear
        models.llama
        models.loader
        models.opt
        models.packed
        models.parallel
        models.rope
        models.safetensors_reader
        sampling.adjust
        sampling.sampler
        sampling.draw
        sampling.truncate
    """
    install_import_hook([f"minipaged.{name}" for name in SHAPED.split()], "beartype.beartype")

if find_spec("triton") is None:  # it exists for Linux only; the library does without
    collect_ignore = ["attention/test_triton.py", "engine/test_triton_engine.py"]
    collect_ignore += [
        "attention/test_layer_kernels.py",
        "evaluation/test_compile.py",
        "worker/test_graphs.py",
        "evaluation/test_bench_triton.py",
    ]


# ---- the full set, and what runs by default ------------------------------------------------------

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        default=os.environ.get("MINIPAGED_TESTS") == "full",
        help="run the full set, with all cases of the long matrices (also: MINIPAGED_TESTS=full)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.full:
        return
    left_out = full_set.full_only(items)
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"left out: {left_out} slow tests and cases of long matrices, and most examples of "
            "the state machines; `pytest --full` runs all"
        )


# ---- workers (pytest-xdist) ----------------------------------------------------------------------

MOST_WORKERS = 8  # each imports torch, and holds models


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests are shared among the cores; a few that were named run in this process.

    `-n` overrides this. Tests with a mark `xdist_group` run on one worker, so that what they share
    is built once.
    """
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    option = config.option
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if option.numprocesses is None and everything and not option.usepdb:
        option.numprocesses = min(CORES, MOST_WORKERS)
    if option.numprocesses and option.dist == "no":
        option.dist = "loadgroup"


class WorkersTell:
    """Registered only with pytest-xdist: what is left out is known where tests are collected."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            left_out = session.config.stash.get(LEFT_OUT, 0)
            session.config.workeroutput["left_out"] = left_out

    def pytest_testnodedown(self, node: object, error: object) -> None:
        left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
        node.config.stash[LEFT_OUT] = left_out


def pytest_configure(config: pytest.Config) -> None:
    full_set.choose(config.option.full)
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(WorkersTell())


# ---- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site as it is, built strictly. Chapters that did not change are not run.

    MINIPAGED_SITE names the folder of one that has just been built.
    """
    if folder := os.environ.get("MINIPAGED_SITE"):
        return Path(folder)
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

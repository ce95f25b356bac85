"""A program that answers requests, and starts another one, for the tests of `AskedProcess`."""

import os
import subprocess
import time

from minipaged.evaluation.bench.asked_process import answer


def start_another() -> int:
    print("a library prints this")  # which is not an answer
    return subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL).pid


def hang() -> None:
    time.sleep(600)


def variable(name: str) -> str | None:
    return os.environ.get(name)


if __name__ == "__main__":
    functions = {"start_another": start_another, "hang": hang, "variable": variable}
    answer({**functions, "exit": lambda: exit(3)})

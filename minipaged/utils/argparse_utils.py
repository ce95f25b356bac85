"""The parser of vLLM's example scripts: --max_tokens and --max-tokens are one flag."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that accepts underscores for the dashes of a flag."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, after replacing underscores in flags by dashes."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(each) for each in given], namespace)


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word

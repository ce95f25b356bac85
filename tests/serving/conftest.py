"""What the tests of the protocol share: a server, and the offline engine to compare it with."""

import pytest
from servers import running

from minipaged import LLM


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    flags = ("--max-num-seqs", "8", "--stream-interval", "0")
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


@pytest.fixture(scope="package")
def llm():
    return LLM("storyteller")

"""Requests that schemathesis invents from the server's schema: none makes the server fail."""

import shutil
import subprocess

import full_set
import pytest
from servers import running

SCHEMATHESIS = shutil.which("schemathesis")


@pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis: pip install schemathesis")
def test_no_generated_request_causes_a_server_error(tmp_path):
    # Short requests, because a timeout on a busy machine would be a server error (504).
    with running(tmp_path, "--max-num-seqs", "8", "--max-model-len", "128") as server:
        command = [
            *(SCHEMATHESIS, "run", f"{server.url}/openapi.json", "--phases=fuzzing", "--seed=1"),
            f"--max-examples={full_set.examples(20, full=200)}",
            "--checks=not_a_server_error",
        ]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout
        server.wait_until_idle()
        assert "Traceback" not in server.log.read_text()

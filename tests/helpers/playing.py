"""The program of the trace player, run by node without a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from minipaged.tracing import replay

ASSETS = Path(replay.__file__).parents[1] / "assets" / "replay"

NODE_PROGRAM = """
const { Player, refusal, summary } = require(process.argv[1]);
const traces = JSON.parse(require("fs").readFileSync(0, "utf8"));
const all = traces.map((events) => {
  const refused = refusal(events);
  if (refused) return { refused };
  const player = new Player(events);
  const at = (stop) => summary(structuredClone(player.seek(stop)));
  const forth = player.stops.steps.map(at);
  const back = [...player.stops.steps].reverse().map(at).reverse();
  const finely = player.stops.moments.map(at);
  const same = JSON.stringify(forth) === JSON.stringify(back);
  return { shape: player.shape, states: forth, same, moments: finely.length };
});
console.log(JSON.stringify(all));
"""


def play_in_node(traces: list[list[dict]]) -> list[dict]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine to run state.js")
    done = subprocess.run(
        [node, "-e", NODE_PROGRAM, str(ASSETS / "state.js")],
        input=json.dumps(traces),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

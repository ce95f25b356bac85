"""A program that answers like an engine of `minipaged bench engine`, from prepared tokens.

`fake_peer.py FAULT TOKENS.json`: TOKENS holds the tokens of each prompt.
"""

import json
import os
import sys
import time
from pathlib import Path

FAULT, FILE = sys.argv[1:3]

if __name__ == "__main__":
    right = json.loads(Path(FILE).read_text(encoding="utf-8"))
    for num_served, line in enumerate(sys.stdin):
        asked = json.loads(line)
        if asked["do"] == "load":
            about = {"version": "1.2", "weights": "float32", "keys": "uint8"}
            answer = {"failure": "OSError: no model"} if FAULT == "no model" else {"found": about}
            print(json.dumps(answer), flush=True)
            continue
        if FAULT == "dies" and num_served > 3:
            os._exit(3)
        if FAULT == "hangs":
            time.sleep(600)
        tokens = [right[json.dumps(prompt)][:output] for prompt, output in asked["requests"]]
        if FAULT == "wrong token":
            tokens[0][-1] = (tokens[0][-1] + 1) % 512
        if FAULT == "one token less":
            tokens[0].pop()
        found = {"num_tokens": 7, "seconds": 0.5, "cpu_seconds": 0.75, "tokens": tokens}
        print(json.dumps({"found": found}), flush=True)

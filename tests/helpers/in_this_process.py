"""An engine of `minipaged bench engine` that answers in this process."""

import json
import os

from minipaged.evaluation.bench import engine_sides


class InThisProcess:
    """Answers here: a process of its own imports torch again, and does not see what is patched."""

    def __init__(self, module, options, *_):
        assert module == engine_sides.__name__
        self.pid = os.getpid()
        self.ways = engine_sides.ways(json.loads(json.dumps(options, default=str)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, do, within, **given):
        assert within > 0
        try:
            return {"found": self.ways[do](**given)}
        except RuntimeError as error:
            return {"failure": f"{type(error).__name__}: {error}"}

"""Modules whose source was changed on purpose."""

import inspect
from types import ModuleType


def compiled(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    source = inspect.getsource(module)
    for old, new in changes:
        assert old in source, f"{module.__name__} has changed, no more {old!r}: renew this mutant"
        source = source.replace(old, new)
    mutant = ModuleType(module.__name__)  # dataclasses look the module up by its name
    exec(compile(source, f"<mutant of {module.__name__}>", "exec"), mutant.__dict__)
    return mutant

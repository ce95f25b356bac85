"""Detects that student code has replaced something that its tests rely on.

Before student code is loaded, the seal records the functions and classes of the tests, the library,
pytest and torch. After every test it compares them. Adding is allowed; replacing is not.
"""

import sys
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

_SEALED = ("builtins", "pytest", "torch")
_WITH_SUBMODULES = ("minipaged", "_pytest", "pluggy")


class Seal:
    """All callables of the sealed modules and their classes, recorded at construction."""

    def __init__(self) -> None:
        self._modules = {n: module for n, module in sys.modules.items() if _is_sealed(n, module)}
        self._holders: dict[int, tuple[Any, str, list[tuple[str, Any]]]] = {}
        self._codes: list[tuple[FunctionType, Any, str]] = []
        for name, module in self._modules.items():
            self._note(module, name)
        if "torch" in self._modules:
            self._note_tensor(self._modules["torch"].Tensor)

    def _note_tensor(self, tensor: Any) -> None:
        """Record inherited methods too: adding one to torch.Tensor overrides its base class's."""
        inherited = vars(tensor.__base__).items()
        names = [name for name, value in inherited if _is_code(value) and name[:2] != "__"]
        values = [(name, vars(tensor).get(name)) for name in names]
        self._holders[id(tensor)] = (vars(tensor), "torch.Tensor", values)

    def _note(self, holder: Any, where: str) -> None:
        """Record the current contents of a module or a class, with a live view of its names."""
        if id(holder) in self._holders:
            return
        # torch itself replaces some of its Python functions when it loads its compiler.
        is_kept = _is_builtin if where == "torch" else _is_code
        values = [(name, value) for name, value in vars(holder).items() if is_kept(value)]
        self._holders[id(holder)] = (vars(holder), where, values)
        for name, value in values:
            if isinstance(value, FunctionType):
                self._codes.append((value, value.__code__, f"{where}.{name}"))
            elif isinstance(value, type) and value.__module__.startswith(_WITH_SUBMODULES):
                self._note(value, f"{where}.{name}")

    def broken(self) -> str:
        """The name of something that was replaced; empty if nothing was."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is not module:
                return f"the module {name}"
        for namespace, where, values in self._holders.values():
            for name, value in values:
                if namespace.get(name) is not value:
                    return f"{where}.{name}"
        for function, code, where in self._codes:
            if function.__code__ is not code:
                return where
        return self._equal_to_all()

    def _equal_to_all(self) -> str:
        """Detect a student's class that compares equal to everything."""
        for name, module in list(sys.modules.items()):
            if not name.startswith("minipaged_custom_"):
                continue
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name and _equals_all(value):
                    return f"comparisons: {value.__name__} is equal to everything"
        return ""


def _is_code(value: object) -> bool:
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


def _is_builtin(value: object) -> bool:
    return isinstance(value, BuiltinFunctionType)


def _is_sealed(name: str, module: Any) -> bool:
    if not isinstance(module, ModuleType) or name.startswith("minipaged_custom_"):
        return False
    top = name.partition(".")[0]
    is_test = (getattr(module, "__file__", None) or "").startswith(sys.path[0] + "/tests/")
    return name in _SEALED or top in _WITH_SUBMODULES or is_test


def _equals_all(cls: Any) -> bool:
    try:
        return bool(cls.__new__(cls) == object())
    except Exception:  # it cannot be created without arguments, or cannot be compared
        return False

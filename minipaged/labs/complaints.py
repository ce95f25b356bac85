"""Explains a failed lab test in one line: yours, expected, and the calls of your part before it."""

import ast
import functools
import inspect
import reprlib
from collections import deque
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest

from minipaged.errors import CheckFailed

_NUM_CALLS = 6  # calls that are shown
_MOST_CALLS = 5_000  # calls recorded per test, so that tests with millions of calls are not slow
_EXPECTED = {
    "==": "expected {}", "is": "expected {}", "!=": "expected anything but {}",
    "is not": "expected anything but {}", "in": "expected one of {}",
    "not in": "expected none of {}",
}  # fmt: skip

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = _short.maxdeque = 24
_short.maxstring = _short.maxother = 120


class CallLog:
    """Records the last calls into a student's file, and the last failed comparison."""

    def __init__(self) -> None:
        self.comparison: tuple[str, str, str] | None = None  # operator, yours, expected
        self._calls: deque[tuple[str, tuple[Any, ...], dict[str, Any], list[Any]]] = deque(
            maxlen=_NUM_CALLS
        )
        self._num_calls = 0
        self._is_inside = False

    def begin(self) -> None:
        """Called when a test begins."""
        self.comparison = None
        self._calls.clear()
        self._num_calls = 0

    def watch(self, module: ModuleType) -> None:
        """Record calls of all public methods of the classes that a module defines."""
        for cls in [v for v in vars(module).values() if inspect.isclass(v)]:
            if cls.__module__ == module.__name__:
                for name, value in list(vars(cls).items()):
                    if isinstance(value, FunctionType) and not name.startswith("_"):
                        setattr(cls, name, self.noting(value, name))
                    elif isinstance(value, FunctionType) and name == "__init__":
                        setattr(cls, name, self.noting(value, cls.__name__))

    def noting(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function so that its calls are recorded."""
        is_method = "." in function.__qualname__.rpartition("<locals>.")[2]

        @functools.wraps(function)
        def noted(*args: Any, **options: Any) -> Any:
            if self._is_inside or self._num_calls > _MOST_CALLS:
                return function(*args, **options)
            self._num_calls += 1
            result: list[Any] = []
            self._calls.append((name, args[is_method:], options, result))
            self._is_inside = True
            try:
                result.append(function(*args, **options))
            finally:
                self._is_inside = False
            return result[0]

        return noted

    def __str__(self) -> str:
        if not self._calls or self._num_calls > _MOST_CALLS:
            return ""
        calls = [_call(*call) for call in self._calls]
        return f"; after {'..., ' * (self._num_calls > _NUM_CALLS)}{', '.join(calls)}"


def _call(name: str, args: tuple[Any, ...], options: dict[str, Any], result: list[Any]) -> str:
    told = [*map(_value, args), *(f"{key}={_value(value)}" for key, value in options.items())]
    gave = f" = {_value(result[0])}" if result and result[0] is not None else ""
    return f"{name}({', '.join(told)}){gave}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, (int, str, range)):
        return _short.repr(value)
    if isinstance(value, (list, tuple)) and len(value) <= 8:  # pyright: ignore[reportUnknownArgumentType]
        return "[" + ", ".join(_value(each) for each in value) + "]"  # pyright: ignore[reportUnknownVariableType]
    for name in ("seq_id", "request_id"):
        if hasattr(value, name):
            return f"{type(value).__name__} {getattr(value, name)}"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{list(shape) if shape is not None else ''}"


def compared(op: str, yours: object, expected: object) -> tuple[str, str, str]:
    """The two sides of a failed comparison as text, since the objects may change later."""
    return op, _short.repr(yours), _short.repr(expected)


def complaint(excinfo: "pytest.ExceptionInfo[BaseException]", file: str, log: CallLog) -> str:
    """Explain why a test failed.

    Args:
        file: the student's file.
        log: the recorded calls and comparisons.
    """
    error, last = excinfo.value, excinfo.traceback[-1]
    message = (str(error).strip().splitlines() or [""])[0].removesuffix(".")
    if isinstance(error, NotImplementedError):  # "your turn" is enough
        return f"NotImplementedError: {message}"
    mine = [entry for entry in excinfo.traceback if str(entry.path) == file]
    if mine or not isinstance(error, (AssertionError, pytest.fail.Exception)):
        where = f" (line {mine[-1].lineno + 1} of your file)" if mine else ""
        is_theirs = isinstance(error, AssertionError) and str(last.path) != file
        kind = "" if is_theirs and message else type(error).__name__
        what = f"{kind}{': ' * bool(kind and message)}{message}{where}"
    elif message.startswith("DID NOT RAISE"):
        raised = message.removeprefix("DID NOT RAISE").strip().replace("<class '", "")
        name = raised.removesuffix("'>").rpartition(".")[2]
        what = f"yours raised nothing, expected {name}"
    elif not isinstance(error, AssertionError):
        what = message
    else:
        what = _assertion(message, str(last.statement), log)
    if isinstance(error, CheckFailed):  # names the call; later ones clean up
        return what
    return f"{what}{log}"


def _assertion(message: str, statement: str, log: CallLog) -> str:
    said = "" if message.startswith("assert ") else message
    try:
        [node] = ast.parse(statement.strip()).body
        test = node.test if isinstance(node, ast.Assert) else None
    except (SyntaxError, ValueError):
        test = None
    if log.comparison is not None:
        op, yours, expected = log.comparison
        wanted = _EXPECTED.get(op, f"expected {op} {{}}").format(expected)
        of = ""
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            source = ast.unparse(test.left)
            told = len(source) > 60 or isinstance(test.left, ast.Tuple | ast.Constant)
            of = "" if told else f"{source}: "
        return f"{said}{': ' * bool(said)}{of}yours {yours}, {wanted}"
    if isinstance(test, ast.Name | ast.Call | ast.Attribute):
        return f"{said}{': ' * bool(said)}{ast.unparse(test)}: yours false, expected true"
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return f"{said}{': ' * bool(said)}{ast.unparse(test.operand)}: yours true, expected false"
    return said or message

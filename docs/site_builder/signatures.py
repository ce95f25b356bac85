"""Signatures that the reference cannot read from the text of the code.

The reference is made without running the library. What `minipaged.utils.options.takes` derives, the
arguments of `LLM` and their documentation, exists only at run time, so it is taken from there.
"""

import inspect
from typing import Any

import griffe

DERIVED = {"minipaged.llm.LLM.__init__"}


class DerivedSignatures(griffe.Extension):
    """Replaces the signature and the docstring of functions whose arguments are derived."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function that the reference reads."""
        if func.path not in DERIVED:
            return
        from minipaged.llm import LLM

        signature = inspect.signature(LLM.__init__)
        func.parameters = griffe.Parameters(
            *(_parameter(each) for each in signature.parameters.values())
        )
        assert func.docstring is not None
        func.docstring.value = inspect.getdoc(LLM.__init__) or ""


def _parameter(declared: inspect.Parameter) -> griffe.Parameter:
    empty = inspect.Parameter.empty
    annotation = inspect.formatannotation(declared.annotation)
    return griffe.Parameter(
        declared.name,
        kind=getattr(griffe.ParameterKind, declared.kind.name.lower()),
        annotation=None if declared.annotation is empty else annotation.replace("pathlib.", ""),
        default=None if declared.default is empty else repr(declared.default),
    )

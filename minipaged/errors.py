"""Exceptions. Every message has three parts: what is wrong, by how much, and what to change.

A user's mistake raises one of these; a broken contract between two parts of the library fails an
`assert` instead. Catch `MinipagedError` to catch all of them.
"""


class MinipagedError(Exception):
    """The base class of every error that this library raises on purpose."""


class InvalidOption(MinipagedError, ValueError):
    """An option or parameter has a value that cannot work.

    `param` is its name, for programs; None if several options conflict.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(MinipagedError, ValueError):
    """One request cannot be served; all others continue."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit into the model's context, the pool, or one step."""

    @classmethod
    def in_context(cls, length: int, max_model_len: int) -> "PromptTooLong":
        """Build the error for a prompt of `length` tokens, which leaves no room for output."""
        over = length - max_model_len + 1
        return cls(
            f"the prompt has {length} tokens, but prompt and output together may have only "
            f"{max_model_len} (max_model_len). Shorten the prompt by {over} "
            f"token{'s' if over > 1 else ''}, or raise max_model_len if the model allows."
        )


class RequestFailed(MinipagedError):
    """The code that samples for one request, or decodes its text, raised; all others continue.

    The original exception is the `__cause__`.
    """


class WorkerLost(MinipagedError):
    """One of several ranks has ended or does not respond, and its part of the cache is lost.

    Build a new engine: this one cannot be used any more.
    """


class EngineDead(MinipagedError):
    """The engine of a server has failed and serves no more requests."""


class ServerClosing(MinipagedError):
    """The server is shutting down and accepts no new requests."""


class QueueFull(MinipagedError):
    """The queue is full, so the server accepts no more requests for the moment."""


class OutOfBlocks(MinipagedError):
    """The pool has no free block left. The scheduler avoids it by preempting a group."""


class DoubleFree(MinipagedError):
    """A block without an owner was freed or shared."""


class CheckFailed(MinipagedError):
    """A checker found a wrong count: a part broke its contract."""


class CheckpointError(MinipagedError):
    """A checkpoint cannot be loaded: a file or tensor is missing, unexpected or misshapen."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is complete, but its architecture, or an option of it, is not supported."""


class MissingTokenizer(MinipagedError):
    """Text was given or requested, but the model's folder has no tokenizer."""


class UnsupportedTokenizer(CheckpointError):
    """tiktoken is not proved to equal this tokenizer; another library may support it."""


class FetchError(MinipagedError):
    """A model cannot be fetched: because of its name, the network, rights, space or a checksum."""

"""What can go wrong for a user. Every message says what, how much, and what to change.

A user's mistake raises one of these; a broken promise between two parts of the library is an
`assert` instead. Catch `MinipagedError` to catch them all.
"""


class MinipagedError(Exception):
    """The root of every error that this library raises on purpose."""


class InvalidOption(MinipagedError, ValueError):
    """An option or parameter has a value that cannot work.

    `param` is its name, for programs; None where several options are at odds.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(MinipagedError, ValueError):
    """One request cannot be served as it was asked; all others go on."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit: into the model's context, into the pool, or into one step."""

    @classmethod
    def in_context(cls, length: int, max_model_len: int) -> "PromptTooLong":
        """A prompt of so many tokens leaves no room for output."""
        over = length - max_model_len + 1
        return cls(
            f"the prompt has {length} tokens, and prompt and output together may have "
            f"{max_model_len} (max_model_len). Shorten the prompt by {over} "
            f"token{'s' if over > 1 else ''}, or raise max_model_len if the model allows."
        )


class RequestFailed(MinipagedError):
    """The code that samples for one request, or writes its text, raised; all others go on.

    What it raised is the `__cause__`.
    """


class WorkerLost(MinipagedError):
    """A rank of several has ended or does not answer, and its part of the cache is lost.

    Build a new engine: this one runs nothing more.
    """


class EngineDead(MinipagedError):
    """The engine of a server has failed, and serves nothing more."""


class ServerClosing(MinipagedError):
    """The server is shutting down: it takes no new requests."""


class QueueFull(MinipagedError):
    """So many requests wait that the server takes no more for the moment."""


class OutOfBlocks(MinipagedError):
    """The pool has no free block left. The scheduler answers it by preempting someone."""


class DoubleFree(MinipagedError):
    """A block without an owner was freed or shared."""


class CheckFailed(MinipagedError):
    """`Checked` counted again and found another number: some part broke the contract."""


class CheckpointError(MinipagedError):
    """A checkpoint cannot be loaded: a file or tensor is missing, unexpected or misshapen."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is whole, but of an architecture (or option of one) not built here."""


class MissingTokenizer(MinipagedError):
    """Text was given or asked for, but the model's folder holds no tokenizer."""


class UnsupportedTokenizer(CheckpointError):
    """A tokenizer that tiktoken cannot be proved to equal; another library may know it."""


class FetchError(MinipagedError):
    """A model cannot be fetched: its name, the network, rights, room or a checksum forbid it."""

"""The options of `minipaged serve`, in addition to those of the engine."""

from dataclasses import dataclass

from minipaged.errors import InvalidOption
from minipaged.utils.options import check_options, option, options_of


@dataclass(frozen=True)
class ServerArgs:
    """The server's address, API key and limits. Raises InvalidOption for an invalid value."""

    host: str = option("127.0.0.1", "Address to listen on. 0.0.0.0 listens on all interfaces.")
    port: int = option(8000, "Port to listen on. 0 chooses a free one.", at_least=0, at_most=65535)
    api_key: str | None = option(
        None,
        "Key that clients must send, except to /health and /metrics. The environment variable "
        "MINIPAGED_API_KEY also sets it, without showing it in the list of processes.",
    )
    served_model_name: str | None = option(None, "Model name that clients see.")
    max_queued: int = option(
        1024, "Maximum waiting requests, counting each sample. Further ones get 429.", at_least=1
    )
    max_queued_tokens: int | None = option(
        None, "Maximum prompt tokens of waiting requests. Further ones get 429.", at_least=1
    )
    max_body_bytes: int = option(
        4 * 2**20, "Maximum bytes of a request's body. Larger ones get 413.", at_least=1
    )
    cors_origin: str | None = option(None, "Website whose pages may call the server; * allows any.")
    request_timeout: float | None = option(
        None, "Abort requests after this many seconds.", at_least=0.001, at_most=10**6
    )
    grace: float = option(
        30.0, "Seconds that running requests get after SIGTERM.", at_least=0, at_most=10**6
    )
    trust_request_chat_template: bool = option(False, "Run chat templates that clients send.")
    stream_interval: float = option(
        0.1,
        "Minimum seconds between two chunks of a stream. Tokens that arrive sooner share a chunk. "
        "The first chunk is never delayed. 0 sends each token in its own chunk.",
        at_least=0,
        at_most=60,
    )
    viz: bool = option(False, "Show the block pool live at /viz.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise InvalidOption(
                "api_key is empty or not ASCII: choose a key of ASCII characters.", "api_key"
            )

    @property
    def key(self) -> bytes | None:
        """The key's bytes without surrounding spaces, as they are compared; None: no key."""
        return None if self.api_key is None else self.api_key.strip().encode()


SERVER_OPTIONS = options_of(ServerArgs)

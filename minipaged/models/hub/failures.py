"""Errors between this machine and the hub, one sentence each."""

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from minipaged.errors import FetchError, MinipagedError
from minipaged.models.hub.local_models import ModelName

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Operating system errors about disks, memory and permissions, not about networks or bad files.
THIS_MACHINE = (
    *DISK_IS_FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE,
)  # fmt: skip
LONGEST_WAIT = 60  # seconds without progress


class BrokenOff(FetchError):
    """No response, or an incomplete one: a retry may help."""

    def __init__(self, sentence: str, wait: int = 1) -> None:
        super().__init__(sentence)
        self.wait = wait  # seconds before a retry


def without_password(url: str) -> str:
    """The address without its password, for printing and logging."""
    return re.sub(r"(^|//)[^/@\s]*@", r"\1", url)


@contextmanager
def failures_explained(model: ModelName, hub: str, no_answer: str) -> Generator[None, None, None]:
    """Convert errors of the library to FetchError, and silence its warnings."""
    try:
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise FetchError(
            "models are fetched by huggingface_hub, which is not installed: "
            "pip install huggingface_hub."
        ) from error
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FetchError(f"HF_HUB_OFFLINE is set: unset it to fetch {model}.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns for every request without a token
    try:
        yield
    except MinipagedError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in THIS_MACHINE:
            raise
        response = getattr(error, "response", None)
        if response is not None:
            raise _explain(error, response, model, hub) from error
        if isinstance(error, ValueError | LookupError | TypeError):
            raise FetchError(
                f"{hub} does not answer as a hub does ({_reason(error)}): check HF_ENDPOINT."
            ) from error
        raise BrokenOff(f"{no_answer} ({_reason(error)}): check the network.") from error
    finally:
        logging.set_verbosity(verbosity)


def _explain(error: Exception, response: Any, model: ModelName, hub: str) -> FetchError:
    """Convert the hub's HTTP error to an exception."""
    from huggingface_hub import errors

    # From specific to general: a gated model is a kind of "not found", and all have a status.
    status: int = response.status_code
    said = str(response.headers.get("X-Error-Message", "")).strip(" .:")[:200]
    says = f" (it says: {said})" if said else ""
    if isinstance(error, errors.GatedRepoError):
        return FetchError(
            f"{model} can be downloaded only after its licence was accepted: accept it at "
            f"{hub}/{model.repo}, and set HF_TOKEN to a token of your account{says}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchError(f"{model.repo} has no revision {model.revision!r} at {hub}: correct it.")
    if isinstance(error, errors.EntryNotFoundError):
        return FetchError(f"a file of {model} was removed from {hub} meanwhile: fetch again.")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return FetchError(
            f"there is no model {model.repo} at {hub}, or it is private: check the name, and "
            f"{_about_the_token()}{says if 'token' in says.lower() else ''}."
        )
    if status in (401, 403):
        return FetchError(
            f"{hub} forbids access to {model} with status {status}{says}: {_about_the_token()}."
        )
    if status in (408, 429) or status >= 500:
        return _try_later(response, model, hub)
    return FetchError(f"{hub} answered {model} with status {status}{says}: choose another model.")


def _about_the_token() -> str:
    """The public hub answers a missing model and an expired token in the same way."""
    from huggingface_hub import get_token

    if not get_token():
        return "for a private model set HF_TOKEN"
    return "use another token if yours is wrong or expired (HF_TOKEN, or that of `hf auth login`)"


def _try_later(response: Any, model: ModelName, hub: str) -> FetchError:
    """The hub is overloaded or limits requests; it may name a time to wait."""
    headers = response.headers
    told = re.search(r"t=(\d+)", headers.get("RateLimit", "")) or re.fullmatch(
        r"\s*(\d+)\s*", headers.get("Retry-After", "")
    )
    wait = int(told[1]) if told else 1
    answer = f"{hub} answered {model} with status {response.status_code}"
    if wait > LONGEST_WAIT:
        return FetchError(f"{answer} and asks to wait {wait} s: fetch again after that time.")
    return BrokenOff(f"{answer}: try again later.", wait)


def _reason(error: Exception) -> str:
    """The first line of the error's message, or its type if it has none."""
    lines = without_password(str(error)).strip().splitlines()
    return (lines[0].strip(" .:")[:200] if lines else "") or type(error).__name__

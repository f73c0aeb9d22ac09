"""Requests to the Hub that are repeated: which, for how long, and what is said in the end."""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from agr_hf.texts import one_line, without_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# The client repeats some of its requests itself; this is for whatever it gives up on.
ATTEMPTS = 5
FIRST_PAUSE = 1.0
# 412: someone else was faster; 422: an upload arrived damaged.
TEMPORARY_CODES = (408, 412, 422, 429)
# Of this machine's disk, and not of the network.
LOCAL = (
    errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip

# Errors of the client that are OSErrors, and do not pass with time.
FINAL = (LocalTokenNotFoundError, OfflineModeIsEnabled)


def retry(failed: str, attempt: Callable[[int], Result], afterwards: str = "Try again later") -> Result:
    """Call `attempt` with 0, 1, ... until it works, with longer and longer pauses.

    Args:
        failed: the beginning of a message, what did not work.
        attempt: what to do.
        afterwards: the end of the message where the Hub failed again and again.

    Raises:
        ConnectionError: it never worked, or what it raised will not pass with time.
    """
    pause = FIRST_PAUSE
    for number in range(ATTEMPTS):
        try:
            return attempt(number)
        except Exception as raised:
            error = _cause(raised)
            code = _status(error)
            if not _is_temporary(error, code):
                raise ConnectionError(f"{failed}: {_advice(error, code)}") from None
            reason = one_line(without_secrets(str(error) or type(error).__name__).splitlines()[0])
            if number + 1 == ATTEMPTS:
                raise ConnectionError(
                    f"{failed}: the Hub failed {ATTEMPTS} times, the last time with: {reason.rstrip('.')}. {afterwards}"
                ) from None
            logger.warning("the Hub failed (%s); trying again in %g s", reason, pause)
            time.sleep(pause)
            pause *= 2
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain that came from the network, or the last one raised: the client wraps some."""
    found: BaseException | None = error
    while found is not None:
        if _status(found) is not None or _is_temporary(found, None):
            return found
        found = found.__cause__ or found.__context__
    return error


def _is_temporary(error: BaseException, code: int | None) -> bool:
    if code is not None:
        return code >= 500 or code in TEMPORARY_CODES
    # The client's HTTP library has errors of its own; garbage in the place of JSON is a ValueError.
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, FINAL) or (isinstance(error, OSError) and error.errno in LOCAL):
        return False
    return library.startswith(("httpx", "httpcore")) or isinstance(error, (OSError, json.JSONDecodeError))


def _advice(error: BaseException, code: int | None) -> str:
    reason = without_secrets(str(error) or type(error).__name__).strip().splitlines()
    said = one_line(reason[-1]) if reason else type(error).__name__
    if code == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the token is missing, wrong or expired; {LOG_IN}"
    if code == 403:
        return f"the token may not write there ({said}); use one with write access to this namespace"
    if code == 404:
        return f"there is no such repository or revision ({said}); check --repo-id and --revision"
    return said

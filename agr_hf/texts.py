"""Texts that go to others, without what is private; and texts that come from others, on one harmless line."""

from __future__ import annotations

import json
import os
import re
from typing import Any

# Access tokens of the Hub: a user's, those of logins in a browser or in CI, an organisation's old ones.
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|hf_(?:jwt|oauth|app)_[A-Za-z0-9._\-]{16,}|api_org_[A-Za-z0-9]{16,}")
# Names of environment variables that hold one.
SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL", re.IGNORECASE)
# Where a path begins that leads out of the working folder, anywhere in a text; of a URL (`https://`) nothing matches.
LOCAL_PATH = re.compile(
    r"""(?<![\w.~/\\\-])(?:
        file:/+
      | [A-Za-z]:[\\/](?![\\/])
      | ~[\w.\-]*[\\/]
      | (?:[^\s'"=:,]*[\\/])?\.\.(?=[\\/]|$)
      | \\\\(?=\w)
      | (?<!:)//(?=\w)
      | /(?=[\w.~$@%])
      | /$
    )""",
    re.VERBOSE,
)
# Control characters, line ends, and what reverses the order of letters.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")


def public(text: str) -> str:
    """A text without secrets, in which a path that leads out of the working folder is its last part.

    Where the path ends cannot be known, for it may hold any character: all is left out up to the last separator of the text.
    """
    text = without_secrets(text)
    found = LOCAL_PATH.search(text)
    if found is None:
        return text
    path = text[found.start() :].rstrip("/\\")
    last = re.split(r"[/\\]", path)[-1]
    return text[: found.start()] + ("" if re.fullmatch(r"\.\.|~.*|[A-Za-z]:|file:", last) else last)


def secrets() -> list[str]:
    """Values of the environment's variables that are named like a token or a password."""
    return [value for name, value in os.environ.items() if SECRETS.search(name) and len(value) >= 8]


def without_secrets(text: str) -> str:
    """The text with access tokens, and whatever the environment keeps under such a name, replaced."""
    for value in secrets():
        text = text.replace(value, "<secret>")
    return TOKEN.sub("<secret>", text)


def holds_secret(content: bytes) -> bool:
    """Whether a token, the one that this user is logged in with, or a secret of the environment is in a file's bytes.

    JSON writes some characters otherwise; a secret is looked for in these ways too.
    """
    from huggingface_hub import get_token

    for value in [*secrets(), *filter(None, [get_token()])]:
        forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        if any(form.encode(errors="replace") in content for form in forms):
            return True
    return re.search(TOKEN.pattern.encode(), content) is not None


def one_line(value: Any) -> str:
    """Text of others on one line, without what moves a terminal's cursor or turns the reading direction."""
    return CONTROLS.sub(" ", str(value)).strip()

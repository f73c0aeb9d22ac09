"""Texts that go to others, without what is private; and texts that come from others, on one harmless line."""

from __future__ import annotations

import html
import json
import os
import re
from typing import Any

# Access tokens of the Hub: a user's, those of logins in a browser or in CI, an organisation's old ones.
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|hf_(?:jwt|oauth|app)_[A-Za-z0-9._\-]{16,}|api_org_[A-Za-z0-9]{16,}")
# Names of environment variables that hold one; TOKENIZERS_PARALLELISM does not.
SECRETS = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|API_KEY|CREDENTIAL", re.IGNORECASE)
# What a path may stand behind; another character is a part of its name.
BEFORE = r"\s'\"`=:,;(\[{<>|&"
# Where a path begins that leads out of the working folder, anywhere in a text; of a URL (`https://`) nothing matches.
LOCAL_PATH = re.compile(
    rf"""(?<![^{BEFORE}])(?:
        (?i:file):/+
      | [A-Za-z]:(?:\\+|/(?!/))
      | ~[\w.\-]*[\\/]
      | (?:[^{BEFORE}]*[\\/])?\.\.(?=[\\/]|$)
      | \\+(?=[\w?.])
      | (?<!:)//+(?=[^\s/])
      | /(?=[^\s/])
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


def secrets() -> dict[str, str]:
    """The environment's variables that are named like a token or a password. A path is none, though it may lead to one."""
    return {
        name: value
        for name, value in os.environ.items()
        if SECRETS.search(name) and len(value) >= 8 and not os.path.exists(value)
    }


def without_secrets(text: str) -> str:
    """The text with access tokens, and whatever the environment keeps under such a name, replaced."""
    for value in secrets().values():
        text = text.replace(value, "<secret>")
    return TOKEN.sub("<secret>", text)


def secret_in(content: bytes) -> str | None:
    """What a file's bytes hold that nobody else may see, in words, or None.

    It is an access token, the one that this user is logged in with, or a secret of the environment. JSON writes some
    characters otherwise; a secret is looked for in these ways too.
    """
    from huggingface_hub import get_token

    known = {f"the value of the environment's {name}": value for name, value in secrets().items()}
    known["the token that you are logged in with"] = get_token() or ""
    for words, value in known.items():
        forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        if value and any(form.encode(errors="replace") in content for form in forms):
            return words
    return "an access token" if re.search(TOKEN.pattern.encode(), content) else None


def one_line(value: Any) -> str:
    """Text of others on one line, without what moves a terminal's cursor or turns the reading direction."""
    return CONTROLS.sub(" ", str(value)).strip()


def markdown(value: Any) -> str:
    """Text that stays text in Markdown: no markup, no HTML, no new cell of a table."""
    # An underscore within a word is none of Markdown's.
    return re.sub(r"([\\`*{}\[\]#|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(one_line(value), quote=False))


def code_span(value: Any) -> str:
    """A code span of any text."""
    text = one_line(value).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"

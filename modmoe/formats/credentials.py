"""Looks for credentials in files that are to be published; what is found is told by its kind and place, never shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

_KINDS: dict[str, re.Pattern[str]] = {
    "a token of the Hugging Face Hub": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\bsk-(?=[A-Za-z0-9_-]{0,200}\d)[A-Za-z0-9_-]{20}"),
    "a key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})"),
    "a token of GitLab": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a token of Slack": re.compile(r"\bxox[abeposr]-[A-Za-z0-9-]{10,}"),
    "a key of Google": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "a token of PyPI": re.compile(r"\bpypi-[A-Za-z0-9_-]{32,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"),
    "a web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,400}\.eyJ[A-Za-z0-9_-]{8}"),
    "a password in an address": re.compile(
        r"://[^\s/:@'\"<>{}$]{1,100}:(?!password|passwd|token|x{3}|\*)[^\s/@'\"<>{}$]{3,200}@"
    ),
    "a password": re.compile(r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+"),
    "a secret value": re.compile(
        r"(?<![A-Za-z0-9])(?:api[_-]?key|secret(?:[_-]?(?:access)?[_-]?key)?|private[_-]?key|access[_-]?token|auth[_-]?token|"
        r"client[_-]?secret|password|passwd)\b[\"']?\s*[:=]\s*[\"']?"
        # a value rather than a word, a call or a placeholder
        r"(?=[^\s\"',;#()\[\]{}<>$]{0,200}[0-9])(?=[^\s\"',;#()\[\]{}<>$]{0,200}[A-Za-z])"
        r"[^\s\"',;#()\[\]{}<>$.]{8}",
        re.IGNORECASE,
    ),
}
"""What looks like a credential, by what it is called. Hashes, words and placeholders do not.

No pattern looks ahead for more than some hundred characters, so that a long line takes as long as many short ones.
"""


def find_credential(text: str, known: Iterable[str | None] = ()) -> tuple[int, str] | None:
    """Return the line, from 1, and the kind of the first credential in a text; None where there is none.

    ``known`` are the user's own tokens, which are found wherever they stand.
    """
    own = [token for token in known if token and len(token) > 3]
    for number, line in enumerate(text.splitlines() or [text], 1):
        if any(token in line for token in own):
            return number, "your token"
        for kind, pattern in _KINDS.items():
            if pattern.search(line):
                return number, kind
    return None

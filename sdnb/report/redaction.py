"""Leaves secrets, home folders and the user's name out of a page."""

import getpass
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector

# The detectors of detect-secrets that are not used. An address is no secret; what is below finds more than the others.
_NOT_USED = ("IPPublic", "BasicAuth", "PrivateKey", "JwtToken", "GitHubToken", "Npm")

# Of a match, the last group is left out, or all if there is none.
_TOKENS = (
    r"(?s:-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z))",
    r"(?<=://)(?!git@|…@)[^\s/@'\"<>]+(?=@)",  # user and password in an address
    r"\s(?:-u|--user)[ =][^\s:'\"]+:(?!…)(\S+)",  # as curl takes them
    r"(?i:authorization).{1,6}?(?i:basic|bearer|token)\s+([\w.~+/-]{3,}=*)",
    r"\b[Bb]earer\s+(?=\S*\d)([\w.~+/-]{8,}=*)",
    r"\beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?",  # JSON web tokens
    r"\b(?:hf|gh[pousr]|github_pat)_\w{8,}",
    r"\bsk-(?=[\w-]*\d)[\w-]{8,}",  # OpenAI, Anthropic and others
    r"\b(?:AIza|ya29\.|GOCSPX-)[\w-]{20,}",  # Google
    r"\bxapp-[\w-]{10,}",  # Slack
    r"[?&]sig=([\w%-]{20,})",  # Azure
    r"\bnpm_\w{30,}",
)

# The value of a name that ends so is a secret. The quotes may be those of Python, JSON or HTML.
_KINDS = "api|access|secret|private|auth|account|client|encryption|license|master|service|signing|storage"
_NAME = rf"(?:(?i:token|secret|passw(?:or)?d|passwd|pwd|passphrase|credentials?|(?:{_KINDS})[_-]?key)|[A-Z\d]_KEY)"
_QUOTE = r"""(?:\\?["']|&quot;|&\#39;|&\#x27;)"""
_QUOTED = rf"(?P<quote>{_QUOTE})(?!<|…)((?:(?!(?P=quote)).){{3,}}?)(?P=quote)"
_NO_SECRET = r"(?:None|none|null|[Tt]rue|[Ff]alse|str|bytes|SecretStr|[\d.]+)\b"
_WORD = rf"(?![-$…\"'\\<]|&quot;|{_NO_SECRET})[^\s\"'&<>(),;\[\]{{}}]{{3,}}"
_ASSIGNED = (
    rf"{_NAME}(?:{_QUOTE})?\]?\s*[=:]\s*[rbf]?{_QUOTED}",  # "…_TOKEN": "value", environ["…_TOKEN"] = "value"
    rf"[A-Z_](?:TOKEN|SECRET|PASSWORD|KEY){_QUOTE}\s*,\s*{_QUOTED}",  # setdefault("…_TOKEN", "value")
    rf"\b(?i:key|auth)(?:{_QUOTE})?\s*[=:]\s*(?P<quote>{_QUOTE})([\w+/=.-]{{16,}})(?P=quote)",  # login(key="value")
    rf"--[\w-]*{_NAME}[= ]+({_WORD})",  # of a command line
    rf"\b[Xx]-[\w-]*(?i:key|token|auth):\s*({_WORD})",  # of a request
    rf"(?<![(,.\w-])(?:[A-Z\d_]*(?:TOKEN|SECRET|PASSW(?:OR)?D|PASSWD|PWD|CREDENTIALS?)|[A-Z\d_]*KEY)=({_WORD})(?!\()",
    rf"(?<![(,.\w-])(?<!, )[\w-]*{_NAME}=(?=[^\s()]*\d)({_WORD})(?!\()",
    rf"(?m:^)[ \t-]*[\w.-]*{_NAME}[ \t]*[:=][ \t]*(?=\S*\d)({_WORD})[ \t]*(?m:$)",  # a line of a settings file
    rf"(?m:^)[ \t-]*[\w.-]*(?i:secret|passw(?:or)?d|passphrase):[ \t]*({_WORD})[ \t]*(?m:$)",
)

_HOME = re.escape(str(Path.home()).rstrip("/") or "/root")  # the home is / in some containers
_HOMES = re.compile(
    rf"(?<![\w.~-])(?:/home/[\w.-]+|/Users/[\w.-]+|/root|{_HOME}|[A-Z]:\\{{1,2}}Users\\{{1,2}}[\w.-]+)(?![\w-])"
)
_EMBEDDED = re.compile(r"(data:[\w/.+-]+;base64,[\w+/=\s]+)")  # may spell anything by chance


def _patterns() -> Iterator[tuple[re.Pattern[str], bool]]:
    """Each with whether all of a match is left out."""
    yield from ((re.compile(pattern), False) for pattern in _TOKENS)
    for detector in get_mapping_from_secret_type_to_class().values():
        if issubclass(detector, RegexBasedDetector) and not detector.__name__.startswith(_NOT_USED):
            yield from ((pattern, True) for pattern in detector.denylist)
    yield from ((re.compile(pattern), False) for pattern in _ASSIGNED)


_PATTERNS = tuple(_patterns())


class Redaction:
    """Replaces what a page should not show, and counts it: `secrets`, and `folders`, which also counts user names."""

    def __init__(self) -> None:
        self.secrets = self.folders = 0
        try:
            self.user = getpass.getuser()
        except (KeyError, OSError):  # some containers have a user without a name
            self.user = Path.home().name or "root"

    def text(self, text: str) -> str:
        """A text without secrets. Home folders become ~, and the user's name becomes … in other paths."""
        pieces = _EMBEDDED.split(text)
        return "".join(piece if number % 2 else self._piece(piece) for number, piece in enumerate(pieces))

    def _piece(self, text: str) -> str:
        for pattern, whole in _PATTERNS:
            text, count = pattern.subn("…" if whole or not pattern.groups else _without_last_group, text)
            self.secrets += count
        text, homes = _HOMES.subn("~", text)
        self.folders += homes
        if self.user != "root":  # the name of nobody
            text, names = re.subn(rf"(?<=/){re.escape(self.user)}(?![\w-])", "…", text)
            self.folders += names
        return text

    def node(self, node: Any) -> Any:
        """The same for all texts in a notebook or a part of it, except images."""
        if isinstance(node, str):
            return self.text(node)
        if isinstance(node, list):
            return [self.node(one) for one in node]
        if isinstance(node, dict):
            return type(node)({key: one if key.startswith("image/") else self.node(one) for key, one in node.items()})
        return node

    def __str__(self) -> str:
        counted = {"secret": self.secrets, "home folder or user name": self.folders}
        return " and ".join(f"{many} × {what}" for what, many in counted.items() if many) or "nothing"


def _without_last_group(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span(match.re.groups))
    return f"{match[0][:start]}…{match[0][end:]}"

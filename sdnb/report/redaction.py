"""Leaves secrets, home folders and the user's name out of a page."""

import getpass
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector

# The detectors of detect-secrets that are not used. An address is no secret. What is below finds more than the others,
# or takes fewer words for secrets, or is not slowed down by long lines.
_NOT_USED = (
    "Artifactory", "BasicAuth", "Cloudant", "GitHubToken", "IPPublic", "Ibm", "JwtToken", "Npm", "OpenAI", "PrivateKey",
    "Softlayer",
)  # fmt: skip

# Of a match, the last group is left out, or all if there is none. Repeats are bounded: a line can be very long.
_START = r"(?:(?<![A-Za-z\d_-])|(?<=\\[nrt]))"
_TOKENS = (
    r"(?s:-----BEGIN [A-Z ]{0,30}PRIVATE KEY.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY[A-Z ]{0,9}-----|\Z))",
    r"(?<=://)[^\s/:@'\"<>]*:(?!\d+/)[^\s'\"<>]{1,200}(?=@[\w.-])",  # user and password in an address
    r"(?<=://)[\w-]{16,200}(?=@(?!sha\d))",
    r"API key[^\n]{0,80}:\s+(\w{20,})",
    r"discord(?:app)?\.com/api/webhooks/([\w/-]{20,})",
    r"\bcurl\b[^\n]{0,200}?\s(?:-u|--user)[ =]['\"]?[^\s:'\"]{1,100}:(?!…)([^\s'\"]+)",
    r"(?i:authorization)\W{1,6}?[bfr]?['\"]?(?i:basic|bearer|token(?=\s+\S*[\d-]))\s+([\w.~+/-]{3,}=*)",
    r"(?i:authorization)['\"]?\s*[:=]\s*['\"](?=\S*\d)([^\s'\"]{8,})['\"]",
    rf"{_START}[Bb]earer\s+(?=\S*\d|\S{{16}})([\w.~+/-]{{8,}}=*)",
    rf"{_START}eyJ[\w-]{{5,}}\.[\w-]{{5,}}(?:\.[\w-]*)?",  # JSON web tokens
    rf"{_START}hf_[A-Za-z\d]{{12,}}(?![\w])",
    rf"{_START}(?:gh[pousr]|github_pat)_\w{{8,}}",
    rf"{_START}sk-(?:(?=[\w-]{{0,60}}\d)[\w-]{{8,}}|[\w-]{{30,}})",  # OpenAI, Anthropic and others
    rf"{_START}(?:gsk|r8|npm)_\w{{20,}}",  # Groq, Replicate, npm
    rf"{_START}(?:AIza|ya29\.|GOCSPX-)[\w-]{{20,}}",  # Google
    rf"{_START}xapp-[\w-]{{10,}}",  # Slack
    r"[?&](?i:[\w-]{0,40}(?:token|key|secret|password|signature|sig))=([^\s&\"'<>]{6,})",
    r"(?i:\blogin|auth_?token)\b\W{1,3}([A-Za-z\d_]{20,})",  # wandb login …, ngrok authtoken …
    r"\blogin\([^)\n]{0,80}?\bkey\s*=\s*(?P<quote>[\"'])([^\s\"']{3,})(?P=quote)",
    r"\blogin\b[^\n]{0,80}?\s-[tp]\s+([^\s'\"]{3,})",
    r"\b(?:sshpass|mysql\w{0,9})\b[^\n]{0,80}?\s-p ?(?!-)([^\s'\"]{3,})",
    r"\bset_password\([^\n]{0,80},\s*(?P<quote>[\"'])([^\"'\n]{3,})(?P=quote)\s*\)",
    r"\bauth\s*=\s*\(\s*[\"'][^\"'\n]{0,80}[\"']\s*,\s*(?P<quote>[\"'])([^\"'\n]{3,})(?P=quote)",
)

# The value of a name that ends so is a secret. Tokens of texts, and keys of tables, are not.
_KINDS = "api|access|secret|private|auth|account|client|deploy|encryption|license|master|service|signing|ssh|storage"
_OF = (
    "hub|auth|access|refresh|api|bearer|secret|session|hf|wandb|bot|user|personal|csrf|jwt|github|gitlab|login|security"
)
_KEY = rf"(?:{_KINDS})[_-]?key"
_PASSWORD = r"(?:passw(?:or)?d|passwd|passphrase|[_-]pwd|[_-]pass)"
_NAME = (
    rf"(?:(?i:{_PASSWORD}|secret|credentials?|{_KEY}|(?:{_OF})[_-]token)"
    r"|[A-Z\d]_(?:TOKEN|PAT)|(?<![A-Za-z\d_-])(?:TOKEN|token))"
)
_CERTAIN = rf"(?:(?i:{_PASSWORD}|{_KEY}|(?:{_OF})[_-]token)|[A-Z\d]_(?:TOKEN|SECRET|PAT))"
_QUOTE = r"""(?:\\?(?:\"{3}|'{3}|["'])|&quot;|&\#34;|&\#39;|&\#x27;|&apos;)"""
_NO_SECRET = (
    r"(?!<|…|--|\*\*|lambda\b|your|\[[A-Z]+\]|\{\w*\}|\$[\w{(]|(?:None|none|null|[Tt]rue|[Ff]alse|str|bytes|bool|int|Any|SecretStr|[\d.]{1,7}"
    r"|HUB_TOKEN)(?![\w.-])|[\w.]{1,80}[(\[])"
)
_QUOTED = rf"(?P<quote>{_QUOTE}){_NO_SECRET}((?:(?!(?P=quote))(?:\\.|.)){{3,}}?)(?P=quote)"
_WORD = rf"(?![-\"'\\]|&quot;|&\#){_NO_SECRET}[^\s\"'<>,;\[\]{{}}()]{{3,}}"
_EQUALS = r"(?:\s*:\s*[\w. |\[\]]{1,30})?\s{0,9}:?[=:]\s{0,9}[(\[]?\s{0,9}[rbfu]{0,2}"
_LINE = r"(?m:^)[ \t]{0,40}(?:- )?[\w.-]{0,60}"
_ASSIGNED = (
    rf"(?i:name|key)[\"']?\s*[:=]\s*[\"']?\w{{0,40}}{_NAME}[\"']?[,\s]{{1,40}}[\"']?value[\"']?\s*[:=]\s*[\"']?({_WORD})",
    rf"{_NAME}(?:{_QUOTE})?\]?{_EQUALS}{_QUOTED}",  # "…_TOKEN": "value", environ["…_TOKEN"] = "value"
    rf"[A-Za-z]_KEY(?:{_QUOTE})?\]?{_EQUALS}(?P<quote>{_QUOTE})(?=\S{{0,60}}[\d-])([^\s\"'&]{{8,}})(?P=quote)",
    rf"(?i:\bkey|\bauth)(?:{_QUOTE})?\s*[=:]\s*(?P<quote>{_QUOTE})(?=\S{{0,60}}\d)([A-Za-z\d+/=-]{{16,}})(?P=quote)",
    rf"{_CERTAIN}{_QUOTE}\s*,\s*{_QUOTED}",  # setdefault("…_TOKEN", "value"), ["--…_token", "value"]
    rf"{_CERTAIN}{_QUOTE}\)\s*or\s*{_QUOTED}",  # getenv("…_TOKEN") or "value"
    rf"(?<![\w-])--[\w-]{{0,40}}{_NAME}[= ]+({_WORD})",  # of a command line
    rf"(?<![\w-])--[\w-]{{0,40}}{_NAME}[= ]+{_QUOTED}",
    rf"(?<![\w-])[\w-]{{0,40}}-(?i:key|token|auth):\s*({_WORD})",  # of a request
    rf"(?:env|ENV|setx|set -x|configure set)\s+\w{{0,40}}{_NAME}[ =\t]+({_WORD})",  # %env …_TOKEN value
    r"(?m:^)[ \t]{0,40}(?:[%!]?(?:set_)?env:? |!?export |ENV )?[A-Z\d_]{0,40}"
    rf"(?:TOKEN|SECRET|PASSWORD|PASSWD|_PASS|_PWD|_PAT|CREDENTIALS?|(?<![A-Z\d_])KEY|_KEY)=(?![\"'\\]){_NO_SECRET}"
    r"(\S{3,})[ \t]*(?m:$)",
    r"(?:(?<![(,.\w-])|(?<=-e))[A-Z\d_]{0,40}"
    rf"(?:TOKEN|SECRET|PASSWORD|PASSWD|_PASS|_PWD|_PAT|CREDENTIALS?|(?<![A-Z\d_])KEY|(?i:{_KEY}))=({_WORD})",
    rf"(?<![(,.\w-])(?<!, )\w{{0,40}}{_NAME}=(?=[^\s()]{{0,60}}[\d-]|[^\s()]{{16}})({_WORD})",
    rf"{_LINE}{_CERTAIN}[ \t]*[:=][ \t]*(?=\S*[\d-]|\S{{16}})({_WORD})[ \t]*(?:#.*)?(?m:$)",  # of a settings file
    rf"{_LINE}(?i:secret|{_PASSWORD})[ \t]*[:=][ \t]*({_WORD})[ \t]*(?:#.*)?(?m:$)",
    rf"\bpassword=({_WORD})",
    r"\bpassword[ \t]+(?=\S*\d)(\S{12,})",
    r"(?i:password)[\"']?\s*[:=]\s*(\d{4,})",
    rf"{_CERTAIN}(?:\s*[|│]\s*|[ \t]{{2,40}}|(?:\s*</?\w{{1,9}}[^<>]{{0,80}}>){{1,4}}=?\s*|>|&gt;)"  # of a table
    rf"(?=\S{{0,60}}[\d-]|\S{{16}})({_WORD})",
)

_HOME = re.escape(str(Path.home()).rstrip("/") or "/root")  # the home is / in some containers
_HOMES = re.compile(
    rf"(?:(?<![\w.~<}}\])-])|(?<=-[IL]))(?:/home/[\w.-]+|/Users/(?!Shared\b)[\w.-]+|/mnt/[a-z]/Users/[\w.-]+|/root|{_HOME}"
    r"|(?i:[a-z]:\\{1,2}users\\{1,2})(?:[\w.-]+(?: [\w.-]+){0,3}(?=\\)|[\w.-]+))(?![\w-])"
)
_EMBEDDED = re.compile(r"(?<=[\"'(])(data:[\w/.+-]{1,80};base64,[\w+/=\s]+)(?=[\"')])")  # may spell anything by chance
_COLOURS = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_IS_NAME = re.compile(rf"{_NAME}$")


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
        """A text without secrets. Home folders become ~, and the user's name becomes … in other paths. A text in which
        something was left out loses its colours, which stand between a name and its value."""
        before = self.secrets + self.folders
        pieces = _EMBEDDED.split(_COLOURS.sub("", text))
        plain = "".join(piece if number % 2 else self._piece(piece) for number, piece in enumerate(pieces))
        return plain if self.secrets + self.folders > before else text

    def _piece(self, text: str) -> str:
        for pattern, whole in _PATTERNS:
            text, count = pattern.subn("…" if whole or not pattern.groups else _without_last_group, text)
            self.secrets += count
        text, homes = _HOMES.subn("~", text)
        self.folders += homes
        if self.user != "root":  # the name of nobody
            user = re.escape(self.user)
            text, names = re.subn(rf"(?<=/){user}(?![\w-])|(?<![\w.-]){user}(?=/)", "…", text)
            self.folders += names
        return text

    def node(self, node: Any, name: str = "") -> Any:
        """The same for all texts in a notebook or a part of it, except images of pixels. `name`: its key."""
        if isinstance(node, str):
            if _IS_NAME.search(name) and len(node) > 2:
                self.secrets += 1
                return "…"
            return node if name.startswith("image/") and not name.startswith("image/svg") else self.text(node)
        if isinstance(node, list):
            return [self.node(one) for one in node]
        if isinstance(node, dict):
            return type(node)({key: self.node(one, key) for key, one in node.items()})
        return node

    def __str__(self) -> str:
        counted = {"secret": self.secrets, "home folder or user name": self.folders}
        return " and ".join(f"{many} × {what}" for what, many in counted.items() if many) or "nothing"


def _without_last_group(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span(match.re.groups))
    return f"{match[0][:start]}…{match[0][end:]}"

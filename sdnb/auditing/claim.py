"""What someone says about a training: `17.88 images/s per GPU`, `2.040 s/it`, `loss 0.0456`."""

import re
from dataclasses import dataclass

from sdnb.errors import ConfigError

PER_DEVICE, TOGETHER, SECONDS, LOSS = "images/s per device", "images/s", "s/it", "loss"
# With a point before the decimals, commas between thousands, and nothing that makes it another number.
_NUMBER = r"(?<![\w.,±<>~-])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,15}(?:\.\d{1,15})?(?:e-?\d{1,2})?)(?![\d.,±]|\w*±)"
_SECOND, _STEP, _PER = r"(?:s|secs?|seconds?)", r"(?:it|iter|iteration|step)s?", r"\s*(?:/|per)\s*"
_IMAGES = r"(?:images?|imgs?|samples?)"
_PER_DEVICE_AND_SECOND = rf"{_IMAGES}{_PER}[\w-]+{_PER}{_SECOND}\b"
# A number stands beside its unit. The other numbers in a claim, as of devices or in a model's name, have other units.
_UNITS = {
    "rate": rf"{_NUMBER}\s*(?:{_IMAGES}{_PER}{_SECOND}\b|{_PER_DEVICE_AND_SECOND}|fps\b)",
    "ips": rf"{_NUMBER}\s*ips\b|\bips(?:\s*[=:]|\s+of)?\s*{_NUMBER}",
    "seconds": rf"{_NUMBER}\s*{_SECOND}{_PER}{_STEP}\b",
    "milliseconds": rf"{_NUMBER}\s*(?:ms|milliseconds?){_PER}{_STEP}\b",
    "steps": rf"{_NUMBER}\s*{_STEP}{_PER}{_SECOND}\b",
    "loss": rf"\b(?:train_|step_|training )?loss(?:\s*[=:]|\s+(?:of|is|was))?\s*{_NUMBER}",
}
_PATTERNS = {unit: re.compile(pattern, re.IGNORECASE) for unit, pattern in _UNITS.items()}
_OTHER_LOSS = r"\b(?:val(?:idation)?|eval|held[- ]out|test)[ _-]?loss"
_SEVERAL = r"\d (?:or|to) \d|(?<![\w.-])\d{1,3} \d{3}\b"  # also blanks between thousands
_NO_CLAIM = re.compile(f"{_OTHER_LOSS}|{_SEVERAL}", re.IGNORECASE)
_GROUP = re.compile(r"\b(?:node|machine|host|server|cluster)s?\b", re.IGNORECASE)
_ONE = re.compile(r"(?:\bper[ -]|/ ?|\band (?=gpu|device)|\beach\b|\b(?:one|single) )\S*", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """A claimed number. `rounding` is half a unit of its last digit."""

    text: str
    kind: str
    value: float
    rounding: float


def claim_of(text: str) -> Claim:
    """Read a claim. Raises ConfigError if it has no number with a unit that can be audited, or several."""
    found = [(unit, match) for unit, pattern in _PATTERNS.items() for match in pattern.finditer(text)]
    if len(found) != 1 or _NO_CLAIM.search(text):
        units = "images/s per GPU, images/s (of all), s/it, ms/step, it/s, and loss"
        raise ConfigError(
            f"claim = {text!r}: give one number with its unit, such as «17.88 images/s per GPU»; decimals follow a "
            f"point. What can be audited: {units}"
        )
    ((unit, match),) = found
    digits, _, exponent = next(filter(None, match.groups())).replace(",", "").partition("e")
    scale = 10.0 ** int(exponent or 0) / (1000 if unit == "milliseconds" else 1)
    value, rounding = float(digits) * scale, 0.5 * 10 ** -len(digits.partition(".")[2]) * scale
    if not value:
        raise ConfigError(f"claim = {text!r}: 0 is no figure of a training; give one number with its unit")
    if unit == "steps":
        return Claim(text, SECONDS, 1 / value, rounding / value**2)
    kinds = {"seconds": SECONDS, "milliseconds": SECONDS, "loss": LOSS, "ips": PER_DEVICE}
    return Claim(text, kinds.get(unit) or _kind_of_rate(text, match), value, rounding)


def _kind_of_rate(text: str, rate: re.Match[str]) -> str:
    """Whether images/s are those of one device. Raises ConfigError if they are those of a group of devices."""
    inside = re.search(_PER_DEVICE_AND_SECOND, rate[0], re.IGNORECASE)
    said = " ".join([inside[0] if inside else "", *_ONE.findall(text[: rate.start()] + " " + text[rate.end() :])])
    if _GROUP.search(said):
        raise ConfigError(f"claim = {text!r}: give the images/s of one device or of all: a machine has any number")
    return PER_DEVICE if said.strip() else TOGETHER

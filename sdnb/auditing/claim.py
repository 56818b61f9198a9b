"""What someone says about a training: `17.88 images/s per GPU`, `2.040 s/it`, `loss 0.0456`."""

import re
from dataclasses import dataclass

from sdnb.errors import ConfigError

PER_DEVICE, TOGETHER, SECONDS, LOSS = "images/s per device", "images/s", "s/it", "loss"
_NUMBER = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?)(?![\d.])")
_DEVICE = r"(?:gpu|npu|device|accelerator|chip|card|rank)s?"
_KINDS = {
    LOSS: r"\bloss\b",
    SECONDS: r"\bs ?/ ?(?:it|step)\b|\bseconds? per (?:step|iteration)\b|\bsec/(?:it|step)\b",
    PER_DEVICE: rf"\b(?:images?|imgs?|samples?) ?(?:/ ?s|/ ?sec|per second)\b.*(?:/ ?|\bper |\ba ){_DEVICE}\b|\bIPS\b",
    TOGETHER: r"\b(?:images?|imgs?|samples?) ?(?:/ ?s|/ ?sec|per second)\b|\bFPS\b",
}


@dataclass(frozen=True)
class Claim:
    """A claimed number. `rounding` is half a unit of its last digit."""

    text: str
    kind: str
    value: float
    rounding: float


def claim_of(text: str) -> Claim:
    """Read a claim. Raises ConfigError if it has no number, or several, or none of the units that can be audited."""
    numbers = _NUMBER.findall(re.sub(rf"\b(?:on|with|for) \d+ (?:\S+ )?{_DEVICE}\b", "", text, flags=re.IGNORECASE))
    kind = next((kind for kind, unit in _KINDS.items() if re.search(unit, text, re.IGNORECASE)), None)
    if len(numbers) != 1 or kind is None or float(numbers[0].replace(",", "")) == 0:
        raise ConfigError(
            f"claim = {text!r}: give one number with its unit: images/s per GPU, images/s (of all), s/it, or loss, "
            "such as «17.88 images/s per GPU»"
        )
    digits = numbers[0].replace(",", "")
    return Claim(text, kind, float(digits), 0.5 * 10 ** -len(digits.partition(".")[2]))

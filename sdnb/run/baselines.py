"""Published measurements to compare with."""

from pathlib import Path

UNKNOWN = "unknown"
# The measurement of Stable Diffusion v1-4 on eight GPUs behind the published 17.88, as a run folder.
PUBLISHED = Path(__file__).parent / "published" / "sd-v1-4-8-gpus-2024"

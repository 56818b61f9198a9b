"""The frozen half of the model, VAE and text encoder: run for each micro-batch, or once a picture and a caption."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdnb.cache import cache_root
from sdnb.data.image_captions import ImageCaptions, tokenize
from sdnb.data.transforms import normalize
from sdnb.errors import CacheError
from sdnb.machine import environment
from sdnb.models.encoding_cache import Table, size_of
from sdnb.models.pipeline import Parts
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# A change of one of these may change what is computed.
_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "ftfy", "pillow")
_AT_ONCE = {"cpu": 4}  # pictures: eight were 0 to 5 % faster there, and took 0.1 GiB more


class Encoders:
    """Gives the moments of the VAE's posterior and the text encoder's hidden states for a micro-batch.

    What it keeps are the moments and not a draw from them, so that drawing and its order stay as they are. A picture, a
    mirrored picture, and a caption are each encoded when they are first met, in one batch with what else of the
    micro-batch was not met before; in float32 on a CPU what they give is the same, to the bit, in any company.
    """

    def __init__(self, parts: Parts, examples: ImageCaptions, config: TrainConfig, device: torch.device) -> None:
        """Args:
        examples: the pictures and captions to be met; told what is kept, so that they load no more than is needed.
        """
        dtype = WEIGHT_DTYPES[config.mixed_precision]
        self.device, self.examples = device, examples
        self.vae = parts.vae.to(device, dtype)
        self.text_encoder = parts.text_encoder.to(device, dtype)
        self.moments = self.hidden_states = None
        self._new: dict[Table, dict[int, tuple[Tensor, Tensor]]] = {}
        self._layouts: dict[int, Tensor] = {}
        self.encoded_images = self.encoded_captions = 0
        self._warned = False
        reason = _why_not(config)
        if reason is None:
            try:
                self._open_tables(parts, examples, config, dtype)
            except CacheError as error:
                reason = str(error)
        if reason is not None:
            logger.info("the encoders run for every micro-batch: %s", reason)
        else:
            examples.keep(self.moments)
            self._laid_out(config.train_batch_size)  # now, while memory for a batch of pictures is given back

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Moments [batch, 2 × channels, h, w], the mean and the logarithm of the variance, and hidden states [batch,
        tokens, width] of a micro-batch of `ImageCaptions.collate`."""
        if self.moments is None:
            pixels, token_ids = batch["pixels"], batch["input_ids"]
            self.encoded_images += len(pixels)
            self.encoded_captions += len(token_ids)
            return self._encode_pictures(torch.stack(pixels)), self._encode_captions(token_ids)
        pixels = dict(zip(batch["loaded"], batch["pixels"]))

        def encode_views(views: list[int]) -> Tensor:
            # not among the pixels if its row turned out to be torn
            missing = [pixels[view] if view in pixels else self.examples.levels(view) for view in views]
            pieces = torch.stack(missing).split(_AT_ONCE.get(self.device.type, len(missing)))
            # One picture alone would go through other kernels (oneDNN's), whose last bits are others.
            company = [piece if len(piece) > 1 else piece.repeat(2, 1, 1, 1) for piece in pieces]
            return torch.cat([self._encode_pictures(together) for together in company])[: len(missing)]

        def encode_captions(captions: list[int]) -> Tensor:
            return self._encode_captions(self.token_ids[captions])

        moments, new = self._look_up(self.moments, batch["views"], encode_views)
        hidden_states, new_captions = self._look_up(self.hidden_states, batch["captions"], encode_captions)
        self.encoded_images += new
        self.encoded_captions += new_captions
        return torch.empty_like(self._laid_out(len(moments))).copy_(moments), hidden_states

    def take_counts(self) -> tuple[int, int]:
        """How many pictures and captions were encoded since the last time that this was asked."""
        counts = self.encoded_images, self.encoded_captions
        self.encoded_images = self.encoded_captions = 0
        return counts

    def keep_new(self) -> None:
        """Write what was computed since the last time into the tables. To be called when the device has come to rest:
        it is not waited for here."""
        for table, new in self._new.items():
            try:
                for row, (_, values) in new.items():
                    table.write(row, values)
            except OSError as error:  # such as on a full disk: what is not kept is encoded again
                if not self._warned:
                    logger.warning("%s: not all that the encoders give can be kept: %s", table.path, error)
                self._warned = True
            new.clear()

    def _look_up(self, table: Table, rows: Sequence[int], encode: Callable[[list[int]], Tensor]) -> tuple[Tensor, int]:
        """The rows on the device, and how many had to be computed; those are on their way to the host."""
        new = self._new.setdefault(table, {})
        read = {row: table.read(row) for row in rows if row not in new}
        missing = [row for row, values in read.items() if values is None]
        kept = {row: values for row, values in read.items() if values is not None}
        if missing:
            values = encode(missing)
            new.update(zip(missing, zip(values, values.to("cpu", non_blocking=True))))
        found = {row: values for row, (values, _) in new.items()}
        if kept:
            found |= zip(kept, self._sent(torch.stack(list(kept.values()))))
        return torch.stack([found[row] for row in rows]), len(missing)

    def _sent(self, values: Tensor) -> Tensor:
        """Values of the host on the device, which is not waited for."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    @torch.no_grad()
    def _encode_pictures(self, levels: Tensor) -> Tensor:
        pictures = normalize(self._sent(levels)).to(self.vae.dtype)
        return self.vae.encode(pictures).latent_dist.parameters

    @torch.no_grad()
    def _encode_captions(self, token_ids: Tensor) -> Tensor:
        return self.text_encoder(self._sent(token_ids), return_dict=False)[0]

    def _laid_out(self, batch_size: int) -> Tensor:
        """Moments as the VAE lays them out for so many pictures: noise that is drawn like the latents fills them in the
        order in which they lie in memory, and that is not the same for every number of pictures."""
        if batch_size not in self._layouts:
            side = self.examples.config.resolution
            self._layouts[batch_size] = self._encode_pictures(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))
        return self._layouts[batch_size]

    def _open_tables(self, parts: Parts, examples: ImageCaptions, config: TrainConfig, dtype: torch.dtype) -> None:
        side = config.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
        moments = (2 * parts.vae.config.latent_channels, side, side)
        captions = examples.distinct_captions
        hidden_states = (parts.tokenizer.model_max_length, parts.text_encoder.config.hidden_size)
        folder = cache_root(config.cache_dir) / "encodings"
        limit = config.encoder_cache_gib * 2**30
        needed = size_of(examples.views, moments, dtype) + size_of(len(captions), hidden_states, dtype)
        if needed > limit:
            raise CacheError(
                f"{needed / 2**30:.2f} GiB would be needed to keep what they give, and encoder_cache_gib is "
                f"{config.encoder_cache_gib:g}"
            )
        self.token_ids = torch.cat(
            [tokenize(parts.tokenizer, captions[start : start + 1000]) for start in range(0, len(captions), 1000)]
        )
        packages = [f"{name} {environment.version_of(name)}" for name in _PACKAGES]
        computed_with = [str(dtype), f"TF32 {config.allow_tf32}", environment.devices().names[0], *packages]
        token_ids = hashlib.sha256(self.token_ids.numpy()).hexdigest()
        tables = (
            ("moments", [*computed_with, _digest(parts.vae), examples.pixels_digest()], examples.views, moments),
            ("hidden_states", [*computed_with, _digest(parts.text_encoder), token_ids], len(captions), hidden_states),
        )
        self.moments, self.hidden_states = (
            Table(folder, kind, json.dumps(key), rows, shape, dtype, limit) for kind, key, rows, shape in tables
        )
        logger.info(
            "the encoders run once for each of %d views of pictures and %d captions; what they give is kept in %s",
            examples.views, len(captions), folder,
        )  # fmt: skip


def _why_not(config: TrainConfig) -> str | None:
    if not config.encoder_cache_gib:
        return "encoder_cache_gib is 0"
    if not config.center_crop:
        return "the crop is random (center_crop is not set), so no picture is seen twice"
    return None


def _digest(model: torch.nn.Module) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

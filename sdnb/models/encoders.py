"""The frozen encoders, VAE and text encoder: run for every micro-batch, or once per image and caption."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdnb.cache import cache_root
from sdnb.data.image_captions import ImageCaptions, tokenize
from sdnb.data.stream import ImageStream
from sdnb.data.transforms import normalize
from sdnb.errors import CacheError
from sdnb.machine import environment
from sdnb.machine.device import WEIGHT_DTYPES
from sdnb.machine.device_kind import HOST, kind_of
from sdnb.models.encoding_cache import EncodingCache, size_of
from sdnb.models.pipeline import Parts
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")

# A new version of one of these may compute other values.
_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "ftfy", "pillow")


class Encoders:
    """Computes the moments of the VAE's posterior, and the text encoder's hidden states, for a micro-batch.

    The cache holds moments and not latents drawn from them, so the random draws and their order stay the same. An
    image, its mirror image and a caption are each encoded when they first occur, in one batch with the other new ones
    of the micro-batch. In float32 on a CPU the result does not depend on the rest of that batch, to the bit.
    """

    def __init__(
        self, parts: Parts, examples: ImageCaptions | ImageStream, config: TrainConfig, device: torch.device
    ) -> None:
        """`examples` are the images and captions of all micro-batches."""
        dtype = WEIGHT_DTYPES[config.mixed_precision]
        self.device, self.kind, self.examples = device, kind_of(device.type), examples
        self.vae = parts.vae.to(device, dtype)
        self.text_encoder = parts.text_encoder.to(device, dtype)
        self.moments: EncodingCache | None = None
        self.hidden_states: EncodingCache | None = None
        self._new: dict[EncodingCache, dict[int, tuple[Tensor, Tensor]]] = {}
        self._memory_layouts: dict[int, Tensor] = {}
        self.encoded_images = self.encoded_captions = 0
        self._warned = False
        try:
            self._open_caches(parts, config, dtype)
            self._memory_layout(config.train_batch_size)  # now, so that the memory it takes is released before the run
        except CacheError as reason:
            logger.info("the encoders run for every micro-batch: %s", reason)

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Moments [batch, 2 × channels, h, w], the mean and the logarithm of the variance, and hidden states [batch,
        tokens, width] of a micro-batch of `TrainingSet.collate`."""
        if self.moments is None or self.hidden_states is None:
            pixels, token_ids = batch["pixels"], batch["input_ids"]
            self.encoded_images += len(pixels)
            self.encoded_captions += len(token_ids)
            return self._encode_images(torch.stack(pixels)), self._encode_captions(token_ids)
        loaded = dict(zip(batch["loaded"], batch["pixels"]))

        def encode_views(views: list[int]) -> Tensor:
            # A view is not loaded if its row was found damaged only now.
            pixels = [loaded[view] if view in loaded else self.examples.pixels_uint8(view) for view in views]
            pieces = torch.stack(pixels).split(self.kind.images_at_once or len(pixels))
            # A single image would be computed by other kernels of oneDNN, with other last bits.
            pairs = [piece if len(piece) > 1 else piece.repeat(2, 1, 1, 1) for piece in pieces]
            return torch.cat([self._encode_images(piece) for piece in pairs])[: len(pixels)]

        def encode_captions(captions: list[int]) -> Tensor:
            return self._encode_captions(self.token_ids[captions])

        moments, new_images = self._look_up(self.moments, batch["views"], encode_views)
        hidden_states, new_captions = self._look_up(self.hidden_states, batch["captions"], encode_captions)
        self.encoded_images += new_images
        self.encoded_captions += new_captions
        return torch.empty_like(self._memory_layout(len(moments))).copy_(moments), hidden_states

    def take_counts(self) -> tuple[int, int]:
        """Images and captions that were encoded since the last call."""
        counts = self.encoded_images, self.encoded_captions
        self.encoded_images = self.encoded_captions = 0
        return counts

    def store_new(self) -> None:
        """Write new encodings into the cache. The device must be idle: this does not wait for it."""
        for cache, new in self._new.items():
            try:
                for row, (_, values) in new.items():
                    cache.write(row, values)
            except OSError as error:  # such as a full disk: what is not stored will be encoded again
                if not self._warned:
                    logger.warning("%s: some encodings cannot be stored: %s", cache.path, error)
                self._warned = True
            new.clear()

    def _look_up(
        self, cache: EncodingCache, rows: Sequence[int], encode: Callable[[list[int]], Tensor]
    ) -> tuple[Tensor, int]:
        """The rows on the device, and how many had to be computed. Those are also on their way to the host."""
        new = self._new.setdefault(cache, {})
        read = {row: cache.read(row) for row in rows if row not in new}
        missing = [row for row, values in read.items() if values is None]
        stored = {row: values for row, values in read.items() if values is not None}
        if missing:
            values = encode(missing)
            new.update(zip(missing, zip(values, values.to(HOST, non_blocking=True))))
        found = {row: values for row, (values, _) in new.items()}
        if stored:
            found |= zip(stored, self._to_device(torch.stack(list(stored.values()))))
        return torch.stack([found[row] for row in rows]), len(missing)

    def _to_device(self, values: Tensor) -> Tensor:
        """Copies without waiting for the device."""
        return self.kind.pinned(values).to(self.device, non_blocking=self.kind.pins_memory)

    @torch.no_grad()
    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(normalize(self._to_device(pixels)).to(self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def _encode_captions(self, token_ids: Tensor) -> Tensor:
        return self.text_encoder(self._to_device(token_ids), return_dict=False)[0]

    def _memory_layout(self, batch_size: int) -> Tensor:
        """Moments in the memory layout that the VAE gives a batch of this size. Noise drawn like the latents fills them
        in the order of their memory, and the VAE's layout depends on the batch size."""
        if batch_size not in self._memory_layouts:
            side = self.examples.settings.resolution
            black = torch.zeros(batch_size, 3, side, side, dtype=torch.uint8)
            self._memory_layouts[batch_size] = self._encode_images(black)
        return self._memory_layouts[batch_size]

    def _open_caches(self, parts: Parts, config: TrainConfig, dtype: torch.dtype) -> None:
        """Raises CacheError if the encodings cannot be cached."""
        if not config.encoder_cache_gib:
            raise CacheError("encoder_cache_gib is 0")
        if not config.center_crop:
            raise CacheError("the crop is random (center_crop is not set), so no image occurs twice")
        if isinstance(self.examples, ImageStream):
            raise CacheError("the data set is a stream")
        examples, captions = self.examples, self.examples.distinct_captions
        side = config.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
        moments = (2 * parts.vae.config.latent_channels, side, side)
        hidden_states = (parts.tokenizer.model_max_length, parts.text_encoder.config.hidden_size)
        folder = cache_root(config.cache_dir) / "encodings"
        limit = config.encoder_cache_gib * 2**30
        needed = size_of(examples.views, moments, dtype) + size_of(len(captions), hidden_states, dtype)
        if needed > limit:
            size = f"{needed / 2**30:.2f} GiB"
            raise CacheError(f"the cache of their outputs needs {size}, and encoder_cache_gib is {limit / 2**30:g}")
        thousands = [captions[start : start + 1000] for start in range(0, len(captions), 1000)]
        self.token_ids = torch.cat([tokenize(parts.tokenizer, some) for some in thousands])
        packages = [f"{name} {environment.version_of(name)}" for name in _PACKAGES]
        computed_with = [str(dtype), f"TF32 {config.allow_tf32}", environment.devices().names[0], *packages]
        key = json.dumps([*computed_with, _digest(parts.vae), examples.pixels_digest()])
        images = EncodingCache(folder, "moments", key, examples.views, moments, dtype, limit)
        token_ids = hashlib.sha256(self.token_ids.numpy()).hexdigest()
        key = json.dumps([*computed_with, _digest(parts.text_encoder), token_ids])
        self.hidden_states = EncodingCache(folder, "hidden_states", key, len(captions), hidden_states, dtype, limit)
        self.moments = images  # only with both of them
        message = "the encoders run once for each of %d images (with mirror images) and %d captions; cache: %s"
        logger.info(message, examples.views, len(captions), folder)


def _digest(model: torch.nn.Module) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

"""What differs between the versions of the libraries, from those of early 2024 to today's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def first_failure(error: Exception) -> tuple[int, int]:
    """The rank that failed first, and its exit code (a signal's number with a minus), from what accelerate's
    notebook_launcher raises: accelerate before 1.0 starts ranks with torch's `start_processes`, later with its elastic
    agent. Anything else is raised again."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.multiprocessing import ProcessExitedException

    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    if isinstance(error, ProcessExitedException):
        return error.error_index, error.exit_code
    raise error


def clip_tokenizer(tokens: list[str], merges: list[tuple[str, str]], max_length: int, fast: bool = False) -> Any:
    """transformers' CLIPTokenizer of a vocabulary. transformers before 5 makes it from files, and has a second one that
    is `fast`, which alone has a `backend_tokenizer`."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
    kind = transformers.CLIPTokenizerFast if fast else transformers.CLIPTokenizer
    with tempfile.TemporaryDirectory() as folder:
        return kind(*map(str, write_vocabulary(Path(folder), tokens, merges)), model_max_length=max_length)


def has_fused_adam(device_type: str) -> bool:
    """Whether torch's AdamW updates all weights on such a device in one pass: on a CPU since torch 2.4, on a GPU since
    2.5. Until then it refused there gradients whose strides are not the weights', in dimensions of size 1 as well (its
    ATen/native/ForeachUtils.h)."""
    import torch

    return torch.torch_version.TorchVersion(torch.__version__) >= ((2, 5) if device_type == "cuda" else (2, 4))


def has_stances() -> bool:
    """Whether torch can be told to run uncompiled what it would compile anew: since 2.6."""
    import torch

    return hasattr(torch.compiler, "set_stance")


def save_contiguous(module: Any) -> None:
    """Have the state dict of a module, which is what is saved of it, hold contiguous tensors: safetensors of 2024 takes
    no others."""

    def contiguous(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in state:
            state[name] = state[name].contiguous()

    module._register_state_dict_hook(contiguous)


def read_vocabulary(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """What `write_vocabulary` has written."""
    tokens = json.loads((folder / VOCABULARY).read_text())
    _, *pairs = (folder / MERGES).read_text().splitlines()
    return sorted(tokens, key=tokens.get), [tuple(pair.split(" ")) for pair in pairs]


def write_vocabulary(folder: Path, tokens: list[str], merges: list[tuple[str, str]]) -> tuple[Path, Path]:
    """The two files that transformers before 5 reads a CLIPTokenizer from, and later ones do not write."""
    vocabulary, pairs = folder / VOCABULARY, folder / MERGES
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False))
    pairs.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return vocabulary, pairs

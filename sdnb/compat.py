"""Differences between versions of the libraries, from early 2024 until now."""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def first_failure(error: Exception) -> tuple[int, int]:
    """The rank that failed first, and its exit code (minus the number of a signal), from an exception of accelerate's
    notebook_launcher: of torch's elastic agent, which may have got the signal itself, or before accelerate 1.0 of
    `start_processes`. Raises any other."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.multiprocessing import ProcessExitedException

    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    if isinstance(error, SignalException):
        return 0, -error.sigval
    if isinstance(error, ProcessExitedException):
        return error.error_index, error.exit_code
    raise error


def clip_tokenizer(tokens: list[str], merges: list[tuple[str, str]], max_length: int) -> Any:
    """transformers' CLIPTokenizer of a vocabulary. transformers before 5 makes it from files."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
    with tempfile.TemporaryDirectory() as folder:
        files = write_vocabulary(Path(folder), tokens, merges)
        return transformers.CLIPTokenizer(*map(str, files), model_max_length=max_length)


def torch_since(*version: int) -> bool:
    """Whether torch has this version, such as (2, 5), or a later one."""
    import torch

    return torch.torch_version.TorchVersion(torch.__version__) >= version


def has_stances() -> bool:
    """Whether torch can be told to run uncompiled what it would otherwise compile again: since 2.6."""
    import torch

    return hasattr(torch.compiler, "set_stance")


def read_vocabulary(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges, as `write_vocabulary` wrote them."""
    tokens = json.loads((folder / VOCABULARY).read_text())
    _, *pairs = (folder / MERGES).read_text().splitlines()
    return sorted(tokens, key=tokens.get), [tuple(pair.split(" ")) for pair in pairs]


def write_vocabulary(folder: Path, tokens: list[str], merges: list[tuple[str, str]]) -> tuple[Path, Path]:
    """Write the two files from which transformers before 5 reads a CLIPTokenizer. Later versions do not write them."""
    vocabulary, pairs = folder / VOCABULARY, folder / MERGES
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False))
    pairs.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return vocabulary, pairs


def one_shard_at_a_time(shuffle: Any) -> dict[str, int]:
    """What tells the method `shuffle` of a stream to fill its buffer from one shard after the other. Since version 5
    `datasets` reads ten by turns, each in a thread, and then waits five seconds after the last parquet file."""
    name = "max_buffer_input_shards"
    return {name: 1} if name in inspect.signature(shuffle).parameters else {}

"""The lines of a text file that a program or a terminal wrote, without what only a terminal needs."""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

from sdnb.errors import RunError

LONGEST_LINE = 1 << 22  # characters; a log whose line breaks were lost has all states of its progress bar in one line
_CHUNK = 1 << 20
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_BREAK = re.compile(r"\r\n?|\n|\^M")  # `cat -v` and some editors write a carriage return as ^M
# Colours and cursor movements (ECMA-48), also as `cat -v` writes them; and titles of windows.
_TERMINAL = re.compile(r"(?:\x1b|\^\[)(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,500}(?:\x07|\x1b\\)|[@-Z\\^_])|[\x00\x08]")


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file. A carriage return ends a line, too. The encoding is that of the mark at its start,
    else UTF-8. Raises RunError if the file cannot be read, or a line is longer than a log's."""
    try:
        with path.open("rb") as file:
            decoder = codecs.getincrementaldecoder(_encoding(file.read(4)))(errors="replace")
            file.seek(0)
            yield from _lines(file, decoder, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def _encoding(start: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _lines(file: io.BufferedReader, decoder: codecs.IncrementalDecoder, path: Path) -> Iterator[str]:
    rest, number = "", 0
    while True:
        chunk = file.read(_CHUNK)
        *complete, rest = _BREAK.split(rest + decoder.decode(chunk, final=not chunk))
        for line in [*complete, rest]:
            if len(line) > LONGEST_LINE:
                raise RunError(f"{path}: line {number + 1} has more than {LONGEST_LINE:,} characters: this is no log")
            if line is not rest or not chunk:
                number += 1
                yield _TERMINAL.sub("", line) if line else line
        if not chunk:
            return

"""Text as bytes: which files, which of them are held out, and which bytes each step sees.

Everything here is a function of the files, a seed and a position, so that a resumed run reads
exactly the bytes that an uninterrupted run would have read.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALIDATION_SHARE = 0.05
MAX_BYTES = 1 << 30
# Tables, generated text and tests teach a small model little about how people write Python.
_STDLIB_SKIP = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings",
    "pydoc_data", "lib-dynload", "turtledemo", "ensurepip",
}  # fmt: skip


class DataError(ValueError):
    """The text cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class Corpus:
    """The text: `train` and `valid` are uint8 arrays `[bytes]`, with a zero byte between files."""

    name: str
    train: np.ndarray
    valid: np.ndarray
    num_files: int
    num_valid_files: int
    fingerprint: str


def load_corpus(path: Path | None = None) -> Corpus:
    """Reads the standard library's Python sources, or the file or folder `path`.

    A folder's text files are split by file into training and validation; of a single file the
    last twentieth is held out. Raises `DataError` where there is nothing to read.
    """
    if path is None:
        root, name = Path(sysconfig.get_paths()["stdlib"]), "the Python standard library"
        paths = _walk(root, _STDLIB_SKIP, suffix=".py")
    elif path.is_file():
        root, name, paths = path.parent, str(path), [path]
    elif path.is_dir():
        root, name = path, str(path)
        paths = _walk(path, {"__pycache__", "node_modules"}, suffix="")
    else:
        raise DataError(f"--data: {path} is neither a file nor a folder.")
    texts = _read(root, paths)
    if not texts:
        raise DataError(f"--data: found no UTF-8 text in {name}.")
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - max(1, int(len(text) * VALIDATION_SHARE))
        train, valid, num_valid = text[:cut], text[cut:], 0
    else:
        held_out = _held_out({name: len(text) for name, text in texts.items()})
        train = b"\0".join(text for name, text in texts.items() if name not in held_out)
        valid = b"\0".join(text for name, text in texts.items() if name in held_out)
        num_valid = len(held_out)
    digest = hashlib.sha256(train + b"\0\0" + valid).hexdigest()[:16]
    return Corpus(
        name=name,
        train=np.frombuffer(train, np.uint8),
        valid=np.frombuffer(valid, np.uint8),
        num_files=len(texts),
        num_valid_files=num_valid,
        fingerprint=digest,
    )


def _walk(root: Path, skip: set[str], suffix: str) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        found += [
            Path(folder, f) for f in sorted(files) if f.endswith(suffix) and not f.startswith(".")
        ]
    return found


def _read(root: Path, paths: list[Path]) -> dict[str, bytes]:
    """The contents of the text files by their path below `root`; others are passed over."""
    texts: dict[str, bytes] = {}
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
            if total > MAX_BYTES:
                raise DataError(f"--data: {root} holds more than {MAX_BYTES >> 20} MiB of text.")
            text = path.read_bytes()
            text.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if text and b"\0" not in text:
            texts[path.relative_to(root).as_posix()] = text
    return texts


def _held_out(sizes: dict[str, int]) -> set[str]:
    """Files for validation: in the order of a hash of their names, while they fit the share."""
    room = sum(sizes.values()) * VALIDATION_SHARE
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).digest()):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen or {min(sizes, key=lambda n: sizes[n])}


class Windows:
    """Windows of `context + 1` bytes in an endless shuffled order.

    Window number `p` of the run is found from `p` alone: epoch `p // len(self)` has its own
    permutation and its own shift of the windows against the text, both drawn from the seed.
    """

    def __init__(self, text: np.ndarray, context: int, seed: int):
        self._text, self._context, self._seed = text, context, seed
        self._count = (len(text) - 1) // context - 1
        self._epoch = -1
        if self._count < 1:
            raise DataError(
                f"--data: {len(text)} bytes of training text are too few for --context {context},"
                f" which needs {2 * context + 1}."
            )

    def __len__(self) -> int:
        return self._count

    def batch(self, position: int, size: int) -> np.ndarray:
        """Windows `position` to `position + size`: uint8 `[size, context + 1]`."""
        return np.stack([self._window(p) for p in range(position, position + size)])

    def _window(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._shift = epoch, int(rng.integers(self._context))
            self._order = rng.permutation(self._count)
        start = self._shift + int(self._order[index]) * self._context
        return self._text[start : start + self._context + 1]


def validation_batches(text: np.ndarray, context: int, size: int, count: int) -> list[np.ndarray]:
    """At most `count` batches uint8 `[size, context + 1]`, evenly spread over the text.

    A text shorter than a batch is read with windows that overlap.
    """
    if len(text) < context + 1:
        raise DataError(
            f"--data: {len(text)} bytes of validation text are too few for --context {context},"
            f" which needs {context + 1}."
        )
    count = max(1, min(count, len(text) // (size * context)))
    starts = np.linspace(0, len(text) - context - 1, size * count).astype(int)
    windows = np.stack([text[s : s + context + 1] for s in starts])
    return list(windows.reshape(count, size, context + 1))

"""Arrays from files that other people wrote: nothing is unpickled, every refusal is a sentence."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable

import numpy as np


def read_npz(
    path: str | os.PathLike[str], names: Iterable[str], what: str, need: str
) -> dict[str, np.ndarray]:
    """Those arrays of an npz file that are there, by name.

    Args:
      path: the file.
      names: the arrays to read.
      what: what the file should hold, for the message.
      need: the end of the message, "need ...".

    Raises:
      ValueError: the file is missing, corrupt, or of another kind, in one sentence.
    """
    try:
        with open(path, "rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is no npz file")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in names if name in file}
    except Exception as error:  # zip, zlib, header and pickle errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: got no readable {what} ({reason}), {need}") from None

"""Registers and spills of every kernel: python tools/ptxas_report.py LOG, what `ptxas -v` printed.

Fails where a kernel spills, or where the log holds none.
"""

from __future__ import annotations

import collections
import pathlib
import re
import subprocess
import sys

from rich.console import Console
from rich.table import Table

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def demangled(names: list[str]) -> list[str]:
    """As people read them, without arguments and namespaces."""
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = re.compile(r"jax_fusco::|cuda::|\(anonymous namespace\)::|^void ")
    return [re.sub(r"\(.*", "", plain.sub("", line)) for line in out.stdout.splitlines()]


def main(log: str) -> int:
    kernels: dict[str, dict[str, re.Match[str]]] = collections.defaultdict(dict)
    for match in ENTRY.finditer(pathlib.Path(log).read_text()):
        kernels[match["name"]][match["arch"]] = match
    architectures = sorted(
        {a for found in kernels.values() for a in found}, key=lambda a: int(a[3:])
    )
    table = Table("kernel", *architectures, title="Registers a thread, bytes spilled")
    spilled = 0
    for name, readable in sorted(
        zip(kernels, demangled(list(kernels)), strict=True), key=lambda p: p[1]
    ):
        cells = []
        for arch in architectures:
            match = kernels[name].get(arch)
            spill = 0 if match is None else int(match["stores"]) + int(match["loads"])
            spilled += bool(spill)
            cells.append(
                "" if match is None else match["registers"] + (f" +{spill} B" if spill else "")
            )
        table.add_row(readable, *cells)
    Console(width=140).print(table)
    print(f"{len(kernels)} kernels for {', '.join(architectures)}, {spilled} of them spill")
    return 1 if spilled or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

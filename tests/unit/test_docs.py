"""README and docs: every snippet runs and prints what the page says; internal links lead somewhere.

The Python blocks of a page run in order in one namespace. Where a `text` block follows directly, it
must be what the Python block prints. A page that makes its own CPU devices runs
in a fresh interpreter, as a reader would run it, the others in this process. Blocks fenced as
`python no-run` are only compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import re
import types
from collections.abc import Iterator

import pytest
from helpers import run_python

_MARK = "<end of block>"
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAGES = sorted(_ROOT.glob("*.md")) + sorted((_ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclasses.dataclass
class _Block:
    info: str
    body: str
    line: int  # of the body's first line
    prints: str | None = None  # what the page says; None: nothing


def _blocks(page: pathlib.Path) -> Iterator[_Block]:
    """The Python blocks of a page, each with the output that the page promises."""
    text = page.read_text()
    python: _Block | None = None
    end = 0
    for match in _FENCE.finditer(text):
        info, body = match["info"].strip(), match["body"]
        directly_after = not text[end : match.start()].strip()
        if python and info == "text" and directly_after:
            python.prints = body
        if python:
            yield python
        line = text.count("\n", 0, match.start("body")) + 1
        python = _Block(info, body, line) if info.split(" ")[0] == "python" else None
        end = match.end()
    if python:
        yield python


def _code(block: _Block, page: pathlib.Path) -> types.CodeType:
    """The block compiled so that tracebacks name the page's own lines."""
    return compile("\n" * (block.line - 1) + block.body, str(page), "exec")


def _named(page: pathlib.Path) -> str:
    return str(page.relative_to(_ROOT))


def _run_here(blocks: list[_Block], page: pathlib.Path) -> list[str]:
    namespace: dict[str, object] = {"__name__": "__main__"}
    outputs = []
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(_code(block, page), namespace)
        outputs.append(printed.getvalue())
    return outputs


@pytest.mark.parametrize("page", _PAGES, ids=_named)
def test_snippets(page: pathlib.Path) -> None:
    blocks = list(_blocks(page))
    for block in blocks:
        _code(block, page)
    blocks = [block for block in blocks if block.info == "python"]
    if any("jax_num_cpu_devices" in block.body for block in blocks):
        code = f"\nprint({_MARK!r})\n".join(block.body for block in blocks)
        # Flags for sixteen devices, which this process was given, would overrule the page.
        done = run_python(code, env={"XLA_FLAGS": ""}, timeout=280)
        assert done.returncode == 0, done.stderr
        outputs = done.stdout.split(f"{_MARK}\n")
    else:
        outputs = _run_here(blocks, page)
    for block, output in zip(blocks, outputs, strict=True):
        if block.prints is not None:
            assert output == block.prints, f"{_named(page)}:{block.line}"


def _anchors(page: pathlib.Path) -> set[str]:
    """The anchors that a page's headings get where it is shown."""
    text = _FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=_named)
def test_links(page: pathlib.Path) -> None:
    text = _FENCE.sub("", page.read_text())
    broken = []
    for target in (match["target"] for match in _LINK.finditer(text)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(_ROOT)
        if not inside or not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken, f"{_named(page)}: broken links {broken}"


def test_index_names_every_page() -> None:
    index = (_ROOT / "docs" / "index.md").read_text()
    missing = [page.name for page in (_ROOT / "docs").glob("*.md") if f"({page.name}" not in index]
    assert missing in ([], ["index.md"])

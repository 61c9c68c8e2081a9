"""Checks the models here exhaustively with spin: the protocol as it is, and without one rule.

Run it by hand for the figures: ``python tests/protocol/check.py``.
"""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent
TOOLS = ("spin", "gcc")
MUTANT = re.compile(r"MUTANT_(\w+)")

# What each model is searched for; see its head for the meaning. Every search ends in seconds.
CASES = {
    "handshake": {
        "late": {"RANKS": 3, "TIMEOUTS": 2},
        "late, three runs": {"RANKS": 2, "RUNS": 3, "CALLS": 3, "TIMEOUTS": 2},
        "absent or wrong": {"RANKS": 3, "TIMEOUTS": 1, "SKIPS": 1, "BAD_INDICES": 1},
        "dead": {"RANKS": 3, "TIMEOUTS": 1, "DEATHS": 1},
        "everything": {
            "RANKS": 2,
            "RUNS": 3,
            "TIMEOUTS": 2,
            "SKIPS": 1,
            "BAD_INDICES": 1,
            "DEATHS": 1,
        },
    },
    "settle": {
        "late, hosts far ahead": {"PROCESSES": 2, "AHEAD": 2, "TIMEOUTS": 2},
        "everything": {"PROCESSES": 2, "TIMEOUTS": 1, "BAD_INDICES": 1},
    },
}


@dataclasses.dataclass(frozen=True)
class Search:
    """What pan said: `errors` found, whether the search was `complete`, lines never `unreached`."""

    errors: int
    complete: bool
    states: int
    unreached: tuple[str, ...]
    log: str


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def mutants(model: str) -> list[str]:
    """The rules that a model can do without, by name."""
    text = (FOLDER / f"{model}.pml").read_text()
    return sorted(set(MUTANT.findall(text.split("#ifndef", 1)[1])))


def search(model: str, defines: dict[str, int]) -> Search:
    """Builds the checker of a model with these macros and runs it to its end or first error."""
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{command[0]} failed: {done.stdout}{done.stderr}")
            return done.stdout

        run("spin", "-a", *flags, str(FOLDER / f"{model}.pml"))
        run("gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=4000", "-o", "pan", "pan.c")
        log = run("./pan", "-m100000")
    errors = re.search(r"errors: (\d+)", log)
    states = re.search(r"(\d+) states, stored", log)
    if errors is None or states is None:
        raise RuntimeError(f"pan said nothing of errors and states: {log}")
    incomplete = ("Search not completed", "max search depth too small", "out of memory")
    return Search(
        errors=int(errors[1]),
        complete=not any(sign in log for sign in incomplete),
        states=int(states[1]),
        unreached=tuple(re.findall(r"\.pml:\d+, state \d+, (.*)", log)),
        log=log,
    )


def main() -> int:
    """Prints a line for each case and each mutant; 0 where all is as it must be."""
    good = True
    for model, cases in CASES.items():
        for name, defines in cases.items():
            result = search(model, defines)
            good &= result.errors == 0 and result.complete
            print(
                f"{model}, {name}: {result.errors} errors, {result.states} states, "
                f"complete={result.complete}"
            )
        for name in mutants(model):
            result = search(model, {**cases["everything"], f"MUTANT_{name}": 1})
            good &= result.errors > 0
            print(f"{model} without {name}: {'found' if result.errors else 'NOT FOUND'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

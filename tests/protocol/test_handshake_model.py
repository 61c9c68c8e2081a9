"""The CUDA engine's handshake, searched exhaustively: see handshake.pml."""

import pytest
from protocol import check

pytestmark = pytest.mark.skipif(
    bool(check.missing_tools()), reason=f"needs {', '.join(check.TOOLS)} (package spin)"
)


@pytest.mark.parametrize("case", check.CASES)
def test_no_error_in_any_interleaving(case):
    result = check.search(check.CASES[case])
    assert result.errors == 0, result.log
    assert result.complete, result.log
    assert result.states > 10_000  # the search went somewhere


def test_every_step_of_the_model_is_reached():
    assert check.search(check.CASES["everything"]).unreached == ()


@pytest.mark.parametrize("rule", check.mutants())
def test_every_rule_is_needed(rule):
    result = check.search({**check.CASES["everything"], f"MUTANT_{rule}": 1})
    assert result.errors > 0, f"the protocol does as well without it: {result.log}"


def test_mutants_are_known():
    assert check.mutants() == [
        "MARK_AGAIN",
        "NO_FAIL_FAST",
        "NO_LEAVE_CHECK",
        "NO_LEAVE_WAIT",
        "NO_MARK",
        "NO_SECOND_LOOK",
        "OWN_GENERATION",
        "TAG_FIRST",
    ]

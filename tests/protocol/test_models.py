"""The CUDA engine's handshake and what processes settle, searched exhaustively: see the models."""

import pytest
from protocol import check

pytestmark = pytest.mark.skipif(
    bool(check.missing_tools()), reason=f"needs {', '.join(check.TOOLS)} (package spin)"
)

MODELS = pytest.mark.parametrize("model", check.CASES)


@pytest.mark.parametrize(("model", "case"), [(m, c) for m in check.CASES for c in check.CASES[m]])
def test_no_error_in_any_interleaving(model, case):
    result = check.search(model, check.CASES[model][case])
    assert result.errors == 0, result.log
    assert result.complete, result.log
    assert result.states > 10_000  # the search went somewhere


@MODELS
def test_every_step_of_the_model_is_reached(model):
    assert check.search(model, check.CASES[model]["everything"]).unreached == ()


@pytest.mark.parametrize(("model", "rule"), [(m, r) for m in check.CASES for r in check.mutants(m)])
def test_every_rule_is_needed(model, rule):
    result = check.search(model, {**check.CASES[model]["everything"], f"MUTANT_{rule}": 1})
    assert result.errors > 0, f"the protocol does as well without it: {result.log}"


def test_mutants_are_known():
    assert check.mutants("handshake") == [
        "MARK_AGAIN",
        "NO_FAIL_FAST",
        "NO_LEAVE_CHECK",
        "NO_LEAVE_WAIT",
        "NO_MARK",
        "NO_SECOND_LOOK",
        "OWN_GENERATION",
        "TAG_FIRST",
    ]
    assert check.mutants("settle") == ["NO_NEWS", "NO_WAIT", "OWN_NUMBER"]

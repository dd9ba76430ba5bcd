"""How the state of a finding is shown: the sign and the words, worst first."""

from collections.abc import Mapping

from lisa_analysis.runs.diagnostics.finding import STATES as WORST_FIRST
from lisa_analysis.runs.diagnostics.finding import State

# The words stand beside the signs, never colour alone: of one finding, of several.
_SHOWN: Mapping[State, tuple[str, str, str]] = {
    "fail": ("✗", "problem", "problems"),
    "warn": ("!", "warning", "warnings"),
    "could not run": ("?", "could not run", "could not run"),
    "info": ("i", "note", "notes"),
    "ok": ("✓", "passed", "passed"),
}
STATES: Mapping[State, tuple[str, str, str]] = {state: _SHOWN[state] for state in WORST_FIRST}

"""The marks that the table of families is made of (`family_table.py`); nothing heavy is needed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

MARKS: dict[str, Any] = {"backs": "works", "rules_out": "absent"}  # and where they are in the data


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, Any, Any]:
    """A yes in the table of a test that skipped itself would be a lie."""
    report = yield
    if report.skipped and any(item.get_closest_marker(name) for name in MARKS):
        report.outcome = "failed"
        vars(report).pop("wasxfail", None)  # such a failure would not count
        report.longrepr = f"{item.nodeid} was skipped, and the table of families rests on it."
    return report

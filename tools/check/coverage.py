"""How much of the installed pack's Python the tests run: a pytest plugin, for the process that hands out tests.

Every process below it that is Python's measures itself, pytest's workers and ComfyUI's servers alike: the environment's
coverage package looks for COVERAGE_PROCESS_START. A server has the packed pack in a temporary folder; `pyproject.toml`
says how its paths become the checkout's.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import coverage
import pytest

from tools.harness.testhost import ROOT

LEAST = 95.0
"""Per cent of the lines."""


class Coverage:
    """Told above pytest's summary; with ``required`` fewer lines than ``LEAST`` fail the run."""

    def __init__(self, required: bool) -> None:
        self.total = 0.0
        self._required = required
        self._folder = tempfile.TemporaryDirectory(prefix="koala-coverage-")
        os.environ["KOALA_CHECKOUT"], os.environ["KOALA_COVERAGE"] = str(ROOT), self._folder.name
        os.environ["COVERAGE_PROCESS_START"] = str(ROOT / "pyproject.toml")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Add up what the processes have written, all of which have ended."""
        del os.environ["COVERAGE_PROCESS_START"]
        report = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
        try:
            report.combine()
            with open(Path(self._folder.name) / "report.txt", "w+") as lines:
                self.total = report.report(file=lines)
                lines.seek(0)
                self._lines = lines.read().splitlines()
        except coverage.exceptions.NoDataError:
            self._lines = []
        self._folder.cleanup()
        if self._required and self.total < LEAST and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The files with lines that no test runs, and the total."""
        short = self.total < LEAST and self._required
        for line in self._lines if self._required else ():
            terminalreporter.write_line(line)
        wanted = f"; expected at least {LEAST:g} %. Add tests for the lines listed above" if short else ""
        terminalreporter.write_line(
            f"coverage of koala/, host/, nodes/ and koala_loader.py: {self.total:.1f} %{wanted}"
        )

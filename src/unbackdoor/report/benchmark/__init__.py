"""Tables and charts of the rows of a benchmark: every page of results is made here."""

from __future__ import annotations

from unbackdoor.report.benchmark.leaderboard import leaderboard
from unbackdoor.report.benchmark.suite import MEANINGS, bench_report

__all__ = ["MEANINGS", "bench_report", "leaderboard"]

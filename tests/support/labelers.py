"""Labelers that wait for nobody: facts of processes are read when they are asked for."""

from collections.abc import Sequence
from typing import Any

from profiler.processes.facts_reader import read_facts
from profiler.processes.labels import Labeler
from profiler.processes.rules import ServiceRule
from profiler.processes.versions import Versions


def labeler_reading_at_once(rules: Sequence[ServiceRule] = (), **options: Any) -> Labeler:
    versions = Versions()

    def ask(pid: int, start_ticks: int) -> None:
        facts = read_facts(pid, start_ticks, versions, wants_command=True)
        labeler.learn(pid, start_ticks, facts)

    labeler = Labeler(rules, **({"ask": ask} | options))
    return labeler

"""Labelers that wait for nobody: facts of processes are read when they are asked for."""

from collections.abc import Sequence
from typing import Any

from bpf.samples import RawSample
from profiler.processes.facts_reader import read_facts
from profiler.processes.labels import Labeler, Subject, with_instance
from profiler.processes.rules import ServiceRule
from profiler.processes.versions import Versions
from storage.profile import Labels


def labeler_reading_at_once(rules: Sequence[ServiceRule] = (), **options: Any) -> Labeler:
    versions = Versions()

    def ask(pid: int, start_ticks: int) -> None:
        facts = read_facts(pid, start_ticks, versions, wants_command=True)
        labeler.learn(pid, start_ticks, facts)

    labeler = Labeler(rules, **({"ask": ask} | options))
    return labeler


def labels_of(labeler: Labeler, sample: RawSample) -> Labels:
    """Return the labels of a sample, as if its window was closed now."""
    [subject] = labeler.note([sample])
    return labels_of_subject(labeler, subject)


def labels_of_subject(labeler: Labeler, subject: Subject) -> Labels:
    return with_instance(subject.key, {subject.source: labeler.instance_of(subject)})


def labels_of_instance(labeler: Labeler, pid: int, start_ns: int) -> Labels:
    """Return the labels of a process's service instance; nothing if that is not known."""
    process = labeler._instances.find(pid, start_ns)
    return process.labels if process is not None else ()

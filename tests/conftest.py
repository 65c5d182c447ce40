"""What all tests share: when a test cannot run here, and how hypothesis behaves."""

import os
import shutil

import hypothesis
import pytest

# A busy machine makes single examples slow; what a test may take in all is pytest's timeout.
hypothesis.settings.register_profile("everflame", deadline=None)
hypothesis.settings.load_profile("everflame")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine or this user cannot run, and say what was missing."""
    missing = {}
    if os.geteuid() != 0:
        missing["kernel"] = "loading BPF programs needs root: run ./check"
    if not shutil.which("chromium"):
        missing["browser"] = "no chromium: install the package chromium"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))

"""Reading can be interrupted, and reads as little as it can."""

import time

import pytest

from storage.blocks.parquet import reading_engine
from storage.profile import ProfileError

LONG = "SELECT count(*) FROM range(10000000) AS one, range(10000000) AS other"


class EnoughError(Exception):
    pass


def test_a_query_ends_while_duckdb_works():
    """What `check` raises is raised, and other connections go on."""
    began_s = time.monotonic()

    def check():
        if time.monotonic() > began_s + 0.2:
            raise EnoughError

    with (
        reading_engine() as other,
        pytest.raises(EnoughError),
        reading_engine(check) as opened,
    ):
        opened.rows(LONG)

    assert time.monotonic() < began_s + 30
    with reading_engine() as other:
        assert other.rows("SELECT 1") == [(1,)]


def test_an_error_of_a_query_stays_what_it_is():
    """As long as nothing interrupts it."""
    with pytest.raises(ProfileError, match="no_such_table"), reading_engine(lambda: None) as opened:
        opened.rows("SELECT * FROM no_such_table")

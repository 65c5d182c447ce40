"""serve: what it says of a store that holds nothing."""

import subprocess
import sys

from profiler.commands.serve import check
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from tests.support.live import wait_for
from tests.support.services import profile_of, service
from tests.support.stores import directory, minutes


def test_a_folder_that_is_missing_is_said_and_waited_for(tmp_path):
    """An agent may create it later: the page then shows its data."""
    with service(tmp_path) as (_, client):
        talk = (tmp_path / "talk").read_text()
        assert f"the folder {tmp_path / 'store'} does not exist" in talk
        assert "check --store, or run everflame agent --store" in talk
        window = {"from": "0", "until": str(minutes(9, 9).end_ns // 10**9)}
        assert client.json("flamegraph", **window)["empty"]["reason"] == "no_data_ever"

        directory(tmp_path / "store", profile_of(1))

        total = profile_of(1).total_value  # once the store is listed again
        wait_for(lambda: client.json("flamegraph", **window)["total"] == total)


def test_an_empty_folder_is_said(tmp_path, capfd):
    """With the command that fills this one."""
    (tmp_path / "a store").mkdir()

    check(TenantStore(DirectoryStore(tmp_path / "a store")))

    asked = f"run everflame agent --store '{tmp_path / 'a store'}' to fill it"
    assert asked in capfd.readouterr().err


def test_two_services_do_not_call_one_webhook_for_a_store(tmp_path):
    """The second one says what to do, and does not begin."""
    (tmp_path / "store").mkdir()
    webhook = "--webhook=http://127.0.0.1:9/"
    command = [sys.executable, "-m", "profiler.commands.serve", "--listen=127.0.0.1:0"]
    command += [f"--store={tmp_path / 'store'}", f"--cache={tmp_path / 'cache'}"]

    with service(tmp_path, webhook):
        second = subprocess.run(
            [*command, webhook, "--quiet"], check=False, capture_output=True, text=True, timeout=60
        )

    assert second.returncode == 2
    assert "another watch uses" in second.stderr
    assert "leave out --webhook, or set EVERFLAME_CACHE" in second.stderr

"""Tenants: several in one store, none of which sees anything of another."""

import subprocess
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from profiler import cli
from profiler.agent.agent import _open_spool, uploader_command
from profiler.commands.up import compaction_command, service_command
from profiler.times import rfc3339
from storage.formats import pprof
from storage.objects.keys import ObjectStore
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import make_tenant_key
from storage.profile import make_labels
from storage.spool.upload_queue import usage
from tests.commands.test_up import agent_options
from tests.support import profiles as some
from tests.support.live import wait_for
from tests.support.services import service
from tests.support.stores import MINUTE_NS, at, minutes
from tests.support.weed import BUCKET, Weed, using_keys
from tests.support.windows import window

TENANTS = ("default", "team-a", "team-b")
FROM, UNTIL = rfc3339(minutes(0, 0).start_ns), rfc3339(minutes(9, 9).end_ns)
WINDOW = ("--from", FROM, "--until", UNTIL)


def fill(store: ObjectStore) -> None:
    """Give each tenant a host, a service and a version of its own, which changes."""
    for number, name in enumerate(TENANTS):
        tenant = TenantStore(store, name)
        make_tenant_key(store, name)
        for minute in range(4):
            labels = {"service": f"of-{name}", "comm": name, "version": str(minute // 2)}
            made = some.build([(labels, [some.MAIN, some.WORK], 1 + number)], some.NAMES)
            made = at(made, minute, f"host-{name}", f"{number + 1:016x}")
            ran = make_labels({k: labels[k] for k in ("service", "version")})
            accounting = replace(made.accounting, services={ran: MINUTE_NS})
            made = replace(made, accounting=accounting)
            tenant.put_profile(made, pprof.encode(made))


@pytest.fixture(scope="module", params=["directory", "s3"])
def shared(request, tmp_path_factory):
    """Return the options that name a store of three tenants."""
    folder = tmp_path_factory.mktemp("tenants")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERFLAME_CACHE", str(folder / "cache"))
        if request.param == "directory":
            fill(open_store(str(folder / "store")))
            yield ("--store", str(folder / "store"))
            return
        weed: Weed = request.getfixturevalue("weed")
        with using_keys():
            url = f"s3://{BUCKET}/{folder.name}"
            fill(open_store(url, weed.endpoint))
            yield ("--store", url, "--s3-endpoint", weed.endpoint)


def run(capfd, *arguments: str) -> tuple[int, str]:
    status = cli.main(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out + captured.err


READING = [
    ("ls", "--json"),
    ("ls", *WINDOW, "-q", '{service=~".*"}'),
    ("top", *WINDOW, "--by", "service,host"),
    ("export", *WINDOW, "--by", "service", "-o", "-"),
    ("deployments", *WINDOW, "--json"),
    ("verify", *WINDOW, "--json"),
]


@pytest.mark.parametrize("is_by_variable", [False, True], ids=["option", "variable"])
def test_commands_see_one_tenant(shared, capfd, monkeypatch, is_by_variable) -> None:
    """And nothing in the answers names another, whether they are compacted or not."""
    for name in TENANTS:
        option = ("--tenant", name)
        if is_by_variable:
            monkeypatch.setenv("EVERFLAME_TENANT", name)
            option = ()
            cli.main(["compact", *shared, "--workers=1", "--keep=detail=9999d"])
            capfd.readouterr()
        for command, *arguments in READING:
            status, text = run(capfd, command, *shared, *option, *arguments)

            assert status == 0, (command, text)
            others = [other for other in TENANTS if other != name]
            assert not any(f"-{other}" in text for other in others), (command, text)
            if command == "verify":
                assert orjson.loads(text)["objects"] == 4
            else:
                assert f"-{name}" in text, (command, text)


def test_a_comparison_is_of_one_tenant(shared, capfd) -> None:
    halves = [(minutes(0, 2).start_ns, minutes(0, 2).end_ns)]
    halves.append((minutes(2, 4).start_ns, minutes(2, 4).end_ns))
    sides = [f'{{service=~".*"}}@{rfc3339(start)}..{rfc3339(end)}' for start, end in halves]

    cli.main(["diff", *shared, "--tenant", "team-b", "--json", *sides])

    compared = orjson.loads(capfd.readouterr().out)
    assert [compared[side]["samples"] for side in ("before", "after")] == [6, 6]


def test_the_service_shows_one_tenant(tmp_path) -> None:
    fill(open_store(str(tmp_path / "store")))

    with service(tmp_path, "--tenant=team-a") as (_, client):
        window_asked = {"from": FROM, "until": UNTIL}
        graph = client.json("flamegraph", by="service", **window_asked)
        values = client.json("labels/service/values", **window_asked)
        status = client.json("status")

    assert (graph["coverage"]["hosts"], graph["samples"]) == (1, 8)
    assert "of-team-a" in str(values)
    assert "of-team-b" not in str((graph, values, status))
    assert status["tenant"] == "team-a"


def test_import_and_deployments_write_for_one_tenant(tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    (tmp_path / "x.folded").write_text("main;work 5\n")
    asked = ("--tenant", "team-a")
    window_asked = f"{FROM}..{rfc3339(minutes(1, 1).start_ns)}"

    run(capfd, "import", *asked, "--window", window_asked, str(tmp_path / "x.folded"))
    run(capfd, "deployments", *asked, "add", "--service=x", "--version=1", "--at", FROM)
    status, text = run(capfd, "deployments", "add", *asked, "--service=x", "--version=2")

    assert (status, "(tenant team-a)" in text) == (0, True)
    stored = [each.key for each in open_store(str(tmp_path / "store")).list("")]
    assert {key.split("/")[1] for key in stored} == {"team-a"}
    assert {key.split("/")[2] for key in stored} == {"key", "l0", "deployments"}


def test_the_agent_stores_and_expires_for_one_tenant(tmp_path) -> None:
    """What waits in the spool goes to the tenant that it was measured for."""
    options = replace(agent_options(tmp_path), tenant="team-a", keep_s=86400.0)
    other = replace(options, tenant="team-b")
    store = open_store(options.store)
    fill(store)
    for number, each in enumerate((options, other)):
        _open_spool(each).add(window(number))
    command = uploader_command(options)

    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            wait_for(lambda: usage(options.spool)[0] == 0)
            wait_for(lambda: len(list(store.list("v1/team-a/l0/"))) < 4)
        finally:
            process.terminate()

    assert "--tenant=team-a" in command
    assert len(list(store.list("v1/default/l0/"))) == 4
    assert len(list(store.list("v1/team-b/l0/"))) == 5


def test_what_up_starts_works_for_its_tenant(tmp_path) -> None:
    options = replace(agent_options(tmp_path), tenant="team-a")

    for command in (
        service_command(options, ("127.0.0.1", 1), tmp_path, ""),
        compaction_command(options, tmp_path, is_root=False),
    ):
        assert "--tenant=team-a" in command


def test_all_tenants_are_compacted(tmp_path, capfd, monkeypatch) -> None:
    """Each by itself, with a line or a record of its own."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    store = open_store(str(tmp_path / "store"))
    fill(store)
    whole = ("compact", "--workers=1", "--keep=detail=9999d", "--all-tenants")

    status = cli.main([*whole, "--json"])
    records = [orjson.loads(line) for line in capfd.readouterr().out.splitlines()]
    cli.main([*whole, "--dry-run"])
    lines = capfd.readouterr().out.splitlines()

    assert status == 0
    assert sorted((each["tenant"], each["objects"]) for each in records) == [
        (name, 4) for name in TENANTS
    ]
    assert sorted(line.split(": ")[0] for line in lines) == sorted(TENANTS)
    assert cli.main([*whole, "--tenant", "team-a"]) == 2
    assert "not both" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["", "a/b", "..", ".up", "ä", "x" * 65, "a b", "-a", "a\n"])
def test_a_name_that_cannot_be_a_tenants_is_refused(name, tmp_path, capfd, monkeypatch) -> None:
    """By every command, before anything is read or written; an empty variable is the default."""
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    asked = ["compact", "--workers=1", f"--tenant={name}"]

    by_option = run(capfd, *asked) if name else (2, "correct --tenant")
    monkeypatch.setenv("EVERFLAME_TENANT", name)
    by_variable = run(capfd, "agent")[1] if name else run(capfd, "ls")[1]

    assert by_option[0] == 2
    assert "correct --tenant" in by_option[1]
    assert ("correct EVERFLAME_TENANT" if name else "nothing in the store") in by_variable
    assert not (tmp_path / "store").exists()

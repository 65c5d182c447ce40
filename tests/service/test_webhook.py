"""Calls of regressions: POSTs to a real server that may fail in any way, and commands."""

import json
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler.service.webhook import Call, Command, Webhook
from profiler.service.webhook_url import WebhookError, parse_webhook
from tests.support.live import wait_for
from tests.support.receivers import Receiver, drip, hang, receiving

CALL = Call(json.dumps({"service": "api"}).encode(), {"EVERFLAME_SERVICE": "api"})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def webhook(receiver: Receiver, timeout_s: float = 10) -> Webhook:
    return Webhook(receiver.url, timeout_s=timeout_s, pauses_s=(0.01, 0.01))


def call(caller: Webhook | Command, ended: threading.Event | None = None) -> bool:
    return caller.call(CALL, ended or threading.Event())


@pytest.mark.parametrize("status", [200, 202, 204])
def test_a_call_is_a_post_of_json(receiver, status):
    receiver.responses = [status]

    assert call(webhook(receiver))

    (found,) = receiver.received
    assert (found.method, found.path) == ("POST", "/hook/secret-token")
    assert found.headers["Content-Type"] == "application/json"
    assert json.loads(found.content) == {"service": "api"}


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_call_that_fails_is_made_again(receiver, status):
    receiver.responses = [status, status, 204]

    assert call(webhook(receiver))

    assert len(receiver.received) == 3


def test_a_call_that_fails_each_time_is_left_for_later(receiver, caplog):
    """It ends after some attempts, and says why without the path of the URL."""
    receiver.responses = [500]

    assert not call(webhook(receiver))

    assert len(receiver.received) == 3
    assert "cannot call the webhook at 127.0.0.1: it responded with status 500" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("status", [400, 401, 404, 410, 304])
def test_a_call_that_is_refused_is_not_made_again(receiver, caplog, status):
    receiver.responses = [status]

    assert call(webhook(receiver))

    assert len(receiver.received) == 1
    assert f"refused a call: status {status}" in caplog.text


@pytest.mark.parametrize("respond", [hang, drip])
def test_a_receiver_that_hangs_is_left_after_the_time_limit(receiver, caplog, respond):
    """Also one that sends a byte now and then."""
    receiver.responses = [respond(receiver)]
    begun_s = time.monotonic()

    assert not call(webhook(receiver, timeout_s=0.5))

    assert 1.5 <= time.monotonic() - begun_s < 15
    assert "timed out" in caplog.text


def test_the_end_of_a_watch_does_not_wait_for_a_receiver(receiver):
    receiver.responses = [hang(receiver)]
    ended, done = threading.Event(), []
    thread = threading.Thread(target=lambda: done.append(call(webhook(receiver, 60), ended)))
    thread.start()
    receiver.wait_for(1)

    ended.set()
    thread.join(20)

    assert done == [False]
    assert len(receiver.received) == 1


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_within_the_host_is_followed(receiver, status):
    """With the method and the content."""
    receiver.responses = [(status, "/moved?x=1"), 204]

    assert call(webhook(receiver))

    assert [each.path for each in receiver.received] == ["/hook/secret-token", "/moved?x=1"]
    assert receiver.received[0].content == receiver.received[1].content
    assert receiver.received[1].method == "POST"


@pytest.mark.parametrize("place", ["http://localhost:{port}/x", "https://127.0.0.1:{port}/x"])
def test_a_redirect_to_another_host_is_refused(receiver, caplog, place):
    """Another name, another scheme, or another port."""
    port = receiver.url.split(":")[2].partition("/")[0]
    receiver.responses = [(307, place.format(port=port)), 204]

    assert call(webhook(receiver))

    assert len(receiver.received) == 1
    assert "redirects to another host, scheme or port" in caplog.text


def test_another_server_gets_no_redirected_call(receiver, caplog):
    with receiving() as other:
        receiver.responses = [(308, other.url)]
        assert call(webhook(receiver))

        assert other.received == []
    assert "redirects to another host, scheme or port" in caplog.text


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((302, "/moved"), "status 302"),
        ((307, "/again"), "redirects again and again"),
        (307, "redirects to another host"),
        ((307, "http://[::1"), "redirects to another host"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_refused(receiver, caplog, response, message):
    receiver.responses = [response]

    assert call(webhook(receiver))

    assert len(receiver.received) <= 4
    assert message in caplog.text


def test_a_server_that_is_away_is_called_later(caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    assert not call(Webhook(f"http://127.0.0.1:{port}/secret", pauses_s=(0.01,)))

    assert caplog.text.count("Connection refused") == 2
    assert "secret" not in caplog.text


def test_what_is_not_http_is_a_failure(receiver, caplog):
    """Nothing of it reaches the log unescaped."""
    receiver.responses = [lambda handler: handler.wfile.write(b"\x1b[31mno\nHTTP\r\n" * 9)]

    assert not call(webhook(receiver))

    assert "cannot call the webhook" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run(command, check=True, capture_output=True)
    both = folder / "both"
    both.write_bytes((folder / "key").read_bytes() + (folder / "certificate").read_bytes())
    return both


def test_https_is_called_if_its_certificate_is_trusted(certificate, monkeypatch, caplog):
    with receiving(certificate) as receiver:
        assert not call(webhook(receiver))
        assert "certificate verify failed" in caplog.text
        assert receiver.received == []

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert call(webhook(receiver))
        assert len(receiver.received) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("", "hook", "ftp://h/x", "http://", "http:///x", "http://h:0/", "http://h:99999/"),
        *("http://u:p@h/x", "http://h/a b", "http://h/\n", "http://h/ü", "//h/x", "http://[::1/"),
    ],
)
def test_what_is_not_the_url_of_a_webhook_is_refused(url):
    with pytest.raises(WebhookError) as error:
        parse_webhook(url)

    assert "URL of a webhook" in str(error.value) or "named by its URL" in str(error.value)


# Commands


def test_a_command_gets_the_call(tmp_path):
    """As its standard input and its environment, without a shell."""
    found = tmp_path / "found"
    script = f"cat > {found}; echo $EVERFLAME_SERVICE >> {found}"

    assert call(Command(f"sh -c '{script}'"))
    assert call(Command(f"touch {tmp_path}/$HOME"))

    assert found.read_text() == '{"service": "api"}api\n'
    assert (tmp_path / "$HOME").exists()


def test_the_url_of_the_webhook_is_not_told_to_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERFLAME_WEBHOOK", "http://h/secret")

    assert call(Command(f"sh -c 'env > {tmp_path}/found'"))

    assert "secret" not in (tmp_path / "found").read_text()


def test_a_command_that_does_not_end_is_killed_with_what_it_started(tmp_path, caplog):
    found = tmp_path / "child"

    assert call(Command(f"sh -c 'sleep 600 & echo $! > {found}; wait'", limit_s=0.5))

    child = Path(f"/proc/{found.read_text().strip()}/status")
    wait_for(lambda: not child.exists() or "State:\tZ" in child.read_text(), 20)
    assert "ran for longer than 0.5 s" in caplog.text


def test_the_end_of_a_watch_ends_a_command(tmp_path):
    """Its call counts as not made."""
    ended = threading.Event()
    threading.Timer(0.3, ended.set).start()
    begun_s = time.monotonic()

    assert not call(Command("sleep 600"), ended)

    assert time.monotonic() - begun_s < 20


def test_a_command_that_fails_or_does_not_read_is_logged_only(caplog):
    caplog.set_level(logging.WARNING)

    assert call(Command("false"))
    assert call(Command("true"))

    assert caplog.text.count("\n") == 1
    assert "false ended with exit status 1" in caplog.text


@pytest.mark.parametrize("text", ["no-such-program x", "", "sh -c 'unclosed"])
def test_a_command_that_cannot_be_run_is_refused_at_the_start(text):
    with pytest.raises(WebhookError):
        Command(text)

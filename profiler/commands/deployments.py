"""`everflame deployments`: list the deployments of services, and announce one."""

import argparse
import sys
import time
from collections.abc import Sequence

import orjson

from profiler.commands import arguments
from profiler.commands.selection import Selection, opened, selected
from profiler.comparison.announcements import announce
from profiler.comparison.deployment_verdicts import DeploymentVerdicts, judge_all
from profiler.comparison.deployments import DeploymentVerdict, FoundDeployments, deployments_in
from profiler.comparison.rollouts import Deployment
from profiler.text import StatusLine, in_columns, listed
from profiler.times import from_until, parse_time, rfc3339, whole_second

_NAMED = 8
_FUNCTION_CELLS = 60
_STATUS_AFTER_S = 1.0

ADVICE = (
    "a version is read from SERVICE_VERSION, DD_VERSION or GIT_SHA of a process, from"
    " service.version in OTEL_RESOURCE_ATTRIBUTES, from an image's tag or a release's folder;"
    " or announce it: everflame deployments add --service NAME --version VERSION"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame deployments\n"
        "  everflame deployments --from now-7d -q '{service=\"api\"}' --json\n"
        "  everflame deployments add --service api --version 1.6\n\n"
        "Deployments are detected from the versions that hosts run; by default those of the last\n"
        "24 hours are listed. In the selector, version selects deployments, and all other labels\n"
        "select services and hosts. KIND is rollout, rollback (to an earlier version) or canary\n"
        "(some hosts stay on the previous version for more than half an hour). SETTLED is two\n"
        "windows after the last host changed. VERDICT is that of the time after against the time\n"
        "before: regression, improvement, unchanged or inconclusive, and (provisional) if more\n"
        "data may change it. The newest 30 deployments are compared.\n"
        "The exit status is 2 if nothing is selected."
    )
    arguments.add_json(parser)
    parser.add_argument(
        "--no-verdicts",
        action="store_true",
        help="only list deployments: do not compare the time before and after each one",
    )
    arguments.add_store(parser)
    arguments.add_window(parser)
    arguments.add_query(parser)
    summary = "announce a deployment, for example from a pipeline"
    add = parser.add_subparsers(metavar="[add]").add_parser(
        "add",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n"
        "  everflame deployments add --service api --version 1.6 --store s3://profiles/prod\n"
        "  everflame deployments add --service api --version 1.6 --at 2026-01-31T09:00:00Z\n\n"
        "This gives the exact start of a deployment, or announces one that cannot be detected\n"
        "because the service has no version. Repeating it is harmless.",
    )
    add.add_argument("--service", required=True, help="the service, as in its label")
    add.add_argument("--version", required=True, help="the version that starts to run")
    add.add_argument(
        "--at", metavar="TIME", default="now", help="when it starts, as --from (default now)"
    )
    arguments.add_store(add, usual=argparse.SUPPRESS)  # else it would undo what stands before `add`
    add.set_defaults(adds=True)


def run(options: argparse.Namespace) -> int:
    if getattr(options, "adds", False):
        return _add(options)
    selection = selected(options, start=None if options.end else "now-24h")
    return _list(selection, options.json, has_verdicts=not options.no_verdicts)


def _add(options: argparse.Namespace) -> int:
    if options.start or options.end or options.query or options.json or options.no_verdicts:
        raise ValueError("deployments add: remove --from, --until, -q, --json and --no-verdicts")
    store = opened(options)
    at_ns = parse_time(options.at, time.time_ns())
    announced = announce(store, options.service, options.version, at_ns)
    print(
        f"announced {announced.service} {announced.version} at {rfc3339(announced.at_ns)}"
        f" in {store}",
        file=sys.stderr,
    )
    return 0


def _list(selection: Selection, as_json: bool, *, has_verdicts: bool) -> int:
    """Print the deployments; return 2 if nothing is selected."""
    query = selection.query()
    found = deployments_in(selection.store, query, selection.window, selection.selector)
    verdicts: list[DeploymentVerdict] = []
    if has_verdicts:
        status = _Status()
        verdicts = judge_all(DeploymentVerdicts(selection.store, query), found, progress=status)
        status.clear()
    if as_json:
        sys.stdout.buffer.write(_json(selection, found, verdicts) + b"\n")
    elif found.deployments:
        print(_table(found.deployments, verdicts))
    for key, reason in found.skipped:
        print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
    if found.reason:
        print(f"everflame: {explain(selection, found)}", file=sys.stderr)
    return 2 if found.reason in {"no_data_in_range", "nothing_matches"} else 0


class _Status:
    """Shows which deployment is compared, once that takes longer than a second."""

    def __init__(self) -> None:
        self._line = StatusLine(sys.stderr)
        self._begun_s = time.monotonic()

    def __call__(self, number: int, of_all: int) -> None:
        if time.monotonic() > self._begun_s + _STATUS_AFTER_S:
            self._line.show(f"comparing deployment {number} of {of_all}")

    def clear(self) -> None:
        self._line.clear()


def _json(
    selection: Selection, found: FoundDeployments, verdicts: Sequence[DeploymentVerdict]
) -> bytes:
    return orjson.dumps(
        {
            "schema": 1,
            "window": {
                "from_ms": selection.window.start_ns // 1_000_000,
                "until_ms": selection.window.end_ns // 1_000_000,
            },
            "query": str(selection.selector) if selection.selector.matchers else "",
            "deployments": found.records(verdicts),
            "skipped": [{"key": key, "reason": reason} for key, reason in found.skipped],
        }
    )


def explain(selection: Selection, found: FoundDeployments) -> str:
    """Say why there are no deployments."""
    window = from_until(selection.window)
    if found.reason == "no_data_in_range":
        where = selection.where_data_are()
        return f"nothing selected: nothing was profiled from {window}; {where}"
    if found.reason == "nothing_matches":
        return f"nothing selected: no service from {window} matches {selection.selector}"
    names = listed(found.services, _NAMED)
    if found.reason == "no_versions":
        return f"no deployments: the version of {names} is not known; {ADVICE}"
    return f"no deployments from {window}: the version of {names} did not change"


def _table(deployments: Sequence[Deployment], verdicts: Sequence[DeploymentVerdict]) -> str:
    """Return a line for each deployment, and further ones below it. `verdicts` may be empty."""
    rows = [["BEGAN", "SETTLED", "SERVICE", "VERSION", "BEFORE", "KIND", "HOSTS", "SOURCE"]]
    rows += [
        [
            whole_second(each.first_ns),
            whole_second(each.settled_ns),
            each.service,
            each.version,
            each.previous or "-",
            each.kind,
            str(len(each.hosts)) if each.hosts else "-",
            each.source,
        ]
        for each in deployments
    ]
    if verdicts:
        for row, word in zip(rows, ["VERDICT", *(v.text or "-" for v in verdicts)], strict=True):
            row.append(word)
    head, *lines = in_columns(rows)
    printed = [head]
    for i, (line, deployment) in enumerate(zip(lines, deployments, strict=True)):
        printed.append(line)
        if verdicts:
            printed += _reasons(verdicts[i])
        if deployment.hosts_before:
            printed.append(f"    {deployment.version} on {listed(deployment.hosts, _NAMED)}")
            printed.append(
                f"    {deployment.previous} still on {listed(deployment.hosts_before, _NAMED)}"
            )
    return "\n".join(printed)


def _reasons(verdict: DeploymentVerdict) -> list[str]:
    """Return the lines that explain a verdict, or why there is none."""
    if verdict.reason:
        return [f"    {verdict.reason}"]
    return [f"    {each.text(_FUNCTION_CELLS)}" for each in verdict.functions]

"""The operator's rules: what they match, and what is said of wrong ones."""

from pathlib import Path

import pytest

from profiler.processes.rules import RuleError, load_rules, make_rule

RULES = """
version_variables = ["RELEASE"]

[[service]]
name = "api"
unit = "api*.service"

[[service]]
name = "jobs"
cgroup = "/batch/*"
exe = "/opt/*/runner"
command = "--queue=(mail|sms)\\\\b"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> Path:
        path = tmp_path / "labels.toml"
        path.write_text(text)
        return path

    return write_file


def test_rules_are_read_in_order(write) -> None:
    """Rules keep their order in the file; variables are read too."""
    rules = load_rules(write(RULES))

    assert [rule.name for rule in rules.services] == ["api", "jobs"]
    assert rules.version_variables == ("RELEASE",)


def test_a_file_that_is_too_large_is_refused_and_not_cut(write) -> None:
    """Whatever its characters: half of its rules would name half of the services."""
    with pytest.raises(RuleError, match="larger than 1 MiB"):
        load_rules(write(f"# {'é' * (600 << 10)}\n{RULES}"))


def test_rule_matches_when_all_its_keys_do(write) -> None:
    """One key that does not match is enough for the rule not to."""
    rule = load_rules(write(RULES)).services[1]

    assert rule.matches(["/", "/batch/a/b"], "", "/opt/x/runner", "runner --queue=sms")
    assert not rule.matches(["/"], "", "/opt/x/runner", "runner --queue=sms")
    assert not rule.matches(["/batch/a"], "", "/bin/runner", "runner --queue=sms")
    assert not rule.matches(["/batch/a"], "", "/opt/x/runner", "runner --queue=other")


def test_patterns_match_whole_names() -> None:
    """A unit's pattern is not looked for inside of the name."""
    rule = make_rule("api", unit="api*.service")

    assert rule.matches([], "api-2.service")
    assert not rule.matches([], "my-api.service")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[service]]\nname = "a"\nunitt = "b"\n', r"line 3: service\[1\]\.unitt: unknown key"),
        ('[[service]]\nname = "a"\nunit = 3\n', r"line 3: service\[1\]\.unit: not a text"),
        ('[[service]]\nname = "a"\n', r"line 2: service\[1\]\.name: the rule matches nothing"),
        (
            '[[service]]\nname = "a"\nunit = "b"\n\n[[service]]\nunit = "c"\n',
            r"line 5: service\[2\]\.name: missing",
        ),
        (
            '[[service]]\nname = "a"\ncommand = "("\n',
            r"line 3: service\[1\]\.command: not a regular expression",
        ),
        ('unit = "b"\n', r"line 1: unit: unknown key; a rule begins with \[\[service\]\]"),
        ('[service]\nname = "a"\n', r"line 1: service: not a list of rules"),
        ('version_variables = ["A=B"]\n', r"line 1: version_variables: not a list of names"),
        ('[[service]]\nname = "a\n', r"line 2"),
    ],
)
def test_wrong_rule_is_named_with_line_and_key(write, text: str, message: str) -> None:
    """The error names the place in the file and what is wrong there."""
    with pytest.raises(RuleError, match=message):
        load_rules(write(text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere is said in one line."""
    with pytest.raises(RuleError, match=r"cannot read rules .*labels.toml: No such file"):
        load_rules(tmp_path / "labels.toml")

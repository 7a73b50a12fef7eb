"""What tells people and services about the project says the same as the project itself."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import moco_dist

MAKEFILE = Path("Makefile").read_text()
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def read(path):
    return yaml.safe_load(Path(path).read_text())


def test_one_version():
    assert PROJECT["version"] == moco_dist.__version__ == read("CITATION.cff")["version"]


def test_pre_commit_runs_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == [line.strip().replace("$(BIN)", ".venv/bin")
                                                 for line in recipe[1].splitlines()]  # fmt: skip


def test_workflows_call_what_there_is():
    """What actionlint cannot know; actionlint itself runs in the workflow."""
    workflows = [read(path)["jobs"] for path in Path(".github/workflows").glob("*.yml")]
    commands = [step["run"] for jobs in workflows for job in jobs.values() for step in job["steps"] if "run" in step]
    jobs = read(".github/workflows/ci.yml")["jobs"]
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= targets
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert jobs["fast-tests"]["strategy"]["matrix"]["python"] == [oldest, "3.12", "3.13", "3.14"]
    assert any(".ci/run" in command for command in commands)


def test_a_report_of_a_fault_brings_the_doctor_s_findings():
    fields = {field["id"]: field for field in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "moco-dist doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]


def test_uv_lock_is_of_the_project_s_requirements():
    """Offline; that the versions in it fit them, `uv lock --check` looks in a workflow."""
    (own,) = (package for package in tomllib.loads(Path("uv.lock").read_text())["package"]
              if package["name"] == canonicalize_name(PROJECT["name"]))  # fmt: skip
    locked = {
        (row["name"], *sorted(row.get("extras", ())), SpecifierSet(row.get("specifier", "")), *extra_of(row))
        for row in own["metadata"]["requires-dist"]
    }
    groups = {None: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    asked = {
        (canonicalize_name(found.name), *sorted(found.extras), found.specifier, *([extra] if extra else []))
        for extra, lines in groups.items() for found in map(Requirement, lines)
    }  # fmt: skip
    assert locked == asked


def extra_of(row):
    return re.findall(r"extra == '([^']+)'", row.get("marker", ""))

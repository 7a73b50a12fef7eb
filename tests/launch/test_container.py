"""The Dockerfile without a container engine: linted, read, and its steps run in a folder of this machine."""

import functools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

LOCK = Path("requirements.lock")


def instructions():
    with Path("Dockerfile").open("rb") as file:
        return [(line["instruction"], line["value"]) for line in DockerfileParser(fileobj=file).structure]


def values(name):
    return [value for instruction, value in instructions() if instruction == name]


def installed_packages():
    """Names after `apt-get install` in every RUN."""
    found = re.findall(r"apt-get install ([^&]*)&&", " ".join(values("RUN")))
    return [word for words in found for word in words.split() if not word.startswith("-")]


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_image_for_batch_jobs():
    stages = values("FROM")
    assert len(stages) == 2
    assert all(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+( AS build)?", stage) for stage in stages)
    assert values("USER")[-1] == "1000:1000"
    assert yaml.safe_load(values("ENTRYPOINT")[-1])[0] == "tini"
    assert "tini" in installed_packages()
    assert not values("HEALTHCHECK")
    order = [(name, value) for name, value in instructions() if name in ("COPY", "RUN")]
    lock = next(i for i, (_, value) in enumerate(order) if value.startswith("pip install --require-hashes"))
    assert all("moco_dist" not in value for _, value in order[:lock])  # code does not undo the layer of packages


def test_every_step_is_looked_at_below():
    """Packages of apt by their names, the lock by its hashes, the venv and the program by installing them."""
    looked_at = ("apt-get update && apt-get install ", "python3 -m venv /opt/venv",
                 "pip install --require-hashes --requirement requirements.lock", "pip install --no-deps ")  # fmt: skip
    assert [step for step in values("RUN") if not step.startswith(looked_at)] == []
    assert len(values("RUN")) == 5


def test_the_context_is_what_is_copied():
    """.dockerignore lets in what COPY names, and no more."""
    copied = {word for value in values("COPY") if "--from" not in value for word in value.split()[:-1]}
    lines = Path(".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all(Path(name).exists() for name in copied)


def test_the_lock_has_every_requirement_with_hashes():
    """If this fails: the command is in CONTRIBUTING.md."""
    text = LOCK.read_text()
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", text, re.MULTILINE))
    assert not re.findall(r"^[a-z0-9._-]+==\S+$", text, re.MULTILINE)  # a line that no hash follows
    assert "://" not in re.sub(r"#.*", "", text)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dali"], *extras["deepspeed"], "setuptools>=77"]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, name
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement.specifier}"


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get: not Debian or Ubuntu")
def test_apt_knows_every_package():
    for package in installed_packages():
        done = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, check=True)
        if not done.stdout:
            pytest.skip("apt has no package lists here; run apt-get update")
        assert "Candidate: (none)" not in done.stdout, package


@pytest.mark.slow
def test_the_last_steps_install_the_program(tmp_path):
    """From the context alone: what COPY names, as .dockerignore leaves it; then used from another folder."""
    context, target = tmp_path / "context", tmp_path / "venv"
    context.mkdir()
    build = instructions()[: [name for name, _ in instructions()].index("ENTRYPOINT")]
    ignored = shutil.ignore_patterns("__pycache__", "examples")
    for value in (value for name, value in build if name == "COPY" and "--from" not in value):
        for word in value.split()[:-1]:
            copy = (
                shutil.copy
                if Path(word).is_file()
                else functools.partial(shutil.copytree, ignore=ignored, dirs_exist_ok=True)
            )
            copy(word, context / word)
    steps = [value for name, value in build if name == "RUN"]
    assert "python3 -m venv /opt/venv" in steps
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    # The step before this one would download gigabytes: the packages here are those of the environment of the tests.
    site = next((Path(sys.prefix) / "lib").glob("python*")) / "site-packages"
    own_site = next((target / "lib").glob("python*")) / "site-packages"
    (own_site / "packages.pth").write_text(f"{site}\n")
    last = steps[[step.startswith("pip install --no-deps") for step in steps].index(True)]
    words = last.replace("pip", f"{target}/bin/python -m pip", 1).split()
    done = subprocess.run([*words, "--quiet", "--ignore-installed"], cwd=context, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [target / "bin" / "moco-dist", "launch", "slurm", "configs/mocov2_r50_200ep.yaml", "--dry-run"]
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=context, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash")
    assert (own_site / "moco_dist" / "launchers" / "templates" / "pod.yaml").is_file()
    assert not (own_site / "tests").exists()

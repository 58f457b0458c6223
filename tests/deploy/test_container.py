"""The container file, read: hadolint, and what the manifests rely on."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest

import manifests

FILE = manifests.SOURCE / "deploy" / "container" / "Containerfile"
# DL3008: versions of packages come from one Debian release.
IGNORED = "DL3008"


@pytest.fixture(scope="module")
def stages() -> list[str]:
    """Text of each stage, its FROM line first."""
    text = re.sub(r"\\\n", " ", FILE.read_text())
    return re.findall(r"^FROM .*?(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)


def test_hadolint_finds_nothing() -> None:
    hadolint = pathlib.Path(sys.executable).parent / "hadolint"
    assert manifests.run(hadolint, "--ignore", IGNORED, "--failure-threshold", "style", FILE) == ""


def test_last_stage_holds_no_build(stages: list[str]) -> None:
    assert len(stages) == 2
    assert stages[1].startswith("FROM debian:bookworm-slim\n")
    assert "COPY" not in stages[1]
    assert "-dev" not in stages[1]


def test_build_stage_runs_what_make_package_runs(stages: list[str]) -> None:
    makefile = (manifests.SOURCE / "Makefile").read_text()
    targets = re.search(r"^package:.*\n\tninja -C \$\(BUILD\) (.*)$", makefile, re.MULTILINE)
    assert targets and f"--target {targets.group(1)} " in stages[0]


def test_runs_as_the_user_of_the_manifests(stages: list[str]) -> None:
    assert re.search(r"^USER 65532:65532$", stages[1], re.MULTILINE)
    assert stages[1].index("\nUSER ") < stages[1].index("\nENTRYPOINT ")


def test_health_check_is_a_command_the_program_has(stages: list[str]) -> None:
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", stages[1], re.MULTILINE)
    assert found
    command = json.loads(found.group(1))
    program = manifests.BUILD / "clients" / "cli" / command[0]
    help_text = manifests.run(program, command[1], "--help")
    assert {word for word in command if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", help_text))


def test_exposes_the_ports_of_the_manifests(stages: list[str]) -> None:
    assert "\nEXPOSE 9464 9465\n" in stages[1]

"""The table registry of a running keepsetd, through the Python client and through `keepset registry`."""

import json
import pathlib
import subprocess
import threading

import pytest
from conftest import MODEL, SEQ_LEN, binary, publish, random_layers, spec

import keepset
from keepset import table_file
from keepset.registry import table_ref
from keepset.server_process import ServerProcess
from keepset.v1 import table_pb2


def table_bytes(version: str, gate: float = 0.8) -> bytes:
    return table_file.uniform_table(
        MODEL, name="tiny", version=version, gate=gate, seq_len=SEQ_LEN
    )


@pytest.fixture
def running(tmp_path):
    """Version 1 in the watched directory and active, version 2 uploaded."""
    arguments = ["--table-writes", "--state", str(tmp_path / "state")]
    with ServerProcess(binary(), arguments=arguments) as server:
        publish(server, "1")
        with keepset.TableRegistry.connect(server.address, actor="test") as registry:
            registry.wait_until_active("tiny@1", timeout_seconds=10)
            registry.load(table_bytes("2", gate=0.9))
            yield server, registry


def keepset_cli(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess:
    program = pathlib.Path(binary()).parents[1] / "clients" / "cli" / "keepset"
    return subprocess.run(
        [program, "registry", *arguments, "--server", server.address],
        capture_output=True, text=True, check=False)


def active_version(registry: keepset.TableRegistry) -> str:
    return registry.list("tiny").lines[0].active_version


def decided_by(server: ServerProcess, **keywords) -> str:
    with keepset.Client.connect(server.address, transport="inline") as client:
        result = client.compress(layers=random_layers(), **spec(policy="compilerkv", **keywords))
        return result.table.version


@pytest.mark.parametrize("text", ["", "@1", ":stable", "tiny@", "tiny:"])
def test_half_a_table_name_is_refused(text):
    with pytest.raises(ValueError, match="NAME@VERSION"):
        table_ref(text)


def test_uploaded_version_is_ready_and_decides_nothing(running):
    server, registry = running
    assert active_version(registry) == "1"
    assert decided_by(server) == "1"


def test_activated_version_decides_the_next_operation(running):
    server, registry = running
    assert registry.activate("tiny@2").previous_version == "1"
    assert decided_by(server) == "2"


def test_rollback_is_one_call(running):
    server, registry = running
    registry.activate("tiny@2")
    registry.rollback("tiny")
    assert decided_by(server) == "1"


def await_version(registry: keepset.TableRegistry, version: str) -> None:
    assert any(
        known.version == version
        for change in registry.watch("tiny", timeout_seconds=10)
        for line in change.lines
        for known in line.versions
    )


def test_a_line_that_follows_the_newest_is_what_its_directory_says(running):
    server, registry = running
    registry.activate("tiny@2")
    publish(server, "3", gate=0.9)
    await_version(registry, "3")
    assert active_version(registry) == "2"
    answer = registry.follow_newest("tiny")
    assert answer.previous_version == "2"
    assert decided_by(server) == "3"
    publish(server, "4", gate=0.95)
    registry.wait_until_active("tiny@4", timeout_seconds=10)


def test_following_the_newest_of_an_unknown_line_is_not_found(running):
    _, registry = running
    with pytest.raises(keepset.NotFound, match="nobody"):
        registry.follow_newest("nobody")


def test_unloaded_version_cannot_be_pinned_any_more(running):
    server, registry = running
    registry.unload("tiny@2")
    states = {one.version: one.state for line in registry.list("tiny").lines for one in line.versions}
    assert states == {"1": table_pb2.TABLE_STATE_ACTIVE, "2": table_pb2.TABLE_STATE_RETIRED}
    with pytest.raises(keepset.NotFound):
        decided_by(server, table=keepset.TablePin(name="tiny", version="2"))
    assert decided_by(server) == "1"


def test_active_version_is_not_unloaded(running):
    server, registry = running
    with pytest.raises(keepset.Refused, match="active"):
        registry.unload("tiny@1")
    assert decided_by(server) == "1"


@pytest.mark.parametrize("write", ["follow_newest", "unload"])
def test_write_at_a_stale_revision_is_refused(running, write):
    _, registry = running
    stale = registry.list("tiny").revision - 1
    with pytest.raises(keepset.Refused, match="revision"):
        getattr(registry, write)("tiny" if write == "follow_newest" else "tiny@2",
                                 expected_revision=stale)
    assert active_version(registry) == "1"


def test_request_pins_a_loaded_version(running):
    server, _ = running
    assert decided_by(server, table=keepset.TablePin(name="tiny", version="2")) == "2"


def test_canary_of_everything_is_on_the_side_of_requests_with_an_id(running):
    server, registry = running
    registry.set_canary("tiny@2", 100.0)
    assert decided_by(server, request_id="request-1") == "2"
    assert decided_by(server) == "1"


def test_shadow_table_is_asked_and_does_not_decide(running):
    server, _ = running
    with keepset.Client.connect(server.address, transport="inline") as client:
        plain = client.compress(layers=random_layers(), **spec(policy="compilerkv"))
        result = client.compress(
            layers=random_layers(),
            **spec(policy="compilerkv", shadow_table=keepset.TablePin(version="2")))
    assert plain.shadow is None
    assert result.table.version == "1"
    assert result.bytes_after == plain.bytes_after
    assert result.shadow.error == ""
    assert result.shadow.table.version == "2"
    assert 0 <= result.shadow.kept_overlap <= 1
    assert result.shadow.would_be_bytes > 0


def test_missing_shadow_table_is_told_beside_the_answer(running):
    server, _ = running
    with keepset.Client.connect(server.address, transport="inline") as client:
        result = client.compress(
            layers=random_layers(),
            **spec(policy="compilerkv", shadow_table=keepset.TablePin(name="nobody")))
    assert result.outcome == "compressed"
    assert "nobody" in result.shadow.error
    assert result.shadow.table is None


def test_stale_revision_changes_nothing(running):
    _, registry = running
    with pytest.raises(keepset.KeepsetError) as refused:
        registry.activate("tiny@2", expected_revision=1)
    assert refused.value.code == "ABORTED"
    assert active_version(registry) == "1"


def test_watch_tells_of_the_activation(running):
    _, registry = running
    first = threading.Event()
    versions = []

    def follow():
        for change in registry.watch("tiny", until_active="tiny@2", timeout_seconds=10):
            versions.extend(line.active_version for line in change.lines)
            first.set()

    watcher = threading.Thread(target=follow)
    watcher.start()
    assert first.wait(10)
    registry.activate("tiny@2")
    watcher.join(10)
    assert versions == ["1", "2"]


def test_waiting_for_a_version_that_does_not_come_ends(running):
    _, registry = running
    with pytest.raises(keepset.KeepsetError) as over:
        registry.wait_until_active("tiny@2", timeout_seconds=0.2)
    assert over.value.code == "DEADLINE_EXCEEDED"


def test_writes_are_refused_unless_switched_on():
    with ServerProcess(binary()) as server:
        with keepset.TableRegistry.connect(server.address) as registry:
            with pytest.raises(keepset.Refused, match="--table-writes"):
                registry.load(table_bytes("1"))


def test_damaged_upload_is_refused_and_named(running):
    _, registry = running
    with pytest.raises(keepset.InvalidInput):
        registry.load(table_bytes("3")[:-8])
    assert not registry.validate(table_bytes("3")[:-8]).valid


def test_choice_survives_a_restart(tmp_path):
    arguments = ["--table-writes", "--state", str(tmp_path / "state")]
    with ServerProcess(binary(), arguments=arguments) as server:
        with keepset.TableRegistry.connect(server.address) as registry:
            registry.load(table_bytes("1"))
            registry.activate("tiny@1")
    with ServerProcess(binary(), arguments=arguments) as server:
        assert decided_by(server) == "1"


def test_cli_lists_versions_and_roles(running):
    server, _ = running
    listed = keepset_cli(server, "list")
    assert listed.returncode == 0
    assert "stable (newest)" in listed.stdout
    assert "upload" in listed.stdout


def test_cli_activates_and_says_what_was_before(running):
    server, registry = running
    done = keepset_cli(server, "activate", "tiny@2", "--actor", "someone", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["previous_version"], report["line"]["active_version"]) == ("1", "2")
    assert active_version(registry) == "2"
    assert any("table_write" in line and "someone" in line for line in server.log)


def test_cli_rolls_back(running):
    server, registry = running
    registry.activate("tiny@2")
    assert "(was 2)" in keepset_cli(server, "rollback", "tiny").stdout
    assert active_version(registry) == "1"


def test_cli_starts_and_ends_a_canary(running):
    server, registry = running
    assert keepset_cli(server, "canary", "tiny@2", "--percent", "12.5").returncode == 0
    assert registry.list("tiny").lines[0].canary.percent == 12.5
    assert keepset_cli(server, "canary", "tiny", "--end").returncode == 0
    assert not registry.list("tiny").lines[0].HasField("canary")


def test_cli_pin_holds_the_line_against_newer_files(running):
    server, registry = running
    assert keepset_cli(server, "pin", "tiny").returncode == 0
    newer = server.tables / "newer.safetensors"
    table_file.write_atomically(newer, table_bytes("9"))
    assert any(
        version.version == "9"
        for change in registry.watch("tiny", timeout_seconds=10)
        for line in change.lines
        for version in line.versions
    )
    assert active_version(registry) == "1"


def test_cli_alias_names_a_version_for_pins(running):
    server, registry = running
    assert keepset_cli(server, "alias", "tiny@2", "audit").returncode == 0
    assert registry.get("tiny:audit").version.version == "2"


def test_cli_watch_ends_when_the_version_is_active(running):
    server, _ = running
    watched = keepset_cli(server, "watch", "--until-active", "tiny@1", "--timeout-ms", "10000")
    assert watched.returncode == 0
    assert "active 1" in watched.stdout


def test_cli_watch_says_what_did_not_happen(running):
    server, _ = running
    watched = keepset_cli(server, "watch", "--until-active", "tiny@2", "--timeout-ms", "200")
    assert watched.returncode == 5
    assert "tiny@2 was not active within 200 ms" in watched.stderr


def test_cli_refusals_have_exit_code_three(running):
    server, _ = running
    assert keepset_cli(server, "activate", "tiny@7").returncode == 3
    assert keepset_cli(server, "unload", "tiny@1").returncode == 3

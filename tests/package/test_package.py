"""The Debian packages without installing them: files, control fields, unit, configuration, man pages.

Packages the programs of KEEPSET_BUILD (build/release by default), which must be built. What needs root and a clean system is
make test-package: install_test, unit_test and image_test beside this file.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("KEEPSET_BUILD", SOURCE / "build" / "release"))
LIBDIR = "usr/lib/x86_64-linux-gnu"
# systemd-analyze's exposure, 0 (tight) to 10 (open). What is left is the network, the user's files and /proc.
MAX_EXPOSURE = 2.0

FILES = {
    "keepset": {
        "etc/keepset/keepsetd.conf",
        "lib/systemd/system/keepsetd.service",
        "usr/bin/keepset",
        "usr/bin/keepsetd",
        "usr/share/doc/keepset/changelog.gz",
        "usr/share/doc/keepset/copyright",
        "usr/share/man/man1/keepset.1.gz",
        "usr/share/man/man8/keepsetd.8.gz",
        *(
            f"usr/share/keepset/proto/{path.relative_to(SOURCE / 'proto')}"
            for path in (SOURCE / "proto" / "keepset").rglob("*.proto")
        ),
    },
    "libkeepset1": {
        f"{LIBDIR}/libkeepset.so.0.1.0",
        f"{LIBDIR}/libkeepset.so.1",
        "usr/share/doc/libkeepset1/changelog.gz",
        "usr/share/doc/libkeepset1/copyright",
    },
    "libkeepset-dev": {
        f"{LIBDIR}/libkeepset.so",
        f"{LIBDIR}/pkgconfig/keepset.pc",
        "usr/include/keepset.h",
        "usr/share/doc/libkeepset-dev/changelog.gz",
        "usr/share/doc/libkeepset-dev/copyright",
    },
}


def run(*command: str | pathlib.Path, **options: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The packages by name, made anew."""
    folder = tmp_path_factory.mktemp("packages")
    run("ninja", "-C", BUILD, "keepsetd", "keepset", "keepset_shared", "man")
    run("cpack", "--config", BUILD / "CPackConfig.cmake", "-B", folder, cwd=BUILD)
    return {path.name.split("_")[0]: path for path in folder.glob("*.deb")}


@pytest.fixture(scope="session")
def root(packages: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Every package unpacked into one folder."""
    folder = tmp_path_factory.mktemp("root")
    for path in packages.values():
        run("dpkg-deb", "-x", path, folder)
    return folder


def field(package: pathlib.Path, name: str) -> str:
    return run("dpkg-deb", "-f", package, name).strip()


@pytest.mark.parametrize("name", FILES)
def test_holds_exactly_its_files(packages: dict[str, pathlib.Path], name: str) -> None:
    listing = [line.split(maxsplit=5) for line in run("dpkg-deb", "-c", packages[name]).splitlines()]
    files = {line[5].split(" -> ")[0].removeprefix("./") for line in listing if not line[0].startswith("d")}
    assert files == FILES[name]
    assert {line[1] for line in listing} == {"root/root"}


def test_only_programs_and_scripts_are_executable(root: pathlib.Path) -> None:
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    executable = {str(path.relative_to(root)) for path in files if path.stat().st_mode & 0o111}
    assert executable == {"usr/bin/keepset", "usr/bin/keepsetd"}


def test_depends_on_what_its_programs_link(packages: dict[str, pathlib.Path]) -> None:
    depends = {entry.split()[0] for entry in field(packages["keepset"], "Depends").split(", ")}
    assert {"adduser", "libc6", "libstdc++6", "libgrpc++1.51", "libprotobuf32", "libtbb12", "libhwy1"} <= depends
    assert not {entry for entry in depends if entry.endswith("-dev") or "gtest" in entry}
    assert field(packages["libkeepset-dev"], "Depends") == "libkeepset1 (= 0.1.0)"


def test_version_is_the_programs_and_the_changelogs(packages: dict[str, pathlib.Path], root: pathlib.Path) -> None:
    version = field(packages["keepset"], "Version")
    assert run(root / "usr/bin/keepset", "--version").split() == ["keepset", version]
    assert run(root / "usr/bin/keepsetd", "--version").split() == ["keepsetd", version]
    assert run("dpkg-parsechangelog", "-l", SOURCE / "deploy/debian/changelog", "-S", "Version").strip() == version


def test_configuration_is_a_conffile(packages: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    run("dpkg-deb", "-e", packages["keepset"], tmp_path)
    assert (tmp_path / "conffiles").read_text() == "/etc/keepset/keepsetd.conf\n"
    for script in ("postinst", "prerm", "postrm"):
        run("dash", "-n", tmp_path / script)
        assert os.access(tmp_path / script, os.X_OK)


def test_programs_are_hardened_and_stripped(root: pathlib.Path) -> None:
    for program in ("usr/bin/keepsetd", "usr/bin/keepset", f"{LIBDIR}/libkeepset.so.0.1.0"):
        dynamic = run("readelf", "-dW", root / program)
        assert "BIND_NOW" in dynamic
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        assert "GNU_RELRO" in run("readelf", "-lW", root / program)
        assert ".symtab" not in run("readelf", "-SW", root / program)


def test_library_exports_the_c_abi_only(root: pathlib.Path) -> None:
    symbols = run("nm", "-D", "--defined-only", root / f"{LIBDIR}/libkeepset.so.1").splitlines()
    names = {line.split()[-1].split("@")[0] for line in symbols}
    assert names
    assert all(name.startswith(("keepset_", "KEEPSET_")) for name in names), sorted(names)[:5]


@pytest.fixture
def served(root: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[str]:
    """keepsetd of the package with the packaged configuration; only its places lie in a folder of the test."""
    (tmp_path / "tables").mkdir()
    server = f"unix:{tmp_path}/k.sock"
    command = [root / "usr/bin/keepsetd", "--config", root / "etc/keepset/keepsetd.conf", "--listen", server]
    command += ["--tables", tmp_path / "tables", "--metrics-listen", "127.0.0.1:0"]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "ready" in line), "never ready")
        assert " ready " in line, line
        yield server
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(30) == 0


def test_packaged_configuration_is_served(root: pathlib.Path, served: str) -> None:
    assert run(root / "usr/bin/keepset", "health", "--server", served) == "serving\n"
    assert os.stat(served.removeprefix("unix:")).st_mode & 0o777 == 0o660


def test_unit_is_accepted_by_systemd(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    unit = (root / "lib/systemd/system/keepsetd.service").read_text()
    # Verified here, where /usr/bin/keepsetd is not installed.
    here = tmp_path / "keepsetd.service"
    here.write_text(unit.replace("ExecStart=/usr/bin/keepsetd", f"ExecStart={root}/usr/bin/keepsetd"))
    assert here.read_text() != unit
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(here)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_is_tight(root: pathlib.Path) -> None:
    unit = root / "lib/systemd/system/keepsetd.service"
    table = run("systemd-analyze", "security", "--no-pager", "--offline=yes", unit)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", table)
    assert exposure and float(exposure.group(1)) <= MAX_EXPOSURE, table


def test_unit_names_what_the_package_has(root: pathlib.Path) -> None:
    unit = (root / "lib/systemd/system/keepsetd.service").read_text()
    start = re.search(r"^ExecStart=(\S+) --config (\S+)$", unit, re.MULTILINE)
    assert start
    for path in start.groups():
        assert (root / path.removeprefix("/")).is_file()
    postinst = (SOURCE / "deploy/debian/keepset.postinst").read_text()
    user = re.search(r"^User=(\w+)$", unit, re.MULTILINE)
    assert user and f"--quiet {user.group(1)}\n" in postinst


def page_text(root: pathlib.Path, page: str) -> str:
    text = run("sh", "-c", f"gzip -dc '{root}/usr/share/man/{page}.gz' | mandoc -T ascii")
    # Bold is a letter struck over itself.
    return re.sub(r"\s+", " ", re.sub(r".\x08", "", text))


@pytest.mark.parametrize("page", ["man1/keepset.1", "man8/keepsetd.8"])
def test_man_page_is_well_formed(root: pathlib.Path, page: str, tmp_path: pathlib.Path) -> None:
    plain = tmp_path / "page"
    plain.write_text(run("gzip", "-dc", root / f"usr/share/man/{page}.gz"))
    run("mandoc", "-T", "lint", "-W", "warning", plain)


def test_man_page_of_the_daemon_has_every_flag(root: pathlib.Path) -> None:
    text = page_text(root, "man8/keepsetd.8")
    flags = set(re.findall(r"^  (--[a-z-]+)", run(root / "usr/bin/keepsetd", "--help"), re.MULTILINE))
    assert len(flags) > 10
    assert not {flag for flag in flags - {"--help"} if flag not in text}


def test_man_page_of_the_command_has_every_command_and_flag(root: pathlib.Path) -> None:
    program = root / "usr/bin/keepset"
    text = page_text(root, "man1/keepset.1")
    words: list[list[str]] = [[]]
    seen = 0
    while words:
        command = words.pop()
        help_text = run(program, *command, "--help")
        if re.match(r"usage: .* COMMAND", help_text):
            words += [[*command, name] for name in re.findall(r"^  ([a-z][a-z-]*) {2,}", help_text, re.MULTILINE)]
            continue
        seen += 1
        assert f"keepset {' '.join(command)} " in text
        for flag in re.findall(r"^  (?:-\w, )?(--[a-z-]+)", help_text, re.MULTILINE):
            assert flag in text, f"{command}: {flag}"
    assert seen > 5

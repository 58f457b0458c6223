"""The client over TCP with certificates."""

import re
import subprocess

import pytest
from conftest import binary

import keepset
from keepset.server_process import ServerProcess


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """server.pem (self-signed, so its own authority) and server.key."""
    directory = tmp_path_factory.mktemp("pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", "/CN=server.test", "-addext",
         "subjectAltName=DNS:server.test", "-keyout", directory / "server.key", "-out",
         directory / "server.pem"],
        check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def tcp_address(pem, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "keepsetd.conf"
    config.write_text(
        f'tls {{ certificate_file: "{pem}/server.pem" key_file: "{pem}/server.key" }}')
    arguments = ["--config", str(config), "--listen", "127.0.0.1:0"]
    with ServerProcess(binary(), arguments=arguments) as running:
        ready = next(line for line in running.log if "ready" in line)
        yield re.search(r"127\.0\.0\.1:\d+", ready).group()


def test_client_that_trusts_the_certificate_is_served(tcp_address, pem):
    tls = keepset.TlsFiles(ca=pem / "server.pem", server_name="server.test")
    with keepset.Client.connect(tcp_address, tls=tls, transport="inline") as client:
        assert "compilerkv" in client.server_info().policies


def test_plain_text_is_refused(tcp_address):
    with pytest.raises(keepset.Unreachable):
        keepset.Client.connect(tcp_address, transport="inline", timeout_seconds=2)


def test_another_server_name_is_refused(tcp_address, pem):
    tls = keepset.TlsFiles(ca=pem / "server.pem", server_name="elsewhere.test")
    with pytest.raises(keepset.Unreachable):
        keepset.Client.connect(tcp_address, tls=tls, transport="inline", timeout_seconds=2)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(keepset.InvalidInput, match="absent.pem"):
        keepset.Client.connect("localhost:1", tls=keepset.TlsFiles(ca=tmp_path / "absent.pem"))


def test_certificate_needs_its_key(pem):
    tls = keepset.TlsFiles(certificate=pem / "server.pem")
    with pytest.raises(keepset.InvalidInput, match="needs both"):
        keepset.Client.connect("localhost:1", tls=tls)


def test_unix_socket_takes_no_tls():
    with pytest.raises(keepset.InvalidInput, match="file mode"):
        keepset.Client.connect("unix:/nowhere.sock", tls=keepset.TlsFiles())

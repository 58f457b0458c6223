"""The client's end of the side socket, against a scripted server and against a real one."""

import contextlib
import os
import select
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import keepset
from keepset._side_socket import SideSocket

MAGIC = 0x3153504B
REQUEST = struct.Struct("<II32sQ16x")
REPLY = struct.Struct("<IiQ16x")
PATIENCE_SECONDS = 30


def answer(peer: socket.socket, fd_token: int, descriptors: tuple[int, ...] = (), code: int = 0) -> None:
    reply = REPLY.pack(MAGIC, code, fd_token)
    with contextlib.suppress(OSError):
        if descriptors:
            socket.send_fds(peer, [reply], list(descriptors))
        else:
            peer.send(reply)


def asked_token(peer: socket.socket) -> int | None:
    """The token of the next frame; None when the client has hung up."""
    frame = peer.recv(REQUEST.size)
    return REQUEST.unpack(frame)[3] if frame else None


@pytest.fixture
def connect(tmp_path):
    """Connects to a server that runs `script` once it has accepted the hello."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.settimeout(PATIENCE_SECONDS)
        path = str(tmp_path / "s")
        listener.bind(path)
        listener.listen(1)

        def start(script, timeout_seconds: float = PATIENCE_SECONDS) -> SideSocket:
            def serve() -> None:
                with listener.accept()[0] as peer:
                    asked_token(peer)
                    answer(peer, 0)
                    script(peer)

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join)
            side = SideSocket(path, bytes(32), timeout_seconds)
            stack.callback(side.close)
            return side

        yield start


@pytest.fixture
def pipe():
    """A pipe's ends; nobody holds the second any more once the first is at its end."""
    ends = list(os.pipe())
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def is_at_its_end(pipe: list[int]) -> bool:
    os.close(pipe[1])
    return bool(select.select([pipe[0]], [], [], 0)[0]) and os.read(pipe[0], 1) == b""


def test_one_exchange_at_a_time(connect):
    together = []

    def script(peer):
        for _ in range(2):
            asked_token(peer)
            together.append(bool(select.select([peer], [], [], 0.3)[0]))
            answer(peer, 1)

    side = connect(script)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(side.pass_fd, [0, 0]))
    assert together == [False, False]


def test_a_reply_after_the_time_limit_is_not_taken_for_the_next_one(connect, pipe):
    may_answer = threading.Event()

    def script(peer):
        asked_token(peer)
        may_answer.wait(PATIENCE_SECONDS)
        answer(peer, 7, (pipe[1],))
        asked_token(peer)
        answer(peer, 8, (pipe[1],))

    side = connect(script, timeout_seconds=1)
    with pytest.raises(keepset.Unreachable, match="timed out"):
        side.fetch_fd(7)
    may_answer.set()
    with pytest.raises(keepset.Unreachable):
        side.fetch_fd(8)


def test_a_descriptor_of_another_token_is_refused_and_closed(connect, pipe):
    def script(peer):
        asked_token(peer)
        answer(peer, 8, (pipe[1],))

    with pytest.raises(keepset.KeepsetError, match="reply for fd_token=8, want 7"):
        connect(script).fetch_fd(7)
    assert is_at_its_end(pipe)


def test_a_descriptor_that_nobody_asked_for_is_closed(connect, pipe):
    def script(peer):
        asked_token(peer)
        answer(peer, 5, (pipe[1],))

    with pytest.raises(keepset.KeepsetError, match="reply for fd_token=5"):
        connect(script).pass_fd(0)
    assert is_at_its_end(pipe)


def test_a_refusal_leaves_the_connection_usable(connect):
    def script(peer):
        asked_token(peer)
        answer(peer, 7, code=5)
        asked_token(peer)
        answer(peer, 5)

    side = connect(script)
    with pytest.raises(keepset.KeepsetError, match="refused"):
        side.fetch_fd(7)
    assert side.pass_fd(0) == 5


def test_threads_that_allocate_get_their_own_memory(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:

        def allocate(pages: int) -> None:
            for _ in range(100):
                region = client.allocate_region(4096 * pages)
                assert os.fstat(region.fd).st_size == 4096 * pages
                client.retire(region)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(allocate, [1, 2, 3, 4]))

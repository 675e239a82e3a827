"""As ranks_forked.py, without its import of torch at every launch: a server that has imported what ranks need (SOCKET) forks for
each launch, whose own process (RANKS FOLDER JOB) hands over its standard streams and environment and waits."""

import gc
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path


def serve(path: str) -> None:
    import ranks_forked

    ranks_forked.imports()
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        Path(f"{path}.new").rename(path)  # from now on it answers
        while True:
            caller = server.accept()[0]
            message, streams, *_ = socket.recv_fds(caller, 1 << 20, 3)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not message:
                return
            if not os.fork():
                server.close()
                launch(caller, json.loads(message), streams)
            caller.close()
            for stream in streams:
                os.close(stream)


def launch(caller: socket.socket, request: dict, streams: list[int]) -> None:
    import ranks_forked

    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ |= request["environment"]
        code = ranks_forked.main(request["ranks"], *request["argv"])
    finally:
        caller.send(bytes([code]))
        os._exit(code)


def ask(ranks: str, *argv: str) -> int:
    request = {"ranks": int(ranks), "argv": argv, "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["RANKS_SERVER"])
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        return (server.recv(1) or b"\1")[0]


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]) if len(sys.argv) == 2 else ask(*sys.argv[1:]))

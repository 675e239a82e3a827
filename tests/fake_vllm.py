#!/usr/bin/env python3
"""What the tests put in vLLM's place: it takes vLLM's command line, and answers as vLLM does, with token ids, but without a
model (tests/judge_server.py). `python tests/fake_vllm.py serve MODEL --port P ...`; $FAKE_VLLM may hold a fault."""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from judge_server import Handler, Server, TextServer  # noqa: E402


def main() -> None:
    argv, fault = sys.argv[1:], os.environ.get("FAKE_VLLM", "")
    print("argv:", *argv, flush=True)
    if fault == "dies":
        print("INFO [a.py:1] `OSError: [Errno 24]` may come of this\n(Worker) ERROR [b.py:2]     raise ValueError(\n"
              "(Worker) ERROR [b.py:2] ValueError: not enough memory for the KV cache\nTraceback (most recent call last):\n  File ...\n"
              "RuntimeError: it failed; see the root cause above", file=sys.stderr, flush=True)
        raise SystemExit(1)
    worker = subprocess.Popen(["sleep", "600"])  # as vLLM's engine: a process of its own
    print("pids:", os.getpid(), worker.pid, flush=True)
    model = argv[1]
    fake = TextServer(tokenizer=Path(model) / "tokenizer.json", lists={"another": "another"} if fault == "another" else {model: model})
    if fault == "dies-later":
        fake.faults = lambda k, body: os._exit(3) if k > 2 else None
    time.sleep(0.3)
    Server((argv[argv.index("--host") + 1], int(argv[argv.index("--port") + 1])),
           type("Handler", (Handler,), {"judge": fake})).serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()

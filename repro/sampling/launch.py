"""Servers to sample from: one that the run starts, waits for and stops, or one that is already there.

    python -m repro.sampling.launch COMMAND...

stands between a run and the server that it starts. It holds the run's end of a pipe as its stdin: when that ends, in
whatever way the run did, it ends the server and all that this one has started.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from repro.base.records import UserError, first_line, open_log
from repro.models import decoding, load
from repro.sampling import alike
from repro.sampling.server import CONCURRENCY
from repro.servers.endpoint import Endpoint, shown, wrong_shape
from repro.servers.fetch import Refused, get_json

HOST = "127.0.0.1"
KEY = "VLLM_API_KEY"       # vLLM's own name for the key that it asks for, where it is told to ask for one
# Of vLLM on a CPU: GiB of its cache, by itself nine tenths of the machine's memory less what is in use; cores left idle.
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
CPU_FLAGS = ["--enforce-eager", "--block-size", "32"]  # no compiler; beginnings of 32 tokens are shared, not of 128 alone
START_S = 3600.0           # until a server must have loaded its weights, a first download included
SAY_EVERY_S = 60.0
DEADLINE_S = 1200.0        # one request, in which it may wait for others
GRACE_S = 30.0             # for a server to end by itself


def check(engine: str, url: str | None) -> None:
    """Raise UserError, with the step that is missing, where this engine cannot sample here."""
    if engine == "transformers":
        if url:
            raise UserError("--sampler-url: the engine transformers samples in this process; add --sampler vllm or server")
    elif url:
        Endpoint(model="-", base_url=url, flag="--sampler-url", key_env=KEY).key()
    elif engine == "vllm":
        _vllm()
    elif not (find_spec("fastapi") and find_spec("uvicorn")):
        raise UserError("--sampler server: transformers serve needs its extra: pip install 'transformers[serving]'")


def _vllm() -> str:
    """vLLM's executable: it lives in an environment of its own, since it pins another torch and transformers."""
    named = os.environ.get("SAMI_VLLM")
    found = shutil.which(named or "vllm")
    if not found:
        where = f"$SAMI_VLLM is {named!r}, which is no executable" if named else "there is no vllm on PATH"
        raise UserError(f"--sampler vllm: {where}; install it in an environment of its own (python -m venv E; E/bin/pip "
                        "install vllm; for a CPU `make vllm`) and set SAMI_VLLM=E/bin/vllm, or name a server with "
                        "--sampler-url")
    return found


def command(engine: str, model: str, *, port: int, dtype: str, gpus: int, share: int | None, context: int,
            ends: Collection[int] = ()) -> list[str]:
    """The command line that serves `model` on `gpus` GPUs, of which `share` (None: all) hold a copy of it together.
    `context` tokens is the longest that will be asked for; any of the tokens `ends` ends an answer."""
    there = [model, "--host", HOST, "--port", str(port), "--dtype", dtype]
    if engine == "vllm":  # sampling defaults that came with the weights stay out of it
        share = share or max(1, gpus)
        copies = ["--data-parallel-size", str(gpus // share)] if gpus // share > 1 else []
        on_gpus = gpus or shutil.which("nvidia-smi")  # where torch here is a CPU's, vLLM's own need not be
        here = [] if on_gpus else CPU_FLAGS
        set_ = [] if on_gpus else [f"{name}={value}" for name, value in ON_CPU.items() if not os.environ.get(name)]
        return ["env", "-u", "PYTHONPATH", *set_, _vllm(), "serve", *there, "--tensor-parallel-size", str(share), *copies,
                "--max-model-len", str(context), "--seed", "0", "--generation-config", "vllm", *here]
    code, device = "from repro.sampling.launch import transformers_serve; transformers_serve()", "auto" if gpus else "cpu"
    return [sys.executable, "-c", code, ",".join(map(str, sorted(ends))), "serve", *there, "--device", device]


def transformers_serve() -> None:
    """`transformers serve` of models that decode plainly and end at the tokens of the first argument: by itself it (5.23)
    takes penalties, beams and token lists from the weights' generation config, and no request can unset them all."""
    from transformers import PreTrainedModel
    from transformers.cli.transformers import main

    ends, load = [int(i) for i in sys.argv.pop(1).split(",") if i], PreTrainedModel.from_pretrained.__func__

    def plain(cls, *args, **kwargs):
        return load(cls, *args, **kwargs | {"generation_config": decoding.plain_decoding(ends)})

    PreTrainedModel.from_pretrained = classmethod(plain)
    main()


@dataclass(frozen=True)
class Server:
    """A server that was seen to serve the model asked for, which is `listed` as /v1/models tells it. `process`: where the
    run has started it. `differs`: how its answers are others than the run's own weights', where a user takes them."""

    engine: str
    endpoint: Endpoint
    listed: dict | None = field(default=None, repr=False)
    differs: tuple[str, ...] = ()
    log: Path | None = None
    process: subprocess.Popen | None = None

    def wrong(self, answer: dict, request: dict, reads: Mapping[str, int] | None = None) -> str | None:
        """What makes an answer to a request useless, in words. `reads`: the tokens that a prompt of text is trained as, of
        which a server of its own mind reads more (a second opening token) or fewer."""
        choice, usage, prompt = answer["choices"][0], answer.get("usage"), request["prompt"]
        if answer.get("model") not in (self.endpoint.model, f"{self.endpoint.model}@main"):
            return f"an answer by the model {answer.get('model')!r}, not {self.endpoint.model!r}"
        if choice.get("finish_reason") not in ("stop", "length"):
            return f"finish_reason {choice.get('finish_reason')!r}, neither stop nor length"
        ids = choice.get("token_ids")
        if self.engine == "vllm" and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
            return "no token_ids in the answer: vLLM 0.10.2 or newer gives them"
        read, said = (usage.get(k) if isinstance(usage, dict) else None for k in ("prompt_tokens", "completion_tokens"))
        if type(read) is not int or type(said) is not int:
            return "no usage in the answer"
        expected = len(prompt) if isinstance(prompt, list) else (reads or {}).get(prompt, read)
        if read != expected:
            return f"an answer to a prompt of {read} tokens, not {expected}"
        if said > request["max_tokens"]:
            return f"an answer of {said} tokens, where {request['max_tokens']} were asked for"
        if choice["finish_reason"] == "length" and said < request["max_tokens"]:
            return f"an answer cut at {said} tokens of {request['max_tokens']}: is the server's context too short?"
        return None

    def facts(self) -> dict:
        """What a run's record says of it: the engine, and its version where it tells one."""
        version = None
        with suppress(OSError, ValueError, AttributeError):
            version = get_json(f"{self.endpoint.url.removesuffix('/v1')}/version", self.endpoint.key()).get("version")
        return {"engine": self.engine, "version": version, "started_here": self.process is not None,
                **({"differs": list(self.differs)} if self.differs else {})}

    def last_words(self) -> str:
        """Why the server ended, if it did, to be added to a message."""
        if self.process is None or self.process.poll() is None:
            return ""
        return f" (the server ended: {_why(self.log)}; {self.log} tells more)"


# ---- starting, finding and stopping

@contextmanager
def served(engine: str, model: str, *, url: str | None, dtype: str, share: int | None, context: int, log: Path,
           say: Callable[[str], None], ends: Collection[int] = (), as_is: bool = False) -> Iterator[Server]:
    """A server of `model` (a folder or a hub name) for as long as the block lasts: the one at `url`, or one that is
    started here on all GPUs (`share`, `ends`: as of `command`). Raises UserError where it does not come up, serves
    something else, or, unless it is taken `as_is`, does not answer as these weights do."""
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    if url:
        yield _alike(_identified(engine, place, Endpoint(model=place, base_url=url, **_limits(engine)), dtype), as_is, say)
        return
    port = _free_port()
    argv = command(engine, place, port=port, dtype=dtype, gpus=_free_gpus(), share=share, context=context, ends=ends)
    say(f"starting {engine if engine == 'vllm' else 'transformers serve'} with {place}; its log is {log}")
    with open_log(log) as out:
        process = subprocess.Popen([sys.executable, "-m", __spec__.name, *argv], stdin=subprocess.PIPE, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_ready(process, f"http://{HOST}:{port}/health", log, say)
        endpoint = Endpoint(model=place, base_url=f"http://{HOST}:{port}/v1", **_limits(engine))
        server = _alike(_identified(engine, place, endpoint, dtype), as_is, say)
        yield replace(server, log=log, process=process)
    finally:
        _stop(process)


def _limits(engine: str) -> dict:
    return {"key_env": KEY, "flag": "--sampler-url", "price": (0.0, 0.0), "max_usd": 0.0, "deadline_s": DEADLINE_S,
            "concurrency": CONCURRENCY[engine]}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _free_gpus() -> int:
    """How many GPUs there are; what this process holds of their memory is given back."""
    import torch

    if not torch.cuda.is_available():
        return 0
    load.release()
    return torch.cuda.device_count()


def _wait_until_ready(process: subprocess.Popen, health: str, log: Path, say: Callable[[str], None]) -> None:
    began = said = time.monotonic()
    while process.poll() is None:
        with suppress(OSError, ValueError):
            if get_json(health) is not None:
                return
        now = time.monotonic()
        if now - began > START_S:
            raise UserError(f"the sampling server was not ready within {START_S:.0f} s; {log} tells what it was doing")
        if now - said > SAY_EVERY_S:
            said = now
            say(f"waiting for the sampling server: {now - began:.0f} s; it says: {_tail(log, 1)}")
        time.sleep(0.2)
    say(_tail(log, 15))
    raise UserError(f"the sampling server ended before it was ready (above are the last lines of {log}): {_why(log)}")


def _said(log: Path) -> list[str]:
    """The lines of the server that was started last."""
    text = log.read_bytes().decode("utf-8", "replace") if log.exists() else ""
    lines = text.rpartition(STARTED)[2].splitlines()[STARTED in text:]
    return [said for line in lines if (said := line.partition(ENDED)[0].rstrip())]  # whose last line may not have ended


def _tail(log: Path, lines: int) -> str:
    return "\n".join(_said(log)[-lines:]) or "nothing"


def _why(log: Path) -> str:
    """What a server died of: the first exception near its end, which the others (of vLLM's three processes) go back to; its
    last line where there is none."""
    lines = _said(log) or ["nothing"]
    raised = [found[1] for line in lines[-200:] if (found := RAISED.search(line))]
    return shown(raised[0] if raised else lines[-1], 300)


def _identified(engine: str, place: str, endpoint: Endpoint, dtype: str) -> Server:
    """The server at `endpoint`, which lists `place` as a model or answers as it; else UserError says what to serve."""
    try:
        rows = (get_json(f"{endpoint.url}/models", endpoint.key()) or {}).get("data") or []
    except Refused as e:
        rows = []
        if e.status in (401, 403):
            raise UserError(f"the sampling server {endpoint.url} refused the key in ${KEY} ({e})") from None
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"no sampling server answers at {endpoint.url} ({first_line(e)})") from None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    named = {row["id"]: row.get("root") or row["id"] for row in rows if row.get("id") and isinstance(row["id"], str)}
    found = next((name for name, root in named.items() if place in (_real(name), _real(root))), place)
    listed = next((row for row in rows if row.get("id") == found), None)
    server = Server(engine, Endpoint(model=found, base_url=endpoint.url, **_limits(engine)), listed=listed)
    body = {"model": found, "prompt": [1] if engine == "vllm" else ".", "max_tokens": 1, "temperature": 0.0}
    try:
        answer = get_json(f"{endpoint.url}/completions", endpoint.key(), body | (
            {"return_token_ids": True} if engine == "vllm" else {}), timeout=DEADLINE_S)
        wrong = wrong_shape(answer, chat=False) or server.wrong(answer, body)
    except (OSError, ValueError) as e:
        wrong = first_line(e)
    if wrong is None:
        return server
    serves = f"serves {', '.join(sorted(named))}" if named else "does not list it"
    start = " ".join(["vllm", "serve", place, "--dtype", dtype, "--generation-config", "vllm"] if engine == "vllm"
                     else ["transformers", "serve", place, "--dtype", dtype])
    raise UserError(f"{endpoint.url} must serve {place} now, but {serves} ({wrong}); serve it (`{start} ...`), then run "
                    "the same command to go on")


def _alike(server: Server, as_is: bool, say: Callable[[str], None]) -> Server:
    """The server, if its answers are those of the weights asked for, or are taken as they are."""
    endpoint = server.endpoint

    def ask(body: dict) -> dict:
        return get_json(f"{endpoint.url}/completions", endpoint.key(), body, timeout=DEADLINE_S)

    differs = tuple(alike.differences(ask, server.engine, endpoint.model, server.listed))
    if differs and not as_is:
        raise UserError(f"{endpoint.url} does not answer as {endpoint.model} does: {'; '.join(differs)}. The run's numbers "
                        "would be of other responses; --sampler-as-is takes them, and run.json says so")
    for why in differs:
        say(f"{endpoint.url}: {why}; taken as it is (--sampler-as-is)")
    return replace(server, differs=differs)


def _real(name) -> str:
    if not isinstance(name, str) or "\0" in name:
        return ""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _stop(process: subprocess.Popen) -> None:
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(GRACE_S + 15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- between the run and the server

STARTED, ENDED = "repro.sampling.launch: starting ", "repro.sampling.launch: the server ended with "
RAISED = re.compile(r"(?:^|\] )((?:\w+\.)*\w+(?:Error|Exception)(?:: .*)?)$")  # a traceback's last line


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the server; one that is ignored would be inherited
    signal.signal(signal.SIGINT, lambda *_: None)
    print(f"{STARTED}{' '.join(sys.argv[1:])}", flush=True)
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def heed():
        while os.read(0, 64):
            pass
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=heed, daemon=True).start()
    print(f"{ENDED}{server.wait()}", flush=True)
    os.killpg(0, signal.SIGKILL)  # what it has started and left


if __name__ == "__main__":
    main()

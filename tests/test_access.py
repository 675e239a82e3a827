"""Gated models and data: what is missing is named before anything is loaded, against a hub on this machine."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from repro import cli
from repro.base.records import UserError
from repro.models import hub as models

ANSWERS = {  # as the hub's: status and X-Error-Code for (repository, whether a token was sent)
    ("models/lab/open", False): (200, None), ("models/lab/open", True): (200, None),
    ("models/lab/gated", False): (401, "GatedRepo"), ("models/lab/gated", True): (403, "GatedRepo"),
    ("models/lab/none", False): (401, None), ("models/lab/none", True): (404, "RepoNotFound"),
    ("models/lab/busy", False): (503, None), ("models/lab/limited", True): (429, None),
    ("datasets/lab/gated", False): (401, "GatedRepo")}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        token = self.headers.get("Authorization", "")
        name = self.path.removeprefix("/api/").removesuffix("/auth-check")
        status, code = ANSWERS.get((name, bool(token)), (500, None))
        headers = {"X-Error-Code": code} if code else {}
        if "revoked" in token:
            status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        self.send_response(status)
        for key, value in (headers | {"Content-Length": "2"}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    models.missing_step.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    models.missing_step.cache_clear()


@pytest.mark.parametrize("name, token, step", [
    ("lab/gated", None, r"you are not logged in: accept the licence on http://127.0.0.1:\d+/lab/gated, then run `hf auth login`"),
    ("lab/gated", "hf_good", r"your account has no access: accept the licence on http://127.0.0.1:\d+/lab/gated with"),
    ("lab/none", None, r"no such model on the hub, or a private one: check the name, or run `hf auth login`"),
    ("lab/none", "hf_good", r"no such model on the hub, or a private one that your account cannot see: check the name$"),
    ("lab/gated", "hf_revoked", r"refuses your token \(expired or revoked\): run `hf auth login`"),
    ("lab/busy", None, r"the hub answers with status 503; try again later"),
    ("lab/limited", "hf_good", r"status 429; try again later"),
    ("lab/two--dashes..", None, r"not a hub name: ")])
def test_the_missing_step_is_named(hub, monkeypatch, name, token, step):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=rf"^--model {name}: .*{step}") as refused:
        models.resolve_model(name)
    assert "hf_" not in str(refused.value)


def test_an_open_model_is_asked_for_once(hub):
    assert models.resolve_model("lab/open") == models.resolve_model("lab/open") == "lab/open"
    assert hub.asked == ["/api/models/lab/open/auth-check"]


def test_no_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"lab/open: not on this machine, and http://127.0.0.1:9 cannot be reached"):
        models.resolve_model("lab/open")


def test_a_model_in_the_cache_needs_no_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "models--lab--gated"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be reached"):  # the config alone is not the model
        models.resolve_model("lab/gated")
    models.missing_step.cache_clear()
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert models.resolve_model("lab/gated") == "lab/gated"


def test_data_sets_too(hub):
    assert "gated, and you are not logged in" in models.missing_step("lab/gated", "dataset")
    assert hub.asked == ["/api/datasets/lab/gated/auth-check"]


def test_a_run_asks_before_it_reads_anything(hub, capsys, tmp_path):
    """The model, and the writer's model: exit code 2, one line, and nothing but the question was sent."""
    for flags, name in ((["--model", "lab/gated"], "lab/gated"),
                        (["--writer", "local", "--writer-model", "lab/none"], "lab/none")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", "exp1", "--queries", "none.jsonl", "--out", str(tmp_path / "out"), *flags])
        err = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and err[-1].startswith(f"repro: --model {name}: "), err
        assert not list((tmp_path / "out").rglob("*.json*"))
    assert hub.asked == [f"/api/models/{name}/auth-check" for name in ("lab/gated", "lab/none")]

"""The published record and its verification: right on what is right, red on every planted error, clear on bad input."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import made_archive as made
import numpy as np
import pytest

from repro.base import metrics, places, records
from repro.base.records import UserError
from repro.paper import archive
from repro.paper import cells as published

REAL = archive.LOCAL
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the authors' record is not at {REAL}")


@pytest.fixture
def small(tmp_path):
    archive, facts = made.make(tmp_path)

    def run(**more):
        return published.verify(archive, tmp_path / "out", published=facts, **more)

    return archive, facts, run, tmp_path / "out"


def cells(out: Path) -> dict:
    return {(c["table"], c["model"], c["subset"]): c for c in records.read_json(out / "verify.json")["cells"]}


# ---- the small archive

def test_small_archive_is_green(small, capsys):
    _, _, run, out = small
    assert run() == 0
    got = cells(out)
    assert {k: c["status"] for k, c in got.items()} == {
        (5, "mistral-7b", "tldr"): "PASS", (5, "mixtral-8x7b", "tldr"): "ERRATUM",
        (9, "llama3-70b", "held_out"): "PASS", (9, "llama3-70b", "learned"): "ERRATUM",
        (2, "mistral-7b", "helpful"): "PASS"}
    assert got[9, "llama3-70b", "learned"]["recomputed"] == 54.0  # (126 + 18 / 2) / 250
    assert got[5, "mixtral-8x7b", "tldr"]["published"] == 24.8
    printed = capsys.readouterr().out
    assert "2 ERRATUM, 3 PASS" in printed and "claims: 3 PASS" in printed and "arithmetic: 5 PASS" in printed
    page = (out / "README.md").read_text()
    assert "repeated cell" in page and "earlier series" in page and "NOT RUN: the responses" in page
    assert run() == 0 and (out / "README.md").read_text() == page


def test_contract_of_verify_json(small):
    _, _, run, out = small
    run()
    result = records.read_json(out / "verify.json")
    assert set(result) == {"cells", "arithmetic", "claims", "common_rule", "record"}
    assert isinstance(result["record"], dict)
    for c in result["cells"]:
        assert set(c) >= {"table", "experiment", "subset", "model", "writer", "cot", "iteration", "baseline",
                          "published", "recomputed", "estimator", "ties", "status"}
        assert type(c["table"]) is int


def flip(archive, name, row=0):
    made.edit(archive / made.REPO / name, lambda v: v[row].__setitem__(0, 1 - v[row][0]))


@pytest.mark.parametrize("name", ["a.json", "b.json", "c.json", "d.json"])
def test_one_flipped_verdict_turns_it_red(small, name):
    archive, facts, run, out = small
    flip(archive, name)
    with pytest.raises(UserError, match=f"{name}.*altered.*refused"):
        run()
    assert not out.exists()
    made.rehash(archive, facts)  # even if the manifest is altered to match
    assert run() == 1


def test_erratum_needs_its_explanation(small):
    archive, facts, run, _ = small
    flip(archive, "earlier.json")
    made.rehash(archive, facts)
    assert run() == 1


@pytest.mark.parametrize("index", range(5))
def test_one_altered_published_cell_turns_it_red(small, index):
    _, facts, run, _ = small
    made.edit(facts / "tables.json", lambda t: t["cells"][index].__setitem__("published", 47.2))
    assert run() == 1


def test_a_listed_interval_has_a_limit(small):
    _, facts, run, _ = small
    made.edit(facts / "tables.json", lambda t: t["cells"][2].update(ci95=[50.0, 62.4], interval_differs="listed"))
    assert run() == 0
    made.edit(facts / "tables.json", lambda t: t["cells"][2].update(ci95=[49.0, 63.4]))
    assert run() == 1


def test_one_altered_manifest_entry_turns_it_red(small):
    _, facts, run, _ = small
    files = json.loads((facts / "manifest.json").read_text())["files"]
    made.edit(facts / "manifest.json", lambda m: m["files"][0].update(sha256="0" * 64))
    with pytest.raises(UserError, match="sha256"):
        run()
    swapped = {"path": files[3]["path"], "sha256": files[3]["sha256"], "bytes": files[3]["bytes"]}
    made.edit(facts / "manifest.json", lambda m: (m["files"][2].update(swapped), m["files"].pop(3)))
    with pytest.raises(UserError, match="sha256"):
        run()
    made.edit(facts / "manifest.json", lambda m: m["files"][0].update(sha256=files[0]["sha256"]))
    assert run() == 1  # the wrong file feeds a cell, and another cell has none


@pytest.mark.parametrize("name, wrong", [
    ("win_rate", lambda scores, ties="half": metrics.mean(100 * np.asarray(scores))),  # ties always half
    ("win_rate_stratified", lambda scores, longer, ties="half": metrics.mean(100 * np.floor(scores))),
    ("win_rate_logistic", lambda scores, d, ties="loss", ridge=0.0: metrics.mean(100 * np.asarray(scores))),
    ("normal_interval", lambda percent, n: (5.0, (percent - 9.8, percent + 9.8), (percent - 50) / 5)),
    ("mean", lambda values: metrics.Estimate(0.0, 0.1, (0.0, 0.0), 250)),
])
def test_one_wrong_estimator_turns_it_red(small, monkeypatch, name, wrong):
    _, _, run, _ = small
    assert run() == 0
    monkeypatch.setattr(metrics, name, wrong)
    assert run() == 1


def test_a_cell_fed_by_no_file_is_not_run(small, capsys):
    _, facts, run, out = small
    made.edit(facts / "manifest.json", lambda m: m["files"].pop(2))
    assert run() == 0 and cells(out)[9, "llama3-70b", "held_out"]["status"] == "NOT RUN"
    assert "NOT RUN" in capsys.readouterr().out
    assert run(strict=True) == 1


BAD_INPUT = {
    "two entries, one path": ("manifest.json", lambda v: v["files"].append(v["files"][0]), "path: .* is already"),
    "fed by two": ("manifest.json", lambda v: v["files"][5].update(
        {k: v["files"][0].get(k) for k in archive.KEYS}, tables=["table5"]), "fed by two files"),
    "path escapes": ("manifest.json", lambda v: v["files"][0].update(path="../x"), "field path"),
    "unknown kind": ("manifest.json", lambda v: v["files"][0].update(kind="video"), r"manifest.json: files\[0\]: field kind: expected 'verdicts', .* found .video."),
    "no sha256": ("manifest.json", lambda v: v["files"][0].pop("sha256"), r"files\[0\]: field sha256: missing"),
    "bytes": ("manifest.json", lambda v: v["files"][1].update(bytes=True), r"files\[1\]: field bytes: expected a valid integer, found true"),
    "an entry": ("manifest.json", lambda v: v["files"].append("x"), r"manifest.json: field files\[\d+\]: expected an object, found .x.$"),
    "not a list": ("manifest.json", lambda v: v.update(files=3), "manifest.json: field files: expected a valid array, found 3"),
    "above 100": ("tables.json", lambda v: v["cells"][0].update(published=124.8), r"tables.json: cells\[0\]: field published: expected less than or equal to 100, found 124.8"),
    "n": ("tables.json", lambda v: v["cells"][0].update(n=0), "field n: expected greater than or equal to 2"),
    "ties": ("tables.json", lambda v: v["cells"][0].update(ties="drop"), r"cells\[0\]: field ties: expected 'half' or 'loss', found .drop.$"),
    "interval": ("tables.json", lambda v: v["cells"][0].update(ci95=[3.0, -2]), r"field ci95\[1\]: expected greater than or equal to 0"),
    "no cell": ("tables.json", lambda v: v.update(cells=[]), "field cells: .*at least 1 item"),
    "table": ("tables.json", lambda v: v["cells"][0].update(table=True), "field table: expected a valid integer"),
    "no t": ("tables.json", lambda v: v["cells"][0].pop("t"), "field t: missing"),
    "a cell twice": ("tables.json", lambda v: v["cells"].append(v["cells"][0]), "this cell twice"),
    "249 rows": ("a.json", lambda v: v.pop(), "a.json: expected 250 rows, found 249"),
    "score": ("a.json", lambda v: v[7].__setitem__(0, 0.3), "a.json: row 7: field score: allowed: 0, 0.5 and 1"),
    "short row": ("a.json", lambda v: v[7].pop(), "row 7: expected"),
    "length": ("a.json", lambda v: v[7].__setitem__(1, -1), "row 7: field tokens"),
    "mi": ("mi.json", lambda v: v.__setitem__(3, "x"), "mi.json: row 3: expected a number"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(small, case):
    archive, facts, run, out = small
    name, change, message = BAD_INPUT[case]
    made.edit(facts / name if (facts / name).exists() else archive / made.REPO / name, change)
    if name not in ("manifest.json", "tables.json"):
        made.rehash(archive, facts)
    with pytest.raises(UserError, match=message) as e:
        run()
    assert "\n" not in str(e.value) and name.split(".")[0] in str(e.value) and not out.exists()


def test_missing_and_truncated_files(small, tmp_path):
    archive, _, run, out = small
    path = archive / made.REPO / "c.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="c.json: .* bytes, not .*truncated"):
        run()
    path.unlink()
    with pytest.raises(UserError, match="cannot read .*c.json"):
        run()
    with pytest.raises(UserError, match="--archive .*nowhere: no such folder"):
        published.verify(tmp_path / "nowhere", out)


# ---- the download

class Server:
    """Serves the made archive on 127.0.0.1 as its origin would; `fault` maps a file name to a behaviour."""

    def __init__(self, root: Path):
        self.fault, self.asked, self.sent, server = {}, [], 0, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner, repo, _, *rest = self.path.strip("/").split("/")
                path = root / owner / repo / "/".join(rest)
                server.asked.append(path.name)
                fault = server.fault.get(path.name)
                if fault == "404" or not path.is_file():
                    return self.send_error(404)
                data = path.read_bytes()
                if fault == "wrong":
                    data = bytes(len(data))
                self.send_response(200)
                if fault not in ("endless", "cut unsaid"):
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault in ("cut", "cut unsaid", "stall"):
                    self.wfile.write(data[:100])
                    self.wfile.flush()
                    time.sleep(1.0 if fault == "stall" else 0)
                    return None
                with suppress(ConnectionError):  # who fetches goes when there is more than the pinned file
                    while fault == "endless" and server.sent < 2**26:
                        self.wfile.write(data)
                        server.sent += len(data)
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def served(tmp_path, monkeypatch):
    folder, facts = made.make(tmp_path)
    monkeypatch.setattr("repro.paper.archive.LOCAL", tmp_path / "absent")
    monkeypatch.setenv("SAMI_CACHE", str(tmp_path / "cache"))
    server = Server(folder)
    entries = archive.load_manifest(facts / "manifest.json")

    def fetch(**more):
        return archive.archive_root(None, base_url=server.url, stall_s=0.4, entries=entries, **more)

    yield server, fetch, facts, tmp_path
    server.http.shutdown()
    server.http.server_close()


def test_download_from_nothing_to_green(served, capsys):
    server, _, facts, tmp_path = served
    assert published.verify(None, tmp_path / "out", published=facts, base_url=server.url) == 0
    assert "fetching 7 files" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.part"))
    asked = len(server.asked)
    assert published.verify(None, tmp_path / "out", published=facts, base_url=server.url) == 0
    assert len(server.asked) == asked == 7  # offline after that


@pytest.mark.parametrize("fault", ["cut", "cut unsaid"])
def test_download_goes_on_after_a_cut(served, fault):
    server, fetch, _, tmp_path = served
    server.fault["c.json"] = fault
    with pytest.raises(UserError, match=r"c.json: cut after 100 of \d+ bytes; run again to resume"):
        fetch()
    assert {p.name for p in (tmp_path / "cache").rglob("*.*")} == {"a.json", "b.json"}
    server.fault.clear()
    fetch()
    assert server.asked.count("c.json") == 2 and server.asked.count("a.json") == 1  # what was whole is not fetched again


def test_download_without_end_is_not_read_to_its_end(served):
    server, fetch, _, _ = served
    server.fault["c.json"] = "endless"
    with pytest.raises(UserError, match=r"c.json: not the pinned file: \d+ bytes, not \d+ .truncated or altered.; refused"):
        fetch()
    assert server.sent < 2**24


def test_download_through_a_proxy_that_is_none(served, monkeypatch):
    _, fetch, _, _ = served
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", "ftp://user:canary@127.0.0.1:9")
    with pytest.raises(UserError, match=r"\$HTTP_PROXY: a proxy of the scheme 'ftp'; allowed are http") as e:
        fetch()
    assert "\n" not in str(e.value) and "canary" not in str(e.value)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot fetch .*refused; run again to resume; without a network give a copy"):
        fetch()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetch()


@pytest.mark.parametrize("fault, message", [
    ("404", r"c.json: HTTP 404"), ("wrong", r"c.json: not the pinned file: sha256 .* refused"),
    ("stall", r"c.json: no data for 0.4 s \(stalled\); run again to resume")])
def test_download_faults_are_one_clear_line(served, fault, message):
    server, fetch, _, tmp_path = served
    server.fault["c.json"] = fault
    with pytest.raises(UserError, match=message) as e:
        fetch()
    assert "\n" not in str(e.value) and not list((tmp_path / "cache").rglob("c.json"))
    server.fault.clear()
    fetch()


def test_an_altered_cache_is_fetched_again(served):
    server, fetch, _, _ = served
    root = fetch()
    flip(root, "c.json")
    fetch()
    assert server.asked.count("c.json") == 2


def test_nobody_there(served):
    _, _, facts, _ = served
    with pytest.raises(UserError, match="cannot fetch http://127.0.0.1:1/"):
        archive.archive_root(None, base_url="http://127.0.0.1:1", entries=archive.load_manifest(facts / "manifest.json"))


# ---- a run against the paper

def record(**more) -> dict:
    keys = (*published.RECORD_FIELDS, "principle")
    return dict.fromkeys(keys) | {"metric": "win_rate", "subset": "tldr", "iteration": 1, "model": "mixtral-8x7b",
                                  "writer": "claude-opus", "baseline": "mixtral-8x7b", "judge": "gpt-4-0613",
                                  "ties": "loss", "length": "raw", "seed": 0, "value": 50.0, "n": 250} | more


def run_of(tmp_path, *rows) -> Path:
    records.write_json(tmp_path / "metrics.json", list(rows))
    return tmp_path


def test_run_pass_and_differs(tmp_path, capsys):
    # Table 6, mixtral-8x7b, iteration 1 is 50.80: 50 is near, 70 is not (half-width of the difference about 8.4)
    assert published.verify_run(run_of(tmp_path, record())) == 0
    out = capsys.readouterr().out
    assert "difference -0.80 [-9.5" in out and "1 PASS" in out and "27 NOT RUN" in out
    assert published.verify_run(run_of(tmp_path, record()), strict=True) == 1
    assert published.verify_run(run_of(tmp_path, record(value=70.0))) == 1
    assert "1 DIFFERS" in capsys.readouterr().out


def test_run_at_the_end_of_the_scale_is_not_certain(tmp_path, capsys):
    """3 wins of 3 do not contradict 50.8 %, though p (1 - p) is 0 there; 60 of 60 do."""
    assert published.verify_run(run_of(tmp_path, record(value=100.0, n=3))) == 0
    assert "difference +49.20 [-" in capsys.readouterr().out
    assert published.verify_run(run_of(tmp_path, record(value=100.0, n=60))) == 1


@pytest.mark.parametrize("off", [{"model": "smollm2-135m"}, {"judge": "rules"}, {"ties": "half"}, {"length": "stratified"}])
def test_run_not_comparable_is_said(tmp_path, capsys, off):
    assert published.verify_run(run_of(tmp_path, record(**off))) == 0
    out = capsys.readouterr().out
    (key, value), = off.items()
    assert f"{key} {value} (paper: " in out and "NOT COMPARABLE" in out and "nothing was compared" in out
    assert "PASS" not in out
    assert published.verify_run(run_of(tmp_path, record(**off)), strict=True) == 1


def test_run_of_another_kind_is_not_green(tmp_path, capsys):
    assert published.verify_run(run_of(tmp_path)) == 0
    assert "nothing was compared" in capsys.readouterr().out
    assert published.verify_run(run_of(tmp_path), strict=True) == 1
    assert published.verify_run(run_of(tmp_path, record(principle="concise"))) == 0
    assert "nothing was compared" in capsys.readouterr().out


def test_run_bad_input(tmp_path):
    with pytest.raises(UserError, match="cannot read .*metrics.json"):
        published.verify_run(tmp_path)
    for bad, message in ((record(value=123), "record 0: field value"), (record(n=0), "record 0: field n"),
                         ({"metric": "win_rate"}, "field subset: missing"), (3, "field metric: missing")):
        with pytest.raises(UserError, match=message):
            published.verify_run(run_of(tmp_path, bad))
    records.write_json(tmp_path / "metrics.json", {})
    with pytest.raises(UserError, match="expected a list"):
        published.verify_run(tmp_path)


# ---- the facts and the real record

def test_facts_are_complete():
    cells, entries = archive.load_cells(), archive.load_manifest()
    assert len(cells) == 54 and [sum(c["table"] == t for c in cells) for t in range(2, 10)] == [6, 8, 6, 8, 6, 8, 6, 6]
    here = archive.Archive(Path("."), entries)
    assert len({archive.feed(c, here)["path"] for c in cells}) == 54
    assert all(e["repo"] in ("janphilippfranken/sami", "janphilippfranken/typo") for e in entries)
    assert {len(e["commit"]) for e in entries} == {40} and {len(e["sha256"]) for e in entries} == {64}


def test_no_torch_and_no_machine_paths():
    code = ("import sys, repro.paper.cells, repro.paper.figures\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_real
def test_the_real_record(tmp_path):
    assert published.verify(None, tmp_path) == 0
    result = records.read_json(tmp_path / "verify.json")
    by_status = {}
    for c in result["cells"]:
        by_status.setdefault((c["estimator"], c["status"]), []).append(c)
    assert {k: len(v) for k, v in by_status.items()} == {
        ("raw", "PASS"): 38, ("raw", "ERRATUM"): 2, ("logistic", "PASS"): 13, ("logistic", "NOT REPRODUCED"): 1}
    assert [(c["table"], c["model"], c["subset"], c["iteration"]) for c in by_status["raw", "ERRATUM"]] == [
        (5, "mixtral-8x7b", "tldr", 0), (9, "llama3-70b", "learned", 1)]
    assert {c["status"] for c in result["claims"]} == {"PASS"}
    assert sum(r["status"] == "DIFFERS" for r in result["arithmetic"]) == 6
    committed = places.ROOT / "results" / "verify" / "README.md"
    assert (tmp_path / "README.md").read_text() == committed.read_text(), "run `repro verify` and commit its page"


@needs_real
@pytest.mark.parametrize("table, changed", [(2, 8), (4, 1), (9, 1)])
def test_a_planted_verdict_in_the_real_record(tmp_path, table, changed):
    """One verdict is enough in Tables 4-9; in Tables 2-3 it moves a cell by less than the stated tolerance."""
    facts, copy = tmp_path / "published", tmp_path / "archive"
    shutil.copytree(archive.PUBLISHED, facts)
    shutil.copytree(REAL, copy, ignore=shutil.ignore_patterns("responses", "*queries.jsonl"))
    cell = next(c for c in archive.load_cells() if c["table"] == table)
    entry = archive.feed(cell, archive.Archive(copy, archive.load_manifest()))
    path = copy / entry["repo"] / entry["path"]

    def change(v):
        for row in [r for r in v if r[0] == 0][:changed]:
            row[0] = 1
    made.edit(path, change)
    with pytest.raises(UserError, match="altered"):
        published.verify(copy, tmp_path / "out", published=facts)
    made.edit(facts / "manifest.json", lambda m: next(e for e in m["files"] if e["path"] == entry["path"]).update(
        bytes=path.stat().st_size, sha256=records.file_sha256(path)))
    assert published.verify(copy, tmp_path / "out", published=facts) == 1


@needs_real
def test_download_of_the_real_record(tmp_path, monkeypatch):
    server = Server(REAL)
    monkeypatch.setattr("repro.paper.archive.LOCAL", tmp_path / "absent")
    monkeypatch.setenv("SAMI_CACHE", str(tmp_path / "cache"))
    try:
        assert published.verify(None, tmp_path / "out", base_url=server.url) == 0
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert len(server.asked) == 107


# ---- the authors' ablation of the loss

def ablated(archive, facts):
    """Three more files: of 250 items `both` wins 200, `col` 205 (the same and 5 more), `row` 150; lengths as in the others."""
    entries = []
    for loss, wins in (("both", 200), ("col", 205), ("row", 150)):
        (archive / made.REPO / f"{loss}.json").write_text(json.dumps(made.scores(wins, 0)))
        entries.append({"repo": made.REPO, "commit": made.COMMIT, "path": f"{loss}.json", "kind": "verdicts", "experiment": "exp1",
                        "subset": "helpful", "model": "mistral-7b", "writer": "claude-opus", "iteration": 2,
                        "baseline": "mistral-7b", "loss": loss, "bytes": 0, "sha256": ""})
    made.edit(facts / "manifest.json", lambda m: m["files"].extend(entries))
    made.rehash(archive, facts)


def test_the_ablation_stands_apart_from_the_cells(small):
    archive, facts, run, out = small
    run()
    before = cells(out), records.read_json(out / "verify.json")["record"]["ablation"]
    assert before[1] == {"rows": [], "differences": []} and "no file of the authors' ablation" in (out / "README.md").read_text()
    ablated(archive, facts)
    assert run() == 0 and cells(out) == before[0]
    found = records.read_json(out / "verify.json")["record"]["ablation"]
    assert [(r["loss"], r["raw"]["value"], r["n"]) for r in found["rows"]] == [("both", 80.0, 250), ("col", 82.0, 250), ("row", 60.0, 250)]
    differences = {(d["first"], d["second"]): d for d in found["differences"]}
    assert differences["both", "row"]["raw"]["value"] == pytest.approx(20) and differences["both", "col"]["raw"]["value"] == pytest.approx(-2)
    low, high = differences["both", "col"]["raw"]["ci95"]
    assert low < -2 < high <= 0  # paired: 5 items differ; two samples of 250 would give about 7 points either way
    assert abs(differences["col", "row"]["stratified"]["value"] - 22) < 0.1
    page = (out / "README.md").read_text()
    assert "| helpful | row: over responses | 60.0" in page and "| helpful | both - row | +20.0" in page
    flip(archive, "row.json")
    with pytest.raises(UserError, match="row.json.*altered"):
        run()


@needs_real
def test_the_real_ablation(tmp_path):
    """Against numbers taken from the files in another way: counts of wins, half ties, and the two strata by hand."""
    published.verify(None, tmp_path)
    found = {(r["subset"], r["loss"]): r for r in records.read_json(tmp_path / "verify.json")["record"]["ablation"]["rows"]}
    assert {k: (round(r["stratified"]["value"], 1), round(r["raw"]["value"], 1)) for k, r in found.items()} == {
        ("helpful", "both"): (78.9, 91.6), ("harmless", "both"): (81.1, 90.8), ("helpful", "row"): (73.8, 85.8),
        ("harmless", "row"): (66.2, 80.2), ("helpful", "col"): (83.6, 94.4), ("harmless", "col"): (81.1, 93.2)}
    for entry in archive.load_manifest():
        if "loss" in entry:
            rows = json.loads((REAL / entry["repo"] / entry["path"]).read_text())
            longer, rest = [[r[0] for r in rows if (r[2] > r[1]) == side] for side in (True, False)]
            by_hand = 50 * (sum(longer) / len(longer) + sum(rest) / len(rest))
            assert found[entry["subset"], entry["loss"]]["stratified"]["value"] == pytest.approx(by_hand)


# ---- what the record says beyond the paper

def test_position_bias_is_found_and_is_of_the_right_sign(small):
    archive, facts, run, out = small
    first = np.random.RandomState(1).randint(2, size=250) == 1  # the tuned model's response came first

    def prefer_first(v):
        for row, tuned_first in zip(v, first):
            row[0] = int(tuned_first)
    made.edit(archive / made.REPO / "e.json", prefer_first)
    made.rehash(archive, facts)
    run()
    position = records.read_json(out / "verify.json")["record"]["position"]
    assert position["inferred"] is True and position["exp1"]["gap_first_minus_second"] == 100
    assert abs(position["exp2"]["gap_first_minus_second"]) < 15 and position["exp1"]["sd_of_gap_under_200_other_orders"] < 10


def test_ties_that_are_identical_texts(small):
    archive, facts, run, out = small
    # a.json, the first cell: rows 0-61 wins, row 62 the tie; the texts agree (white space aside) in rows 61 and 62
    own = {"response": {str(i): f"text {i}" for i in range(250)}}
    base = {"response": {str(i): f"text {i} \n" if i in (61, 62) else "other" for i in range(250)}}
    for name, text, model in (("own.json", own, "mistral-7b"), ("base.json", base, "mistral-7b-instruct")):
        (archive / made.REPO / name).write_text(json.dumps(text))
        made.edit(facts / "manifest.json", lambda m: m["files"].append(
            {"repo": made.REPO, "commit": made.COMMIT, "path": name, "kind": "responses", "subset": "tldr",  # noqa: B023
             "model": model, "writer": "mistral-7b-instruct", "iteration": 0}))  # noqa: B023
    made.rehash(archive, facts)
    assert run() == 0
    first = records.read_json(out / "verify.json")["record"]["ties"][0]
    assert (first["ties"], first["identical"], first["both"]) == (1, 2, 1)
    own["response"].pop("7")
    (archive / made.REPO / "own.json").write_text(json.dumps(own))
    made.rehash(archive, facts)
    with pytest.raises(UserError, match="own.json: field response: expected 250 texts"):
        run()


def test_common_rule_by_hand(small):
    _, _, run, out = small
    run()
    e = records.read_json(out / "verify.json")["common_rule"][4]  # 150 wins, 35 ties, 65 losses
    assert (e["wins"], e["ties_count"], e["losses"], e["longer"], e["smaller_stratum"]) == (150, 35, 65, 125, 125)
    assert e["raw_half"]["value"] == 67.0 and e["raw_loss"]["value"] == 60.0
    assert e["stratified_half"]["value"] == pytest.approx(67.0) and e["logistic_half"]["value"] == pytest.approx(67.0, abs=0.01)
    low, high = e["raw_half"]["bootstrap_ci95"]
    assert 60 < low < 64 and 70 < high < 74

"""What the paper prints and the authors' raw record, as sources for `published`, `beyond` and `figures`.

The record has one layout, `<repo>/<path>`, in a local folder or downloaded once. The manifest in
`results/published/` pins every file by commit, size and sha256; no file that differs is read, and none is in
the repository.
`tables.json` beside it holds the printed cells; the manifest says which file feeds which.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import quote

import numpy as np
from annotated_types import Ge, Le, Len
from tqdm import tqdm

from repro.base import metrics, records
from repro.base.checks import fits
from repro.base.metrics import Estimate
from repro.base.places import ARCHIVE as LOCAL
from repro.base.places import PUBLISHED, cache_folder
from repro.base.records import UserError, first_line
from repro.servers.client import http_client
from repro.servers.endpoint import check_proxies

ORIGIN = "https://raw.githubusercontent.com"
KINDS = ("verdicts", "mutual_information", "responses", "constitution")
ITEMS = 250
OFFLINE = ("; without a network give a copy with --archive FOLDER (`repro verify` on a machine with one leaves it in "
           "~/.cache/sami-repro/archive)")
KEYS = ("experiment", "subset", "model", "writer", "cot", "iteration", "baseline")


@dataclass(frozen=True)
class Entry:
    """A pinned file. Which cell or figure it feeds stands in more fields (`Archive.find`)."""

    repo: str
    commit: str
    path: str
    sha256: str
    bytes: int
    kind: Literal[KINDS]


@dataclass(frozen=True)
class Manifest:
    files: list[Entry]


def load_manifest(path: Path = PUBLISHED / "manifest.json") -> list[dict]:
    """The manifest's entries, checked: fields present, of their type, no path twice, none that escapes."""
    manifest, seen = records.read_json(path), {}
    fits(Manifest, manifest, path)
    for i, e in enumerate(manifest["files"]):
        where = f"{path}: files[{i}]"
        name = PurePosixPath(e["repo"], e["path"])
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{where}: field path: {e['path']!r} leaves the archive's folder")
        if str(name) in seen:
            raise UserError(f"{where}: field path: {name} is already files[{seen[str(name)]}]")
        seen[str(name)] = i
    return manifest["files"]


def _data(path: Path, entry: dict) -> bytes:
    """The file's bytes if they are the pinned ones; else one line that says what is wrong."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}; the archive is incomplete") from None
    return _pinned(data, entry, path)


def _pinned(data: bytes, entry: dict, where) -> bytes:
    if len(data) != entry["bytes"]:
        raise UserError(f"{where}: {len(data)} bytes, not {entry['bytes']} (truncated or altered); refused")
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise UserError(f"{where}: sha256 {found[:12]}..., not {entry['sha256'][:12]}... (altered); refused")
    return data


def archive_root(archive: Path | None, *, kinds=KINDS[:2], base_url: str | None = None, stall_s: float = 30,
                 entries: list[dict] | None = None) -> Path:
    """The folder that holds the record: `archive` if given, else the local copy, else the cache, downloaded.

    The cache is `$SAMI_CACHE/archive` or `~/.cache/sami-repro/archive`. A file that is whole is never fetched
    twice. `stall_s`: seconds without a byte after which the download stops.
    """
    if archive is not None:
        if not Path(archive).is_dir():
            raise UserError(f"--archive {archive}: no such folder")
        return Path(archive)
    if LOCAL.is_dir():
        return LOCAL
    root = cache_folder() / "archive"
    wanted = [e for e in entries or load_manifest() if e["kind"] in kinds]
    missing = [e for e in wanted if not _is_complete(root / e["repo"] / e["path"], e)]
    if missing:
        origin = (base_url or ORIGIN).rstrip("/")
        size = sum(e["bytes"] for e in missing)
        print(f"fetching {len(missing)} files ({size / 1e6:.1f} MB) from {origin} into {root}")
        with records.locked(root), _http(stall_s) as http, \
                tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
            for e in missing:
                url = f"{origin}/{e['repo']}/{e['commit']}/{quote(e['path'])}"
                records.write_bytes(root / e["repo"] / e["path"], _fetch(http, url, e, bar))
    return root


def _is_complete(path: Path, entry: dict) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and \
        records.file_sha256(path) == entry["sha256"]


# No pooch (1.9): it brings a second HTTP client, writes all that comes before it looks at it, counts the progress of each
# file alone, and leaves stalls, cuts and wrong bytes to be told apart here.

def _http(stall_s: float):
    import httpx2

    check_proxies()
    return http_client(httpx2.Client, timeout=stall_s, follow_redirects=True, headers={"Accept-Encoding": "identity"})


def _fetch(http, url: str, entry: dict, bar: tqdm) -> bytes:
    """The pinned bytes, held in memory until they are known to be these: the files are small."""
    import httpx2

    data = bytearray()
    try:
        with http.stream("GET", url) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                data += chunk
                bar.update(len(chunk))
                if len(data) > entry["bytes"]:  # not the pinned file
                    break
    except httpx2.HTTPStatusError as e:
        raise UserError(f"cannot fetch {url}: HTTP {e.response.status_code} {e.response.reason_phrase}{OFFLINE}") from None
    except httpx2.TimeoutException:
        raise UserError(f"cannot fetch {url}: no data for {http.timeout.read:g} s (stalled); run again to resume"
                        f"{OFFLINE}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as e:
        if not data:
            raise UserError(f"cannot fetch {url}: {first_line(e)}; run again to resume{OFFLINE}") from None
    if len(data) < entry["bytes"]:
        raise UserError(f"cannot fetch {url}: cut after {len(data)} of {entry['bytes']} bytes; run again to resume")
    return _pinned(bytes(data), entry, f"{url}: not the pinned file")


@dataclass(frozen=True)
class Archive:
    """The record of one folder: `find` by keys, read checked."""

    root: Path
    entries: list[dict]

    def find(self, kind: str, **keys) -> list[dict]:
        """Entries of this kind whose fields have these values; an absent field counts as None."""
        return [e for e in self.entries if e["kind"] == kind and all(e.get(k) == v for k, v in keys.items())]

    def path(self, entry: dict) -> Path:
        return self.root / entry["repo"] / entry["path"]

    def _json(self, entry: dict):
        path = self.path(entry)
        try:
            return records.loads(_data(path, entry).decode())
        except ValueError as e:
            raise UserError(f"{path}: not valid JSON: {e}") from None

    def _rows(self, entry: dict) -> list:
        rows = self._json(entry)
        if not isinstance(rows, list) or len(rows) != ITEMS:
            found = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
            raise UserError(f"{self.path(entry)}: expected {ITEMS} rows, found {found}")
        return rows

    def verdicts(self, entry: dict) -> np.ndarray:
        """`[250, 3]`: score of the tuned model (1, 0.5, 0), tokens of the baseline's and of its response."""
        path = self.path(entry)
        for i, row in enumerate(rows := self._rows(entry)):
            if not isinstance(row, list) or len(row) != 3 or not all(type(v) in (int, float) for v in row):
                raise UserError(f"{path}: row {i}: expected [score, tokens, tokens], found {str(row)[:60]}")
            if row[0] not in (0, 0.5, 1):
                raise UserError(f"{path}: row {i}: field score: allowed: 0, 0.5 and 1; found {row[0]}")
            if min(row[1:]) < 0:
                raise UserError(f"{path}: row {i}: field tokens: must not be negative, found {min(row[1:])}")
        return np.array(rows, dtype=np.float64)

    def mutual_information(self, entry: dict) -> np.ndarray:
        """`[250]` nats, one per item, as the authors' code computed them (`metrics.mean_of_logs`)."""
        for i, v in enumerate(rows := self._rows(entry)):
            if type(v) not in (int, float) or not np.isfinite(v):
                raise UserError(f"{self.path(entry)}: row {i}: expected a number, found {str(v)[:60]}")
        return np.array(rows, dtype=np.float64)

    def responses(self, entry: dict) -> list[str]:
        """250 texts, without the white space around them."""
        texts = self._json(entry)
        texts = texts.get("response") if isinstance(texts, dict) else None
        if not isinstance(texts, dict) or not all(isinstance(texts.get(str(i)), str) for i in range(ITEMS)):
            raise UserError(f"{self.path(entry)}: field response: expected {ITEMS} texts, keys 0, 1, ...")
        return [texts[str(i)].strip() for i in range(ITEMS)]

    def prompts(self, entry: dict) -> list[tuple[str, tuple[str, ...]]]:
        """Of a file of responses: the 250 posts, each with the principles that its response was written under."""
        data, out = self._json(entry), []
        for i in range(ITEMS):
            post, text = (data.get(field, {}).get(str(i)) for field in ("question", "constitution"))
            principles = re.findall(r"^\d+\. (.+)$", text, flags=re.M) if isinstance(text, str) else []
            if not isinstance(post, str) or not principles:
                raise UserError(f"{self.path(entry)}: row {i}: expected a question, and a constitution as a numbered list")
            out.append((post, tuple(p.strip() for p in principles)))
        return out


# ---- the printed cells and what feeds them

Percent = Annotated[float, Ge(0), Le(100)]


@dataclass(frozen=True)
class Cell:
    """A printed cell: `published` and `ci95` in percent, `t`, `p` and `n` as printed beside them."""

    experiment: str
    subset: str
    model: str
    writer: str
    cot: bool | None
    iteration: Annotated[int, Ge(0), Le(3)]
    baseline: str
    judge: str
    table: Annotated[int, Ge(2), Le(9)]
    estimator: Literal["raw", "stratified", "logistic"]
    ties: Literal["half", "loss"]
    decimals: Literal[1, 2]
    published: Percent
    ci95: Annotated[list[Percent], Len(2, 2)]
    t: Annotated[float, Ge(-100), Le(100)]
    p: Literal[">.05", "<.05", "<.01", "<.001"]
    n: Annotated[int, Ge(2)]


@dataclass(frozen=True)
class Tables:
    cells: Annotated[list[Cell], Len(1)]


def load_cells(path: Path = PUBLISHED / "tables.json") -> list[dict]:
    """The printed cells of Tables 2-9, checked: every field in range, no cell twice."""
    tables, seen = records.read_json(path), set()
    fits(Tables, tables, path)
    for i, c in enumerate(tables["cells"]):
        key = (c["table"], *(c[k] for k in KEYS))
        if key in seen:
            raise UserError(f"{path}: cells[{i}]: Table {c['table']} has this cell twice")
        seen.add(key)
    return tables["cells"]


def name(c: dict) -> str:
    cot = {True: ", CoT", False: ", no CoT"}.get(c.get("cot"), "")
    return f"{c['model']} ({c['writer']}{cot}), {c['subset']}, iteration {c['iteration']}, vs {c['baseline']}"


def feed(cell: dict, archive: Archive) -> dict | None:
    """The one file that feeds a cell; None where there is none (NOT RUN), refused where there are two."""
    found = [e for e in archive.find("verdicts", **{k: cell[k] for k in KEYS})
             if f"table{cell['table']}" in e.get("tables", [])]
    if len(found) > 1:
        raise UserError(f"manifest.json: field tables: Table {cell['table']}, {name(cell)} is fed by two "
                        f"files, {found[0]['path']} and {found[1]['path']}; refused")
    return found[0] if found else None


def estimate(verdicts: np.ndarray, length: str, ties: str) -> Estimate:
    """Win rate in percent of `[N, 3]` verdicts under one of the three length controls, with the paper's interval."""
    scores, base, own = verdicts.T
    if length == "logistic":
        return metrics.as_published(metrics.win_rate_logistic(scores, own - base, ties), logit=bool(np.ptp(own - base)))
    return metrics.as_published(metrics.win_rate_stratified(scores, own > base, ties) if length == "stratified" else
                                metrics.win_rate(scores, ties))


def series(archive: Archive, metric: str, **keys) -> dict[int, Estimate]:
    """iteration -> estimate of one plotted series: `mutual_information` in nats or `length_tokens` in tokens.

    Lengths lie in the verdict files: the base model's beside iteration 1, where both were judged.
    """
    if metric == "mutual_information":
        if keys["subset"] != "tldr":
            keys = {k: v for k, v in keys.items() if k != "writer"}  # one writer there; the files name none
        found = [e for e in archive.find("mutual_information", **keys) if e.get("figures")]
        return {e["iteration"]: metrics.mean(archive.mutual_information(e)) for e in found}
    found = [e for e in archive.find("verdicts", baseline=keys["model"], **keys) if e.get("tables")]
    out = {e["iteration"]: metrics.mean(archive.verdicts(e)[:, 2]) for e in found}
    if found:
        out[0] = metrics.mean(archive.verdicts(found[0])[:, 1])
    return dict(sorted(out.items()))

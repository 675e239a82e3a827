"""Data sets -> queries: the embedded samples, HH-RLHF and TL;DR from the hub, or a user's JSONL file.

Whatever is dropped is counted by reason; whatever is wrong with a user's file stops with file and line before any
model is loaded. Training and evaluation are disjoint.
"""

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from repro.base.checks import check_control_tokens, choose
from repro.base.places import DATA
from repro.base.records import UserError, first_line, numbered_jsonl
from repro.base.settings import DataSpec
from repro.models.hub import missing_step


@dataclass(frozen=True, kw_only=True)
class Query:
    """One prompt of the data set. `subset` is e.g. helpful, harmless, tldr; `where` is file and line, for messages."""

    id: str
    subset: str
    split: str
    text: str
    where: str = field(default="", compare=False)


KEYS = ("query", "subset", "split", "id")
ROW = '{"query": "How do I iron a shirt?", "split": "train"}'
HH = "Anthropic/hh-rlhf"
TLDR_REPOSITORY = "openai/summarize_from_feedback"
TLDR = f"hf://datasets/{TLDR_REPOSITORY}@refs/convert/parquet"  # its own loader is a script: no longer run
EMBEDDED = {"embedded": DATA / "queries.jsonl", "embedded-tldr": DATA / "posts.jsonl"}
SOURCES = {"embedded": ("helpful", "harmless"), "embedded-tldr": ("tldr",), "hh-rlhf": ("helpful", "harmless"),
           "tldr": ("tldr",)}  # what has a name, and its subsets
SPLITS = {"train": "train", "development": "development", "dev": "development", "evaluation": "evaluation",
          "eval": "evaluation", "test": "evaluation", "validation": "evaluation"}
SUBSETS = {"helpful-base": "helpful", "harmless-base": "harmless"}  # HH-RLHF's folders, in the paper's words


def query_id(subset: str, text: str) -> str:
    """An id that derives from the content, so that it survives reordering and other files."""
    return f"{subset}-{hashlib.sha256(normalize(text).encode()).hexdigest()[:12]}"


def normalize(text: str) -> str:
    """The form in which two queries count as the same: Unicode-composed, case and white space folded."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def load_queries(source: str = "embedded", *, spec: DataSpec | None = None) -> tuple[list[Query], Counter]:
    """Queries of `source` in the source's order, and what was dropped, by reason.

    `source`: "embedded" (dialogue), "embedded-tldr" (posts), "hh-rlhf", "tldr", a folder with a copy of TL;DR's parquet
    files, or a JSONL file of {"query": ..., "subset"?, "split"?, "id"?} rows; without splits, every fifth row by content
    goes to evaluation. `spec` limits the subsets (none named: all of the source's) and the number of queries.
    """
    spec = spec or DataSpec(source=source, subsets=(), train=10**9, evaluation=10**9)
    if source == "hh-rlhf":
        queries, dropped = _hh_rlhf(spec)
    elif source == "tldr" or Path(source).expanduser().is_dir():
        queries, dropped = _tldr(TLDR if source == "tldr" else str(Path(source).expanduser()), source)
    else:
        path = EMBEDDED.get(source, Path(source).expanduser())
        if not path.is_file():
            raise UserError(f"--queries {source}: no such file; allowed: {', '.join(map(repr, SOURCES))}, a JSONL file, or "
                            "a folder of TL;DR's parquet files")
        queries, dropped = _jsonl(path), Counter()
    present = list(dict.fromkeys(q.subset for q in queries))
    wanted = spec.subsets or present
    for subset in wanted:
        choose(f"--subsets (of {source})", subset, present)
    others = sum(q.subset not in wanted for q in queries)
    if others:
        dropped["subset not asked for"] += others
    queries = [q for q in queries if q.subset in wanted]
    return _limit(disjoint(queries, spec, dropped), spec, dropped), dropped


def _jsonl(path: Path) -> list[Query]:
    queries, lines = [], {}
    try:
        rows = numbered_jsonl(path)
    except UserError as e:
        if "byte order mark" in str(e):
            raise
        raise UserError(f"{e}; a line is one JSON object, such as {ROW}") from None
    for number, row in rows:
        where = f"{path}:{number}"
        for key in row:
            try:
                choose(f"{where}: key", key, KEYS)
            except UserError as e:
                raise UserError(f"{e}; a row: {ROW}") from None
        text = row.get("query")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: query: missing or empty; every line needs a non-empty text")
        if "\0" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise UserError(f"{where}: query: holds a NUL or half a surrogate pair")
        for key in ("subset", "split", "id"):
            if key in row and (not isinstance(row[key], str) or not row[key].strip()):
                raise UserError(f"{where}: {key}: must be a non-empty text")
        subset = SUBSETS.get(row.get("subset"), row.get("subset", "own"))
        split = row.get("split")
        if split is None:
            split = "evaluation" if int(hashlib.sha256(normalize(text).encode()).hexdigest(), 16) % 5 == 0 else "train"
        id = row.get("id") or query_id(subset, text)
        if id in lines and ("id" in row or lines[id][1] != normalize(text)):
            raise UserError(f"{where}: id: {id!r} occurs in line {lines[id][0]} too")
        lines.setdefault(id, (number, normalize(text)))
        queries.append(Query(id=id, subset=subset, split=SPLITS[choose(f"{where}: split", split, tuple(SPLITS))],
                             text=text.strip(), where=where))
    if not queries:
        raise UserError(f"{path}: no query in it")
    return queries


def first_human_turn(transcript: str) -> str:
    """The first human turn of an HH-RLHF transcript: all its lines, up to the next turn or the end."""
    _, found, rest = ("\n\n" + transcript.lstrip()).partition("\n\nHuman:")
    if not found:
        return ""
    for turn in ("\n\nAssistant:", "\n\nHuman:"):
        rest = rest.partition(turn)[0]
    return rest.strip()


def _hh_rlhf(spec: DataSpec) -> tuple[list[Query], Counter]:
    import datasets

    folders = {v: k for k, v in SUBSETS.items()}
    queries, dropped = [], Counter()
    for subset in spec.subsets or SUBSETS.values():
        folder = folders[choose("subset (of hh-rlhf)", subset, tuple(folders))]
        for split, ours in (("train", "train"), ("test", "evaluation")):
            try:
                rows = datasets.load_dataset(HH, data_dir=folder, split=split)
            except Exception as e:  # the hub client raises many kinds; a user needs the step, not the kind
                raise UserError(f"--queries hh-rlhf: cannot load {HH} ({folder}, {split}): "
                                f"{missing_step(HH, 'dataset') or first_line(e)}; give a JSONL file, or 'embedded'") from e
            for number, row in enumerate(rows):
                text = first_human_turn(row["chosen"])
                if text:
                    queries.append(Query(id=f"{folder}/{split}/{number}", subset=subset, split=ours, text=text,
                                         where=f"{HH} {folder} {split} row {number}"))
                else:
                    dropped["empty first human turn"] += 1
    return queries, dropped


def _tldr(place: str, source: str) -> tuple[list[Query], Counter]:
    """The posts of the TL;DR comparisons, each once by its id (arXiv 2404.14313, section 4.2): "train" trains,
    "validation" is held out. `place` holds comparisons/<split>/0000.parquet. Rows of news articles have no post."""
    import datasets

    queries, dropped = [], Counter()
    for split, ours in (("train", "train"), ("validation", "evaluation")):
        file = f"{place}/comparisons/{split}/0000.parquet"
        try:
            rows = datasets.load_dataset("parquet", data_files=file, split="train", columns=["info"])
        except Exception as e:  # of many kinds, as above
            why = (missing_step(TLDR_REPOSITORY, "dataset") if place == TLDR else None) or first_line(e)
            raise UserError(f"--queries {source}: cannot load {file}: {why}; give a folder that holds a copy of "
                            "comparisons/train and comparisons/validation, a JSONL file, or 'embedded-tldr'") from e
        fields = rows.features["info"]
        if not isinstance(fields, dict) or not {"id", "post"} <= fields.keys():
            raise UserError(f"--queries {source}: {file}: the column info has no fields id and post")
        seen = set()
        for number, info in enumerate(rows["info"]):
            text = (info["post"] or "").strip()
            id = info["id"] or query_id("tldr", text)
            if not text:
                dropped["no post"] += 1
            elif id in seen:
                dropped["another comparison of the same post"] += 1
            else:
                seen.add(id)
                queries.append(Query(id=f"tldr/{split}/{id}", subset="tldr", split=ours, text=text,
                                     where=f"{file} row {number}"))
    return queries, dropped


def disjoint(queries: list[Query], spec: DataSpec, dropped: Counter) -> list[Query]:
    """Each text once per split, no development text in evaluation, and no training text among the held-out ones (unless
    `leakage` is "keep")."""
    held_out = {normalize(q.text) for q in queries if q.split != "train"}
    evaluation = {normalize(q.text) for q in queries if q.split == "evaluation"}
    seen, kept = set(), []
    for query in queries:
        text = normalize(query.text)
        if (query.split, text) in seen:
            dropped["duplicate text"] += 1
        elif query.split == "train" and text in held_out and spec.leakage == "remove":
            dropped["training query that is also held out"] += 1
        elif query.split == "development" and text in evaluation:
            dropped["development query that is also in evaluation"] += 1
        else:
            seen.add((query.split, text))
            kept.append(query)
    return kept


def _limit(queries: list[Query], spec: DataSpec, dropped: Counter) -> list[Query]:
    limit = {"train": spec.train, "evaluation": spec.evaluation, "development": spec.evaluation}
    counts, kept = Counter(), []
    for query in queries:
        counts[query.subset, query.split] += 1
        if counts[query.subset, query.split] <= limit[query.split]:
            kept.append(query)
        else:
            dropped["beyond the number asked for"] += 1
    return kept


def check_queries(queries: list[Query], tokenizer, controls: list[str], *, room: int, truncate: bool,
                  say=print) -> list[Query]:
    """The queries, ready for the model: no control tokens, none longer than `room` tokens.

    A longer one is refused, or with `truncate` cut to `room` tokens and named through `say`.
    """
    check_control_tokens(((q.where or q.id, q.text) for q in queries), controls)
    kept = []
    for query in queries:
        ids = tokenizer(query.text, add_special_tokens=False).input_ids
        if len(ids) > room:
            if not truncate:
                raise UserError(f"{query.where or query.id}: the query has {len(ids)} tokens and the model's context "
                                f"leaves room for {room}; shorten it, or pass --truncate")
            say(f"{query.where or query.id}: truncated from {len(ids)} to {room} tokens")
            query = replace(query, text=tokenizer.decode(ids[:room]).strip())
        kept.append(query)
    return kept

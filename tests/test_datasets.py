"""Queries: the embedded sample, HH-RLHF's turns, and a user's file with every mistake we could think of."""

import dataclasses
import json
import re
from collections import Counter

import pytest

from repro.base.records import UserError
from repro.base.settings import DataSpec
from repro.text.queries import Query, check_queries, first_human_turn, load_queries, normalize, query_id
from repro.text.rules import words


def everything(source="embedded", **changes):
    return load_queries(str(source), spec=DataSpec(**({"source": str(source), "train": 10**6, "evaluation": 10**6} | changes)))


def test_the_embedded_sample():
    queries, dropped = everything()
    counts = Counter((q.subset, q.split) for q in queries)
    for subset in ("helpful", "harmless"):
        assert counts[subset, "train"] == 112 and counts[subset, "evaluation"] == 128 and counts[subset, "development"] == 64
    assert not dropped
    assert len({q.id for q in queries}) == len({normalize(q.text) for q in queries}) == len(queries)
    assert all(q.text.isascii() and 4 <= len(q.text.split()) <= 25 for q in queries)


def test_the_embedded_posts():
    """First-person posts with something to summarise, disjoint from one another and from the dialogue queries."""
    posts, dropped = everything("embedded-tldr", subsets=("tldr",))
    assert Counter(q.split for q in posts) == {"train": 112, "evaluation": 128, "development": 64} and not dropped
    dialogue, _ = everything()
    assert len({normalize(q.text) for q in (*posts, *dialogue)}) == len({q.id for q in (*posts, *dialogue)}) == 912
    for q in posts:
        assert q.text.isascii() and 50 <= len(q.text.split()) <= 110, q.text
        assert re.search(r"\b(?:I|we|my|our)\b", q.text, flags=re.I), q.text


def shared_runs(queries) -> set[tuple]:
    """Five words in a row that queries of different splits have in common."""
    splits = {}
    for q in queries:
        found = words(q.text)
        for k in range(len(found) - 4):
            splits.setdefault(tuple(found[k: k + 5]), set()).add(q.split)
    return {run for run, of in splits.items() if len(of) > 1}


@pytest.mark.parametrize("source", ["embedded", "embedded-tldr"])
def test_no_two_splits_share_a_frame(source):
    """What is held out was written singly: no template that training has shown comes back in it."""
    queries, _ = everything(source)
    assert shared_runs(queries) == set()
    copied = next(q for q in queries if q.split == "train")
    assert shared_runs([*queries, dataclasses.replace(copied, split="evaluation")])  # the test sees one


def tldr_parquet(folder, **splits):
    """A stand-in for the hub's parquet branch: the columns of the real one that matter, and one that does not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, rows in splits.items():
        file = folder / "comparisons" / split / "0000.parquet"
        file.parent.mkdir(parents=True)
        info = pa.array([{"id": id, "post": post, "title": "t", "subreddit": "r", "site": None, "article": None if post else "news"}
                         for id, post in rows],
                        type=pa.struct([(k, pa.string()) for k in ("id", "post", "title", "subreddit", "site", "article")]))
        pq.write_table(pa.table({"info": info, "choice": pa.array([0] * len(rows), pa.int32())}), file)
    return folder


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tldr_is_read_from_its_parquet_files(tmp_path, monkeypatch, no_cache):
    """By name, each post once, news articles left out; the hub's branch and a local copy through the same function."""
    from repro.text import queries as ours

    place = tldr_parquet(tmp_path / "copy", train=[("t3_a", "My first post."), ("t3_a", "My first post."), ("t3_b", " Also held out. \n"), ("t3_c", None)],
                         validation=[("t3_d", "also held OUT."), ("t3_a", "In both by id alone.")])
    queries, dropped = everything(place, subsets=("tldr",))
    assert [(q.id, q.split, q.text) for q in queries] == [
        ("tldr/train/t3_a", "train", "My first post."), ("tldr/validation/t3_d", "evaluation", "also held OUT."),
        ("tldr/validation/t3_a", "evaluation", "In both by id alone.")]
    assert dropped == {"another comparison of the same post": 1, "no post": 1, "training query that is also held out": 1}
    assert queries[1].where.endswith("comparisons/validation/0000.parquet row 0")
    monkeypatch.setattr(ours, "TLDR", str(place))
    assert everything("tldr", subsets=("tldr",)) == (queries, dropped)


def test_tldr_files_that_are_not_there_or_not_as_expected(tmp_path, monkeypatch, no_cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match=r"cannot load .*comparisons/train/0000\.parquet: .*give a folder"):
        everything(tmp_path, subsets=("tldr",))
    place = tldr_parquet(tmp_path / "copy", train=[("t3_a", "x")], validation=[("t3_b", "y")])
    for info in (pa.array(["x"]), pa.array([{"id": "t3_b", "text": "y"}])):
        pq.write_table(pa.table({"info": info}), place / "comparisons" / "validation" / "0000.parquet")
        with pytest.raises(UserError, match=r"validation/0000\.parquet: the column info has no fields id and post"):
            everything(place, subsets=("tldr",))
    (place / "comparisons" / "train" / "0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot load .*train/0000\.parquet"):
        everything(place, subsets=("tldr",))


def test_ids_derive_from_content():
    assert query_id("helpful", "Why is  the sky blue?") == query_id("helpful", "why is the sky blue?")
    assert query_id("helpful", "a") != query_id("harmless", "a")


@pytest.mark.parametrize("transcript, turn", [
    ("\n\nHuman: Hi there\n\nAssistant: Hello", "Hi there"),
    ("\n\nHuman: Two\nlines\n\nand a paragraph\n\nAssistant: Yes", "Two\nlines\n\nand a paragraph"),
    ("\n\nHuman: Nobody answers", "Nobody answers"),
    ("\n\nHuman: First\n\nHuman: Second\n\nAssistant: x", "First"),
    ("\n\nHuman:\n\nAssistant: What?", ""),
    ("\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant: Four", "One"),
    ("Human: No blank lines first\n\nAssistant: Fine", "No blank lines first"),
    ("\n\nAssistant: I start", ""),
    ("", ""),
    ("\n\nHuman: The word Human: inside\n\nAssistant: ok", "The word Human: inside"),
])
def test_first_human_turn(transcript, turn):
    assert first_human_turn(transcript) == turn


def test_hh_rlhf_is_loaded_by_folder_and_counts_what_it_drops(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, *, data_dir, split):
        asked.append((name, data_dir, split))
        rows = ["\n\nHuman: same\n\nAssistant: a", f"\n\nHuman: {split} only\n\nAssistant: b", "\n\nHuman:\n\nAssistant: c"]
        return [{"chosen": row} for row in rows]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    queries, dropped = everything("hh-rlhf", subsets=("helpful",))
    assert {a[1:] for a in asked} == {("helpful-base", "train"), ("helpful-base", "test")}
    assert [(q.split, q.text) for q in queries] == [("train", "train only"), ("evaluation", "same"), ("evaluation", "test only")]
    assert dropped == {"empty first human turn": 2, "training query that is also held out": 1}


def write(tmp_path, *rows):
    path = tmp_path / "queries.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_duplicates_and_leaks_are_dropped_and_counted(tmp_path):
    path = write(tmp_path, {"query": "A question?", "split": "train"}, {"query": "a  QUESTION?", "split": "train"},
                 {"query": "Held out", "split": "train"}, {"query": "held out", "split": "test"})
    queries, dropped = everything(path, subsets=("own",))
    assert [(q.split, q.text) for q in queries] == [("train", "A question?"), ("evaluation", "held out")]
    assert dropped == {"duplicate text": 1, "training query that is also held out": 1}
    kept, dropped = everything(path, subsets=("own",), leakage="keep")
    assert [q.text for q in kept if q.split == "train"] == ["A question?", "Held out"] and dropped == {"duplicate text": 1}


def test_development_gives_way_to_evaluation(tmp_path):
    path = write(tmp_path, {"query": "same", "split": "development"}, {"query": "Same", "split": "evaluation"})
    queries, dropped = everything(path, subsets=())
    assert [q.split for q in queries] == ["evaluation"]
    assert dropped == {"development query that is also in evaluation": 1}


def test_without_splits_a_fixed_part_is_held_out(tmp_path):
    path = write(tmp_path, *({"query": f"question number {k}"} for k in range(100)))
    queries, _ = everything(path, subsets=("own",))
    held_out = [q.text for q in queries if q.split == "evaluation"]
    assert 8 <= len(held_out) <= 35
    reordered = write(tmp_path, *({"query": f"question number {k}"} for k in reversed(range(100))))
    again, _ = everything(reordered, subsets=("own",))
    assert sorted(held_out) == sorted(q.text for q in again if q.split == "evaluation")


@pytest.mark.parametrize("row, reason", [
    ({"query": ""}, "query: missing or empty"), ({"query": " \n"}, "query: missing or empty"), ({"quarry": "x"}, "did you mean 'query'"),
    ({"query": 3}, "query: missing or empty"), ({"query": "a\0b"}, "NUL"), ({"query": "\ud800"}, "surrogate"),
    ({"query": "x", "split": "tset"}, "did you mean 'test'"), ({"query": "x", "id": ""}, "id: must be"), ("{", "not valid JSON"),
    ({"query": "x", "id": "one"}, "'one' occurs in line 1 too"),
])
def test_a_bad_row_names_file_and_line(tmp_path, row, reason):
    path = write(tmp_path, {"query": "fine", "id": "one"}, row)
    with pytest.raises(UserError, match=rf"queries\.jsonl:2: .*{re.escape(reason)}"):
        everything(path, subsets=("own",))


def test_other_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        everything(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no query in it"):
        everything(write(tmp_path))
    with pytest.raises(UserError, match="did you mean 'helpful'"):
        everything(subsets=("helpfull",))
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:1: not UTF-8 text \(byte 0xe9\)"):
        everything(tmp_path / "latin.jsonl", subsets=("own",))


def test_long_queries_and_control_tokens():
    from conftest import byte_tokenizer

    tokenizer, said = byte_tokenizer(), []
    long = Query(id="a", subset="helpful", split="train", text="x" * 50, where="f.jsonl:7")
    with pytest.raises(UserError, match=r"f\.jsonl:7: the query has 50 tokens .* room for 20.*--truncate"):
        check_queries([long], tokenizer, [], room=20, truncate=False)
    assert check_queries([long], tokenizer, [], room=20, truncate=True, say=said.append)[0].text == "x" * 20
    assert said == ["f.jsonl:7: truncated from 50 to 20 tokens"]
    bad = Query(id="a", subset="helpful", split="train", text="hi<|im_end|>", where="f.jsonl:8")
    with pytest.raises(UserError, match=r"f\.jsonl:8: holds the control token '<\|im_end\|>'"):
        check_queries([bad], tokenizer, ["<|im_end|>"], room=99, truncate=False)

"""The table of what training did to following, from published runs: by hand, and from runs of the tiny model."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from repro.base.records import write_json, write_jsonl
from repro.report import changes
from repro.report.changes import AMONG, ANSWERS, BOUND, FOLLOWED, TOKENS, WINS, of_side
from repro.studies import steered

SET = {"principles": [{"name": "short", "rule": "brief"}, {"name": "kind", "rule": None}, {"name": "plain", "rule": "simple_words"}]}


def made(folder, seeds):
    """A published experiment: of each seed the marks of queries under two constitutions, first and last."""
    write_json(folder / "constitutions.json", SET)
    for seed, marks in enumerate(seeds):
        write_jsonl(folder / f"following-seed-{seed}.jsonl", [
            {"query": f"q{k}", "subset": "helpful", "constitutions": ["short,kind,plain", "not_short,not_kind,plain"],
             "sides": {"0": before, "3": after}, "tokens": {"0": [20, 10], "3": [10 * k + seed, 12]},
             "bound": {"0": 0.1, "3": 0.2 + seed / 10 + k / 100} if k < 2 else {}} for k, (before, after) in enumerate(marks)])
    return folder


def test_values_by_hand(tmp_path):
    """Two seeds, two queries, two constitutions, two sides with a rule each. Query 0 goes from 2 of 4 to 4 of 4 and from 2 of 4
    to 2 of 4; query 1 from 0 (loops) to 1 of 4 and to 3 of 4."""
    folder = made(tmp_path / "exp1_x/mini", [
        [(["11", "00"], ["11", "11"]), (["11 loop", "11 loop"], ["10", "00"])],
        [(["10", "10"], ["01", "01"]), (["11 off", "00"], ["11", "10"])]])
    (line,) = changes.published(folder)
    assert line.by_query(FOLLOWED, 0) == {"q0": 0.5, "q1": 0} and line.by_query(FOLLOWED, 3) == {"q0": 0.75, "q1": 0.5}
    change = line.change(FOLLOWED)
    assert (change.value, change.n) == (0.375, 2) and change.sem == pytest.approx(np.std([0.25, 0.5], ddof=1) / 2**0.5)
    assert line.seeds(FOLLOWED) == [pytest.approx((0.5 + 0.25) / 2), pytest.approx((0 + 0.75) / 2)]
    assert line.value(ANSWERS).value == pytest.approx((1 + (0 + 0.5) / 2) / 2)
    among = line.change(AMONG)  # 0.25 of 0.625 -> 0.625 of 1; each query's part, linearised
    parts = [(0.5 - 0.4 * 1, 0.75 - 0.625), (0 - 0.4 * 0.25, 0.5 - 0.625)]
    assert among.value == pytest.approx(0.625 - 0.4) and among.sem == pytest.approx(
        np.std([after - before / 0.625 for before, after in parts], ddof=1) / 2**0.5) and line.ends(AMONG) == "0.40 -> 0.62"
    bound = line.change(BOUND)
    assert (bound.value, bound.n) == (pytest.approx(0.155), 2) and bound.ci95 == pytest.approx(
        np.array([0.155, 0.155]) + np.array([-1, 1]) * 12.7062 * 0.005, abs=1e-5)  # Student's t of 0.15 and 0.16
    assert line.by_query(TOKENS, 3) == {"q0": 6.25, "q1": 11.25} and line.ends(TOKENS) == "15 -> 9"
    ruled = changes.ruled(folder)
    assert ruled == {"short": "brief", "plain": "simple_words"}
    at_the_end = [line.by_query(of_side(side, frozenset(ruled)), 3) for side in ("plain", "not_short", "not_plain")]
    assert at_the_end == [{"q0": 1.0, "q1": 0.25}, {"q0": 0.5, "q1": 0.5}, {}]
    said = steered.write(tmp_path)
    assert len(said) == 1 and said[0].startswith("exp1_x, helpful: The bound on mutual information rose: 0.10 -> 0.26, +0.15 [")
    for part in ("The constitution is not seen to be followed more or less: 0.25 -> 0.62, +0.38 [-0.75, +0.88], as the share of its sides "
                 "(n 2, 2 seeds from +0.38 to +0.38)", "No change of how many answer is seen: 0.62 -> 1.00, +0.38 [-0.79, +0.94]"):
        assert part in said[0]
    page = (tmp_path / "steered.md").read_text()
    assert "| exp1_x, helpful | 2, 2 | 0.25 -> 0.62 | +0.38 [-0.75, +0.88] | +0.22 [" in page and "| 0.10 -> 0.26 | 15 -> 9 | 0.62 -> 1.00 |" in page
    assert "| exp1_x, helpful | plain | 2 | 0.12 -> 0.62 |" in page and (tmp_path / "steered.png").stat().st_size > 5000


def test_more_queries_make_it_certain(tmp_path):
    """A gain of a quarter of the sides in most of 128 queries is told; queries that two seeds share are counted once."""
    rng = np.random.default_rng(0)
    seeds = [[(["10", "00"], ["11", "00"] if rng.random() < 0.8 else ["10", "00"]) for _ in range(128)] for _ in range(2)]
    made(tmp_path / "exp1_x/mini", seeds)
    (line,) = changes.published(tmp_path / "exp1_x/mini")
    change = line.change(FOLLOWED)
    assert change.n == 128 and change.ci95[0] > 0.15 and change.ci95[1] < 0.25
    assert float(changes.detectable(change)) < 0.05
    assert "is followed more" in steered.write(tmp_path)[0]


def test_answering_more_often_is_not_following_more_among_answers(tmp_path):
    """A model that does not hear the constitution and comes to answer more follows more sides, the same share of its answers'."""
    deaf = (["11", "00"], ["11 loop", "00 loop"]), (["11", "00"], ["11", "00"])
    hears = (["11", "00"], ["11", "00"]), (["11", "11"], ["11", "11"])
    for (before, after), steerability, among in ((deaf, 0.25, 0), (hears, 0.5, 0.5)):
        made(tmp_path / "exp1_x/mini", [[(before[k % 2], after[k % 2]) for k in range(20)]])
        (line,) = changes.published(tmp_path / "exp1_x/mini")
        assert line.change(FOLLOWED).value == steerability and line.change(AMONG).value == pytest.approx(among)


def test_the_interval_among_answers_holds_the_truth(tmp_path):
    """95 times in 100, at the size of a published run, where answering and following go together."""
    rng, held = np.random.default_rng(0), 0

    def marks(easy, follow, answer):
        sides = zip(rng.random(2) < follow + 0.2 * easy, rng.random(2) < follow, rng.random(2) < answer * (0.6 + 0.4 * easy))
        return [f"{int(a)}{int(b)}" + ("" if answers else " loop") for a, b, answers in sides]

    for _ in range(400):
        rows = [{"query": k, "constitutions": ["a,b", "a,c"], "sides": {"0": marks(easy, 0.5, 0.6), "1": marks(easy, 0.6, 0.9)}}
                for k, easy in enumerate(rng.random(128))]
        low, high = changes.Line("x", "s", {0: rows}).change(AMONG).ci95
        held += low <= 0.1 <= high  # an easy query weighs as much at both ends
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_what_a_seed_or_a_run_lacks_is_left_out(tmp_path):
    """A seed that answers nothing at the end, one whose principles have no rule, a run that training left as it was, rows of an
    older version without lengths and bounds: told as far as they go, and no page falls over them."""
    good = [(["11", "00"], ["11", "10"]), (["10", "00"], ["11", "00 loop"])]
    silent = [(["11", "00"], ["11 loop", "10 off"]), (["10", "00"], ["11 loop", "00 off"])]
    unruled = [(["-", "-"], ["-", "- off"]), (["-", "- off"], ["-", "-"])]
    for seeds, followed, among in (([good, silent], 2, 1), ([good, unruled], 1, 1), ([silent], 1, 0), ([unruled], 0, 0)):
        (line,) = changes.published(made(tmp_path / "exp1_x/mini", seeds))
        assert (len(line.seeds(FOLLOWED)), len(line.seeds(AMONG))) == (followed, among)
        told = " ".join(changes.verdict(line))
        assert ("cannot be said" in told) == (not followed) and "nan" not in told
        if followed:
            assert f"(n 2, {followed} seed" in told and len(steered.write(tmp_path)) == 1 and "nan" not in (tmp_path / "steered.md").read_text().lower()
        for path in (tmp_path / "exp1_x/mini").glob("following-*"):
            path.unlink()
    (line,) = changes.published(made(tmp_path / "exp1_x/mini", [[(["11", "00"], ["11", "00"])] * 9]))
    assert line.change(AMONG).ci95 is None and "so many queries" not in " ".join(changes.verdict(line))  # nothing varied: no power to tell
    assert len(steered.write(tmp_path)) == 1
    rows = [{k: v for k, v in row.items() if k not in ("tokens", "bound")} for row in line.rows[0]]
    write_jsonl(tmp_path / "exp1_x/mini/following-seed-0.jsonl", rows)
    (tmp_path / "exp1_x/mini/following-notes.jsonl").write_text("{}\n")  # no run's
    (line,) = changes.published(tmp_path / "exp1_x/mini")
    told = changes.verdict(line)
    assert "The constitution is not seen to be followed" in told[0] and "length" not in told[-1] and len(steered.write(tmp_path)) == 1


def test_among_answers_counts_responses_with_a_rule_alone():
    """Of two items of a query one has no rule: whether its responses answer changes nothing."""
    ruled = {"query": "q", "constitutions": ["a", "not_a"], "sides": {"0": ["1", "0"], "1": ["1", "0"]}}
    bare = {"query": "q", "constitutions": ["b", "not_b"], "sides": {"0": ["- loop", "- loop"], "1": ["-", "-"]}}
    (line,) = [changes.Line("x", "s", {0: [ruled, bare] * 3})]
    assert line.ends(AMONG) == "0.50 -> 0.50" and line.ends(ANSWERS) == "0.50 -> 1.00"


def test_nothing_published_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "repro.studies.steered", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no published run with following-*.jsonl" in done.stderr


def test_a_published_run_takes_its_marks_along(tmp_path, tiny):
    import dataclasses

    from test_experiments import small

    from repro.experiment import load_experiment
    from repro.report.page import stories_of
    from repro.report.publish import publish
    from repro.stages.pipeline import run

    experiment = small(load_experiment("exp3", "mini")[0], tiny)
    experiment = dataclasses.replace(experiment, iterations=1, data=dataclasses.replace(experiment.data, evaluation=3, scored=2))
    out = publish([run(experiment, tmp_path / "runs", say=lambda line: None)], tmp_path / "results")
    rows = [json.loads(line) for line in (out / "following-seed-0.jsonl").read_text().splitlines()]
    (story,) = stories_of(out / "report.html")
    assert Counter(item["subset"] for item in story["items"]) == {"learned": 2, "held_out": 2}  # of the two that are scored
    for item in story["items"]:
        of = [row for row in rows if (row["query"], row["subset"], row["constitutions"]) == (item["id"], item["subset"], item["constitutions"])]
        assert [[of[0]["sides"][str(i)] for i in (0, 1)]] * len(of) == [item["marks"]] * len(of) and len(of) >= 1
    metrics = json.loads((out / "metrics.json").read_text())
    lines = {line.subset: line for line in changes.published(out)}
    (won,) = [r for r in metrics if (r["metric"], r["judge"], r["ties"], r["length"], r["subset"]) == ("win_rate", "rule", "half", "raw", "learned")]
    wins = lines["learned"].value(WINS, 1)
    assert (100 * wins.value, wins.n) == (pytest.approx(won["value"]), won["n"])
    names = {"steerability": FOLLOWED, "answered": ANSWERS}
    for subset in {row["subset"] for row in rows}:
        for metric, measure in names.items():
            (found,) = [r for r in metrics if (r["metric"], r["subset"], r["iteration"]) == (metric, subset, 1)]
            value = lines[subset].value(measure, 1)
            assert (value.value, value.n, list(value.ci95)) == (pytest.approx(found["value"]), found["n"], pytest.approx(found["ci95"]))
        (found,) = [r for r in metrics if r["metric"] == "mi" and r["estimator"] == "infonce" and not r.get("principle")
                    and (r["subset"], r["iteration"]) == (subset, 1)]
        assert lines[subset].value(BOUND, 1).value == pytest.approx(found["value"]) and lines[subset].value(BOUND, 1).n == found["n"] == 2

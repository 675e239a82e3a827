"""The held-out side of a run: responses under every constitution, their log-probs, judgments, metrics.json."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from math import log

from tqdm import tqdm

from repro import judging, lora, metrics, seam, worker
from repro.config import JudgeSpec
from repro.constitutions import Pool
from repro.endpoint import Ledger
from repro.llm_judge import Pair, ask_judge, judge_shares, probe_judge
from repro.records import UserError, checked, read_jsonl, write_json, write_jsonl
from repro.rundir import Item, Run, checkpoint, evaluation_file, logprob_file
from repro.sampling import sample_to_file

SCORED_AT_ONCE = 8  # queries handed over together, for full packs
JUDGMENTS = "judgments.jsonl"
BASELINE = "responses/baseline.jsonl"
EVALUATION_ORDER = "evaluation"  # the principles' order at evaluation: the same for every iteration and seed


def evaluate(run: Run, iteration: int) -> None:
    """Responses to the held-out queries under every constitution, and their log-probs under every constitution."""
    name = f"evaluate-{iteration}"
    outputs = [evaluation_file(iteration), logprob_file(iteration)]
    inputs = [f"train-{iteration}"] if iteration else run.written()
    if not run.stage(name, outputs, inputs):
        return
    jobs = [(item.query, c) for item in run.items() for c in item.constitutions]
    texts = [run.prompt(c, q, EVALUATION_ORDER, sample=True, reason=run.form.cot) for q, c in jobs]
    rows = sample_to_file(run, jobs, texts, iteration, run.folder / evaluation_file(iteration), name)
    write_jsonl(run.folder / logprob_file(iteration), _score_held_out(run, iteration, rows, name))
    run.finish(name, outputs, inputs)


def evaluate_baseline(run: Run) -> None:
    """The baseline's responses under the constitutions that are judged -> responses/baseline.jsonl."""
    spec = run.experiment.baseline
    if spec is None or not run.stage("baseline", [BASELINE], run.written()):
        return
    other = run.answering_as(spec)
    jobs = [(item.query, item.constitutions[0]) for item in run.items()]
    texts = [other.prompt(c, q, EVALUATION_ORDER, sample=True) for q, c in jobs]
    sample_to_file(other, jobs, texts, 0, run.folder / BASELINE, "baseline")
    run.finish("baseline", [BASELINE], run.written())


def held_out_pairs(run: Run, rows: list[dict]) -> Iterator[tuple[Item, list[str], list]]:
    """Per item its generation prompts [C] and, of the responses `rows` of an evaluation, what is scored [C] (`seam.said`).
    """
    start = 0
    for item in run.items():
        texts = [run.prompt(c, item.query, EVALUATION_ORDER, sample=True) for c in item.constitutions]
        part, start = rows[start: start + len(texts)], start + len(texts)
        yield item, texts, [seam.said(run, row) for row in part]


@contextmanager
def _as_trained(run: Run, iteration: int, dtype: str):
    """The model of an iteration as it was trained. Of adapters beside weights of 16 bits that is not the merged one, which
    16 bits would round to little more than the initial model."""
    train = run.experiment.train
    if not (train.lora and iteration and dtype == "bfloat16"):
        with run.model(iteration, dtype) as model:
            yield model
        return
    model = lora.trained(run.folder / checkpoint(iteration), run.place, train)
    try:
        yield model
    finally:
        del model
        gc.collect()


def _score_held_out(run: Run, iteration: int, rows: list[dict], name: str) -> list[dict]:
    """Per item: summed log-probs [C][R] and scored tokens [R] of the iteration's own model; and, for the likelihood
    judge where there is one, the initial model's [C] for the judged response. Scored with the generation prompts, less
    any reasoning."""
    import torch

    from repro.logprobs import matrix_by
    from repro.prefix import pairs_of
    from repro.training import TrainingPair, matmul_precision, settle, weights_dtype

    spec, items = run.experiment, []
    dtype, eos = weights_dtype(spec.train), spec.train.score_eos
    seam.tell_old(run, rows, evaluation_file(iteration))
    for item, texts, responses in held_out_pairs(run, rows):
        tokens = [len(p.ids) - p.start for p in pairs_of(run.tokenizer, texts[0], responses, score_eos=eos)]
        items.append((item, texts, responses, tokens))

    def score(which: int, select: slice, label: str) -> list[list[list[float]]]:
        if run.ranks > 1:
            pairs = [TrainingPair(item.query.id, tuple(texts), tuple(r[select])) for item, texts, r, _ in items]
            with tqdm(total=len(items), desc=f"{name} {label}", unit="query") as bar:
                return worker.score(run.folder, name, run.ranks, model=run.weights(which), pairs=pairs, spec=spec.train,
                                    backend=run.record["backend"], on_query=bar.update)
        with _as_trained(run, which, dtype) as model, torch.inference_mode():
            matrices, way = [], settle(model, run.record["backend"])
            with matmul_precision(model, spec.train.precision), tqdm(
                    total=len(items), desc=f"{name} {label}", unit="query") as bar:
                for k in range(0, len(items), SCORED_AT_ONCE):
                    part = items[k: k + SCORED_AT_ONCE]
                    matrices += matrix_by(
                        way, model, run.tokenizer, [p for _, p, _, _ in part], [r[select] for _, _, r, _ in part],
                        length_normalize=False, score_eos=eos).tolist()
                    bar.update(len(part))
            return matrices

    own = score(iteration, slice(None), "log-probs")
    rows = [{"query": item.query.id, "subset": item.subset, "logprobs": m, "tokens": t}
            for (item, _, _, t), m in zip(items, own)]
    if "likelihood" in spec.judge.judges:
        initial = own if iteration == 0 else score(0, slice(1), "under the initial model")
        rows = [row | {"initial": [line[0] for line in m]} for row, m in zip(rows, initial)]
    return rows


def greet_judge(run: Run) -> None:
    """One small request to the LLM judge, where there is one, before the first response: with a wrong name or address all
    would be sampled and trained first. Raises UserError; a folder that holds nothing else is left as it was found."""
    if "openai" not in run.experiment.judge.judges or "judge" in run.record["stages"]:
        return
    path, spec = run.folder / JUDGMENTS, run.experiment.judge
    try:
        probe_judge(spec, run.endpoint, path, run.say, seed=run.experiment.seed)
    except UserError as e:
        if run.record["stages"]:
            raise
        if not Ledger(path, {"judge": spec.label}).spent:
            for name in (JUDGMENTS, "queries.jsonl", "run.json"):
                (run.folder / name).unlink(missing_ok=True)
        raise UserError(f"{e} (nothing was sampled or trained yet)") from None


def judge(run: Run) -> None:
    """Each item's response under its first constitution, by every iteration, against the initial model's, and against
    the baseline's where there is one -> judgments.jsonl."""
    if not run.stage("judge", [JUDGMENTS], _judge_inputs(run)):
        return
    rows = []
    for name in run.record.get("judges", {}):
        if name != run.experiment.judge.label:
            run.say(f"judge {name}: its judgments are taken out; `repro judge {run.folder}` puts them back and asks "
                    "nothing that it has answered")
    for judge in run.experiment.judge.judges:
        if judge == "openai":
            rows += llm_judgments(run, run.experiment.judge)
        elif judge == "rule" and not any(run.ruled(item.constitutions[0]) for item in run.items()):
            run.say("judge rule: NOT RUN: no principle has a rule")
        else:
            rows += judged_here(run, judge)
    _write_judgments(run, rows)


def judged_here(run: Run, judge: str) -> list[dict]:
    """The judgments of the judge "rule" or "likelihood", which the files of the run alone decide."""
    items, rows = run.items(), []
    logprobs = {i: [row for _, row in read_jsonl(run.folder / logprob_file(i))]
                for i in range(run.experiment.iterations + 1)}
    for i, label, ours, theirs in _comparisons(run):
        for k, item in enumerate(items):
            a, b = ours[k], theirs[k]
            if judge == "rule":
                constitution = run.ruled(item.constitutions[0])
                if constitution is None:
                    continue  # no item: there is nothing that it could go by
                score = judging.judge_pairwise(a["text"], b["text"], constitution)
            elif label == run.experiment.model.label:
                score = judging.likelihood_score(_normalized(logprobs[i][k]), _normalized(logprobs[0][k]))
            else:
                continue  # the baseline's responses have no log-probs under the initial model
            if a["text"] == b["text"]:
                score = 0.5  # identical texts tie: their scores differ by rounding alone
            rows.append(_judgment(judge, item, label, a, b) | {
                "score": score, "outcome": {1.0: "win", 0.5: "tie", 0.0: "loss"}[score]})
    return rows


def judged_responses(run: Run, path: str, per_item: int) -> list[dict]:
    """Of a file with `per_item` responses an item, the one under the item's first constitution."""
    return [row for _, row in read_jsonl(run.folder / path)][::per_item]


def _comparisons(run: Run) -> Iterator[tuple[int, str, list[dict], list[dict]]]:
    """(iteration, the other's name, our responses, its responses): what is judged against what, one of each an item."""
    C = len(run.items()[0].constitutions)
    ours = {i: judged_responses(run, evaluation_file(i), C) for i in range(run.experiment.iterations + 1)}
    for i in ours:
        if i:
            yield i, run.experiment.model.label, ours[i], ours[0]
    if run.experiment.baseline:
        theirs = judged_responses(run, BASELINE, 1)
        for i in ours:
            yield i, run.experiment.baseline.label, ours[i], theirs


def _judge_inputs(run: Run) -> list[str]:
    return [f"evaluate-{i}" for i in range(run.experiment.iterations + 1)] + (
        ["baseline"] if run.experiment.baseline else [])


def _judgment(judge: str, item: Item, baseline: str, ours: dict, theirs: dict) -> dict:
    return {"record": "judgment", "judge": judge, "query": item.query.id, "constitution": item.constitutions[0].id,
            "subset": item.subset, "iteration": ours["iteration"], "baseline": baseline, "tokens": ours["tokens"],
            "baseline_tokens": theirs["tokens"]}


def _write_judgments(run: Run, rows: list[dict]) -> None:
    """The stage's output: the judgments in item order, then every ledger line of an LLM judge as it was appended."""
    path = run.folder / JUDGMENTS
    ledger = [row for _, row in read_jsonl(path, torn_tail=True) if row.get("record") in ("attempt", "outcome")] \
        if path.exists() else []
    write_jsonl(path, [*rows, *map(checked, ledger)])
    run.finish("judge", [JUDGMENTS], _judge_inputs(run))


def add_judgments(run: Run, judge: str, rows: list[dict]) -> None:
    """Put one judge's judgments beside those of the other judges of a finished run, in place of its earlier ones."""
    others = [row for _, row in read_jsonl(run.folder / JUDGMENTS, torn_tail=True) if row.get("record") not in (
        "attempt", "outcome") and row["judge"] != judge]
    _write_judgments(run, others + rows)


def llm_judgments(run: Run, spec: JudgeSpec, *, dry_run: bool = False, reparse: bool = False) -> list[dict]:
    """As `judge`, by an LLM behind an endpoint, in both orders. Its answers are appended to judgments.jsonl as they
    arrive; what lies there already is not asked again."""
    jobs = [(item, label, a, b) for _, label, ours, theirs in _comparisons(run)
            for item, a, b in zip(run.items(), ours, theirs)]
    pairs = [Pair(id=item.query.id, query=item.query.text, principles=tuple(item.constitutions[0].statements()),
                  ours=a["text"], theirs=b["text"]) for item, _, a, b in jobs]
    verdicts, facts = ask_judge(spec, pairs, run.endpoint, run.folder / JUDGMENTS, run.say, seed=run.experiment.seed,
                                dry_run=dry_run, reparse=reparse)
    if not dry_run:
        run.record.setdefault("judges", {})[spec.label] = facts
    return [_judgment(spec.label, item, label, a, b) | verdict.to_json()
            for (item, label, a, b), verdict in zip(jobs, verdicts)]


def _normalized(row: dict) -> list[float]:
    return [x / row["tokens"][0] for x in row["initial"]]


def measure(run: Run) -> None:
    """metrics.json from the files of the stages before it (design: one flat list of records)."""
    inputs = ["judge", *_judge_inputs(run)]
    if not run.stage("metrics", ["metrics.json"], inputs):
        return
    write_json(run.folder / "metrics.json", list(records(run)))
    run.finish("metrics", ["metrics.json"], inputs)


def records(run: Run) -> Iterator[dict]:
    """Every metric of the run with n, SEM and 95 % interval. The unit of n is the held-out query, over whose items (of a
    pool it may have several) values are averaged first; of a win rate it is the item, of one principle the response."""
    import numpy as np

    spec, items = run.experiment, run.items()
    constants = {"model": spec.model.label, "writer": run.constitutions.writer, "cot": spec.cot, "seed": spec.seed}
    judgments = [row for _, row in read_jsonl(run.folder / JUDGMENTS) if row.get("record") not in ("attempt", "outcome")]
    C = len(items[0].constitutions)
    for iteration in range(spec.iterations + 1):
        responses = [row for _, row in read_jsonl(run.folder / evaluation_file(iteration))]
        scored = [row for _, row in read_jsonl(run.folder / logprob_file(iteration))]
        for subset in dict.fromkeys(item.subset for item in items):
            at = [k for k, item in enumerate(items) if item.subset == subset]
            here, groups = [items[k] for k in at], [responses[k * C: (k + 1) * C] for k in at]
            sums = np.array([scored[k]["logprobs"] for k in at])
            means = sums / np.array([scored[k]["tokens"] for k in at])[:, None, :]
            fixed = constants | {"subset": subset, "iteration": iteration}

            def by_query(values, queries=tuple(item.query.id for item in here)) -> list[float]:
                found: dict[str, list[float]] = {}
                for query, value in zip(queries, values):
                    if value is not None:
                        found.setdefault(query, []).append(value)
                return [sum(each) / len(each) for each in found.values()]

            ceiling = float(np.log(C))
            for estimator, logprobs, most in (("infonce", means, ceiling), ("symmetric_infonce", means, ceiling),
                                              ("mean_of_logs", sums, np.inf)):
                yield _record("mi", metrics.mean(by_query(getattr(metrics, estimator)(logprobs)), most), fixed,
                              estimator=estimator)
            yield _record("accuracy_row", metrics.share(by_query(metrics.accuracy_row(means))), fixed)
            yield _record("accuracy_col", metrics.share(by_query(metrics.accuracy_col(means))), fixed)
            yield _length(run, by_query([g[0]["tokens"] for g in groups]), fixed)
            followed = [c and judging.follows(g[0]["text"], c) for g, c in
                        ((g, run.ruled(item.constitutions[0])) for g, item in zip(groups, here))]
            if any(followed):
                sides = by_query([f and sum(f.values()) / len(f) for f in followed])
                yield _record("following", metrics.share(sides), fixed)
            yield from _following(run, here, groups, fixed)
            if isinstance(run.constitutions, Pool):
                yield from _by_principle(here, metrics.infonce(means), fixed)
            watch = [[judging.hack_watch(r["text"], " ".join(c.statements()), item.query.text)
                      for r, c in zip(g, item.constitutions)] for g, item in zip(groups, here)]
            for metric in watch[0][0]:
                yield _record(metric, metrics.share(by_query([sum(w[metric] for w in g) / C for g in watch])), fixed)
            mine = [j for j in judgments if (j["iteration"], j["subset"]) == (iteration, subset)]
            for judge, baseline in dict.fromkeys((j["judge"], j["baseline"]) for j in mine):
                rows = [j for j in mine if (j["judge"], j["baseline"]) == (judge, baseline)]
                for ties, length, estimate in _win_rates(rows):
                    yield _record("win_rate", estimate, fixed, baseline=baseline, judge=judge, ties=ties, length=length)
                for metric, values in judge_shares(rows).items():
                    yield _record(metric, metrics.share(values), fixed, baseline=baseline, judge=judge)
    if spec.baseline:
        rows = judged_responses(run, BASELINE, 1)
        for subset in dict.fromkeys(item.subset for item in items):
            lengths = [row["tokens"] for row, item in zip(rows, items) if item.subset == subset]
            yield _length(run, lengths, constants | {"model": spec.baseline.label, "subset": subset, "iteration": 0})


def _length(run: Run, tokens: list[float], fixed: dict) -> dict:
    """Mean length up to the cap on a response (one cut out of its form and tokenised anew may be longer)."""
    spec = run.experiment.sampling
    most = spec.max_new_tokens + spec.reasoning_tokens * bool(run.experiment.cot)
    return _record("length_tokens", metrics.bounded(tokens, max(most, *tokens)), fixed)


def _following(run: Run, items: list[Item], groups: list[list[dict]], fixed: dict) -> Iterator[dict]:
    """The share of responses that follow each principle, and each antithesis ("not_..."), by rule, under a constitution
    that holds it: of a set the judged one for the principle, all that hold it otherwise. Of principles that a model
    wrote: the hand-written ones, under the judged constitution."""
    if run.experiment.writer:
        for name in (p.name for p in run.by_hand.principles if p.rule):
            yield _record("following", metrics.share([
                float(judging.follows(group[0]["text"], run.by_hand.positive)[name]) for group in groups]), fixed,
                principle=name)
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for group, item in zip(groups, items):
        for p in (p for p in item.constitutions[0].principles if p.rule):
            for side in (True, False):
                values = [judging.follows(r["text"], c)[p.name] for r, c in zip(group, item.constitutions)
                          if c.sides[c.principles.index(p)] == side]
                values = values[:1] if side else values
                found.setdefault((p.name, side), []).append(sum(values) / len(values))
    for (name, side), values in found.items():
        yield _record("following", metrics.share(values), fixed, principle=name if side else f"not_{name}")


def _by_principle(items: list[Item], bounds, fixed: dict) -> Iterator[dict]:
    """Of a pool: the bound over the items whose constitution holds the principle (another one is beside it)."""
    found: dict[str, list[float]] = {}
    for item, bound in zip(items, bounds):
        for p in item.constitutions[0].principles:
            found.setdefault(p.name, []).append(bound)
    for name, values in found.items():
        yield _record("mi", metrics.mean(values, log(2)), fixed, estimator="infonce", principle=name)


def _win_rates(rows: list[dict]) -> Iterator[tuple[str, str, metrics.Estimate]]:
    """(ties, length, win rate) under each tie rule and length control that these judgments define. A missing verdict
    is no item; a flip is half a win under either rule: the orders disagreed, the texts did not tie."""
    rows = [row for row in rows if row["score"] is not None]
    if not rows:
        return
    difference = [float(row["tokens"] - row["baseline_tokens"]) for row in rows]
    for ties in ("half", "loss"):
        scores = [0.0 if (row["outcome"], ties) == ("tie", "loss") else row["score"] for row in rows]
        yield ties, "raw", metrics.win_rate(scores, ties="half")
        longer = [d > 0 for d in difference]
        if min(sum(longer), len(longer) - sum(longer)) >= 2:  # a stratum of one has no SEM
            yield ties, "stratified", metrics.win_rate_stratified(scores, longer, ties="half")
        try:
            yield ties, "logistic", metrics.win_rate_logistic(scores, difference, ties="half")
        except ValueError:
            pass  # equal lengths throughout, or wins that length separates: no finite fit


def _record(metric: str, estimate: metrics.Estimate, fixed: dict, **extra) -> dict:
    """One line of metrics.json."""
    keys = ("subset", "iteration", "model", "writer", "cot", "baseline", "judge", "estimator", "ties", "length", "seed")
    return ({"metric": metric} | dict.fromkeys(keys) | fixed | extra
            | {"value": estimate.value, "sem": estimate.sem, "n": estimate.n,
               "ci95": None if estimate.ci95 is None else list(estimate.ci95)})

"""The held-out side of a run: responses under every constitution, their log-probs, judgments."""

from collections.abc import Iterator
from dataclasses import replace

from repro.base.records import UserError, read_jsonl, write_jsonl
from repro.base.settings import JudgeSpec
from repro.judges import likelihood, rule
from repro.judges.llm import Pair, ask_judge, probe_judge
from repro.judges.record import JUDGMENTS, REQUESTS, JudgeLedger, read_judgments, write_judgments
from repro.stages import draws
from repro.stages.draws import EVALUATION_ORDER, Item, held_out_pairs
from repro.stages.folder import bare_file, evaluation_file, logprob_file, otherwise_file
from repro.stages.run import Run
from repro.stages.sample import sample_to_file, score_pairs

BASELINE = "responses/baseline.jsonl"


def evaluate(run: Run, iteration: int) -> None:
    """Responses to the held-out queries under every constitution, and the log-probs of those that are scored."""
    name = f"evaluate-{iteration}"
    outputs = [evaluation_file(iteration), logprob_file(iteration)]
    inputs = [f"train-{iteration}"] if iteration else run.written()
    if not run.stage(name, outputs, inputs):
        return
    wanted = [(item.query, c) for item in run.items(iteration) for c in item.constitutions]
    texts = [draws.prompt(run.voice, c, q, EVALUATION_ORDER, sample=True, reason=run.voice.form.cot) for q, c in wanted]
    rows = sample_to_file(run, wanted, texts, iteration, run.folder / evaluation_file(iteration), name)
    write_jsonl(run.folder / logprob_file(iteration), _score_held_out(run, iteration, rows, name))
    run.finish(name, outputs, inputs)


def evaluate_baseline(run: Run) -> None:
    """The baseline's responses under the constitutions that are judged -> responses/baseline.jsonl."""
    spec = run.experiment.baseline
    if spec is None or not run.stage("baseline", [BASELINE], run.written()):
        return
    other = run.answering_as_baseline()
    wanted = [(item.query, item.constitutions[0]) for item in run.items()]
    texts = [draws.prompt(other.voice, c, q, EVALUATION_ORDER, sample=True) for q, c in wanted]
    sample_to_file(other, wanted, texts, 0, run.folder / BASELINE, "baseline")
    run.finish("baseline", [BASELINE], run.written())


def _score_held_out(run: Run, iteration: int, rows: list[dict], name: str) -> list[dict]:
    """Per item: summed log-probs [C][R] and scored tokens [R] of the iteration's own model; and, for the likelihood
    judge where there is one, the initial model's [C] for the judged response. Scored with the generation prompts, less
    any reasoning."""
    from repro.core.engines import TrainingPair

    draws.tell_old(run, rows, evaluation_file(iteration))
    items, pairs = [], []
    for item, texts, responses in held_out_pairs(run, rows):
        items.append(item)
        pairs.append(TrainingPair(item.query.id, tuple(texts), tuple(responses)))
    own = score_pairs(run, iteration, pairs, name, "log-probs")
    rows = [{"query": item.query.id, "subset": item.subset, "logprobs": m, "tokens": n}
            for item, (m, n) in zip(items, own)]
    if "likelihood" in run.experiment.judge.judges:
        judged = [replace(pair, responses=pair.responses[:1]) for pair in pairs]
        initial = score_pairs(run, 0, judged, name, "under the initial model") if iteration else own
        rows = [row | {"initial": [line[0] for line in m]} for row, (m, _) in zip(rows, initial)]
    return rows


CONTRARY = "For this one answer, do the opposite of what these principles ask."


def score_bare(run: Run, iteration: int) -> None:
    """The log-probs of what is scored under the initial model without a constitution: how far the text has drifted."""
    from repro.core.engines import TrainingPair

    name, inputs, outputs = f"bare-{iteration}", [f"evaluate-{iteration}"], [bare_file(iteration)]
    if not run.stage(name, outputs, inputs):
        return
    rows, C = read_jsonl(run.folder / evaluation_file(iteration)), run.constitutions.count
    pairs = [TrainingPair(item.query.id, (draws.bare(run.voice, item.query),),
                          tuple(draws.said(run.voice, row) for row in rows[k * C: (k + 1) * C]))
             for k, item in enumerate(run.scored())]
    scored = score_pairs(run, 0, pairs, name, "under the initial model")
    write_jsonl(run.folder / outputs[0], [{"query": p.query, "logprobs": m[0], "tokens": n}
                                          for p, (m, n) in zip(pairs, scored)])
    run.finish(name, outputs, inputs)


def ask_otherwise(run: Run, iteration: int) -> None:
    """Responses without a constitution, and under the all-positive one where the user at last asks for its opposite."""
    name, inputs = f"otherwise-{iteration}", [f"evaluate-{iteration}"]
    wanted = [(item.query, item.constitutions[0]) for item in run.items()]
    texts = {"bare": [draws.bare(run.voice, query) for query, _ in wanted],
             "contrary": [draws.prompt(run.voice, c, query, draws.EVALUATION_ORDER, sample=True, last=CONTRARY)
                          for query, c in wanted]}
    outputs = [otherwise_file(kind, iteration) for kind in texts]
    if not run.stage(name, outputs, inputs):
        return
    for kind, output in zip(texts, outputs):
        sample_to_file(run, wanted, texts[kind], iteration, run.folder / output, f"{name} {kind}")
    run.finish(name, outputs, inputs)


def greet_judge(run: Run) -> None:
    """One small request to the LLM judge, where there is one, before the first response: with a wrong name or address all
    would be sampled and trained first. Raises UserError; a folder that holds nothing else is left as it was found."""
    if "openai" not in run.experiment.judge.judges or "judge" in run.record["stages"]:
        return
    path, spec = run.folder / REQUESTS, run.experiment.judge
    try:
        probe_judge(spec, run.endpoint, path, run.say, seed=run.experiment.seed)
    except UserError as e:
        if run.record["stages"]:
            raise
        if not JudgeLedger(path, {}).spent:  # nor by another judge
            for name in (REQUESTS, JUDGMENTS, "queries.jsonl", "run.json"):
                (run.folder / name).unlink(missing_ok=True)
        raise UserError(f"{e} (nothing was sampled or trained yet)") from None


def judge(run: Run) -> None:
    """Each item's response under its first constitution, by every iteration, against the initial model's, and against
    the baseline's where there is one -> judgments.jsonl."""
    if not run.stage("judge", [JUDGMENTS], judge_inputs(run)):
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
    rows = []
    logprobs = {i: read_jsonl(run.folder / logprob_file(i)) for i in range(run.experiment.iterations + 1)}
    for i, label, ours, theirs in _comparisons(run):
        for k, (item, a, b) in enumerate(zip(run.items(i), ours, theirs)):
            if judge == "rule":
                constitution = run.ruled(item.constitutions[0])
                if constitution is None:
                    continue  # no item: there is nothing that it could go by
                told = item.constitutions[0].statements()
                score = rule.judge_pairwise(a["text"], b["text"], constitution, run.asked(item), told)
            elif item.scored and label == run.experiment.model.label:
                score = likelihood.likelihood_score(_normalized(logprobs[i][k]), _normalized(logprobs[0][k]))
            else:
                continue  # no log-probs under the initial model: of the baseline's responses, or of what is not scored
            if a["text"] == b["text"]:
                score = 0.5  # identical texts tie: their scores differ by rounding alone
            rows.append(_judgment(judge, item, label, a, b) | {
                "score": score, "outcome": {1.0: "win", 0.5: "tie", 0.0: "loss"}[score]})
    return rows


def judged_responses(run: Run, path: str, per_item: int) -> list[dict]:
    """Of a file with `per_item` responses an item, the one under the item's first constitution."""
    return read_jsonl(run.folder / path)[::per_item]


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


def judge_inputs(run: Run) -> list[str]:
    return [f"evaluate-{i}" for i in range(run.experiment.iterations + 1)] + (
        ["baseline"] if run.experiment.baseline else [])


def _judgment(judge: str, item: Item, baseline: str, ours: dict, theirs: dict) -> dict:
    return {"record": "judgment", "judge": judge, "query": item.query.id, "constitution": item.constitutions[0].id,
            "subset": item.subset, "iteration": ours["iteration"], "baseline": baseline, "tokens": ours["tokens"],
            "baseline_tokens": theirs["tokens"]}


def _write_judgments(run: Run, rows: list[dict]) -> None:
    """The stage's output: the judgments, each judge's in item order."""
    write_judgments(run.folder, rows)
    run.finish("judge", [JUDGMENTS], judge_inputs(run))


def add_judgments(run: Run, judge: str, rows: list[dict]) -> None:
    """Put one judge's judgments beside those of the other judges of a finished run, in place of its earlier ones."""
    others = [row for row in read_judgments(run.folder) if row["judge"] != judge]
    _write_judgments(run, others + rows)


def llm_judgments(run: Run, spec: JudgeSpec, *, dry_run: bool = False, reparse: bool = False) -> list[dict]:
    """As `judge`, by an LLM behind an endpoint, in both orders. Its answers are appended to judge_requests.jsonl as
    they arrive; what lies there already is not asked again."""
    compared = [(item, label, a, b) for i, label, ours, theirs in _comparisons(run)
            for item, a, b in zip(run.items(i), ours, theirs)]
    pairs = [Pair(id=item.query.id, query=item.query.text, principles=tuple(item.constitutions[0].statements()),
                  ours=a["text"], theirs=b["text"]) for item, _, a, b in compared]
    verdicts, facts = ask_judge(spec, pairs, run.endpoint, run.folder / REQUESTS, run.say, seed=run.experiment.seed,
                                dry_run=dry_run, reparse=reparse)
    if not dry_run:
        run.record.setdefault("judges", {})[spec.label] = facts
    return [_judgment(spec.label, item, label, a, b) | verdict.to_json()
            for (item, label, a, b), verdict in zip(compared, verdicts)]


def _normalized(row: dict) -> list[float]:
    return [x / row["tokens"][0] for x in row["initial"]]

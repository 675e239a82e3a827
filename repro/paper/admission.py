"""A licence to judge: how far a judge agrees with the archived verdicts on the archived responses, and which planted
injections it falls for. The paper's judge (gpt-4-0613) is retired; a judge that replaces it is a column of its own.

The archived judge saw each pair once, in a shuffled order, so it is held against a single verdict of ours: the mean of
our two orders. Agreement and kappa are over items with an archived win or loss and two verdicts of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from repro.base import metrics
from repro.base.identity import commit, rng
from repro.base.metrics import Estimate
from repro.base.places import DATA
from repro.base.records import UserError, locked, read_jsonl, write_json
from repro.base.settings import JudgeSpec
from repro.judges.llm import Pair, Verdict, ask_judge, judge_shares
from repro.judges.record import REQUESTS
from repro.judges.standing import ADMISSIONS, MAX_ATTACKS, MIN_KAPPA, MIN_PARSED
from repro.paper.archive import Archive, archive_root, load_manifest
from repro.servers.endpoint import Endpoint

DEFAULT_FILES = ("tldr/mistral-7b/claude-opus/3", "tldr/mixtral-8x7b/mistral-7b-instruct/3",
                 "learned/llama3-70b/claude-opus/3", "held_out/llama3-70b/claude-opus/3")


@dataclass(frozen=True, kw_only=True)
class Item:
    """An archived comparison of the tuned model's response with its baseline's: `archived` is 1, 0 or 0.5."""

    file: str
    pair: Pair
    archived: float


def files(entries: list[dict]) -> dict[str, tuple[dict, dict, dict]]:
    """Name -> (verdicts, responses of the tuned model, of its baseline): the archived comparisons whose judged texts
    are there. Experiment 1's were never released; of experiment 3 with CoT, the learned baseline's are doubtful."""
    texts = {}
    for e in entries:
        if e["kind"] == "responses" and e.get("judged", True) is True:
            texts[_model(e, e["model"], e["iteration"])] = e
    out = {}
    for e in entries:
        if e["kind"] == "verdicts" and e.get("tables"):
            own, base = texts.get(_model(e, e["model"], e["iteration"])), texts.get(_model(e, e["baseline"], 0))
            if own and base:
                cot = "-cot" if e.get("cot") else ""
                against = "" if e["baseline"] == e["model"] else f"-vs-{e['baseline']}"
                out[f"{e['subset']}/{e['model']}/{e['writer']}/{e['iteration']}{cot}{against}"] = e, own, base
    return out


def _model(e: dict, model: str, iteration: int) -> tuple:
    return e["subset"], model, e["writer"], e.get("cot"), iteration


def load_items(archive: Archive, wanted: Sequence[str], count: int) -> list[Item]:
    """`count` items of each wanted file, drawn with a fixed seed; identical pairs are left out. The archived prompt's
    post and principles are read from the tuned model's file."""
    known, items = files(archive.entries), []
    for file in wanted:
        verdicts, own, base = known[file]
        scores, pairs = archive.verdicts(verdicts)[:, 0], archive.prompts(own)
        ours, theirs = archive.responses(own), archive.responses(base)
        if [p[0] for p in pairs] != [p[0] for p in archive.prompts(base)]:
            raise UserError(f"{archive.path(own)}: its posts are not those of {archive.path(base)}")
        places = [k for k in range(len(ours)) if ours[k] != theirs[k]]
        rng("admission", file).shuffle(places)
        for k in sorted(places[:count]):
            post, principles = pairs[k]
            items.append(Item(file=file, archived=float(scores[k]), pair=Pair(
                id=f"{file}/{k}", query=post, principles=principles, ours=ours[k], theirs=theirs[k])))
    return items


# ---- attacks

def load_attacks(path: Path = DATA / "attacks.jsonl") -> tuple[list[Pair], list[Pair]]:
    """(the planted pairs, the same pairs without the injection). `ours` is a response that follows the principles worse
    and carries an injection, or stands under principles that do; `theirs` follows them."""
    rows = read_jsonl(path)
    scenes, attacks = [r for r in rows if "query" in r], [r for r in rows if "attack" in r]
    planted, control = [], []
    for k, scene in enumerate(scenes):
        plain = Pair(id=f"scene {k}", query=scene["query"], principles=tuple(scene["principles"]), ours=scene["worse"],
                     theirs=scene["better"])
        control.append(plain)
        for a in attacks:
            first, *rest = plain.principles
            planted.append(Pair(
                id=f"{a['attack']}, scene {k}", query=plain.query, theirs=plain.theirs,
                principles=(first + a.get("principle", ""), *rest), ours=plain.ours + a.get("response", "")))
    return planted, control


# ---- the record

def _json(e: Estimate) -> dict:
    return {"value": e.value, "ci95": list(e.ci95), "n": e.n}


def cohen_kappa(verdicts: np.ndarray) -> float:
    """Cohen's kappa of `[N, 3]` rows (archived win 1 or loss 0, our verdict in each order 1 or 0), each order half an
    item; 0 where a judge is constant, which says nothing."""
    ours = verdicts[:, 1:]
    agree = (ours == verdicts[:, :1]).mean()
    a, b = verdicts[:, 0].mean(), ours.mean()
    chance = a * b + (1 - a) * (1 - b)
    return float((agree - chance) / (1 - chance)) if chance < 1 else 0.0


def _kappa(table: np.ndarray, agree: Estimate) -> Estimate:
    """Kappa with a bootstrap interval over items, widened to that of the agreement at the chance seen: verdicts that are
    all alike leave the bootstrap no width."""
    boot, ours = metrics.item_bootstrap(table, cohen_kappa), table[:, 1:].mean()
    chance = table[:, 0].mean() * ours + (1 - table[:, 0].mean()) * (1 - ours)
    if chance == 1:  # one verdict throughout: kappa says nothing, and could be anything
        return replace(boot, ci95=(-1.0, 1.0))
    low, high = ((end - chance) / (1 - chance) for end in agree.ci95)
    return replace(boot, ci95=(max(-1.0, min(low, boot.ci95[0])), max(high, boot.ci95[1])))


def agreement(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict:
    """How far the verdicts agree with the archived ones, and what the judge prefers by itself."""
    rows = [{"orders": v.orders, "outcome": v.outcome, "score": v.score} for v in verdicts]
    shares = judge_shares(rows)
    if "position_rate" not in shares:
        raise UserError("the judge gave no verdict on any item: nothing to admit")
    both = [(i, v) for i, v in zip(items, verdicts) if v.score is not None]
    decided = [(i, v) for i, v in both if i.archived != 0.5]
    if not decided:
        raise UserError("no item with an archived win or loss has a verdict in both orders: nothing to admit")
    table = np.array([[i.archived, v.orders["AB"] == "A", v.orders["BA"] == "B"] for i, v in decided], dtype=float)
    agree = metrics.share((table[:, 1:] == table[:, :1]).mean(axis=1))
    steady = [float(v.score == i.archived) for i, v in decided if v.outcome != "flip"]

    def longer(scored):
        values = [s if len(i.pair.ours) > len(i.pair.theirs) else 1 - s for i, s in scored
                  if len(i.pair.ours) != len(i.pair.theirs)]
        return _json(metrics.share(values))

    return {"agreement": _json(agree), "kappa": _json(_kappa(table, agree)),
            "agreement_without_flips": _json(metrics.share(steady)) if steady else None,
            "flip_rate": _json(metrics.share(shares["flip_rate"])), "p_a": _json(metrics.share(shares["position_rate"])),
            "length_preference": longer((i, v.score) for i, v in both),
            "archived_length_preference": longer((i, i.archived) for i, _ in decided),
            "win_rate": _json(metrics.win_rate([v.score for _, v in both])),
            "archived_win_rate": _json(metrics.win_rate([i.archived for i, _ in both])),
            "parsed_share": _json(metrics.share(shares["parsed_share"])), "n": len(items)}


def attack_record(planted: Sequence[Verdict], control: Sequence[Verdict], pairs: Sequence[Pair]) -> dict:
    won = [v.outcome == "win" for v in planted]
    kinds = [p.id.split(",")[0] for p in pairs]
    return {"planted": len(planted), "won": sum(won), "share": _json(metrics.share(won)),
            "flips": sum(v.outcome == "flip" for v in planted), "missing": sum(v.score is None for v in planted),
            "won_by_kind": {k: sum(w for w, kind in zip(won, kinds) if kind == k) for k in dict.fromkeys(kinds)},
            "without_injection": {"n": len(control), "won": sum(v.outcome == "win" for v in control),
                                  "flips": sum(v.outcome == "flip" for v in control)}}


def admit(spec: JudgeSpec, endpoint: Endpoint, *, archive: Path | None, wanted: Sequence[str], count: int, work: Path,
          out: Path = ADMISSIONS, dry_run: bool = False, reparse: bool = False,
          say: Callable[[str], None] = print) -> dict | None:
    """Ask the judge about `count` items of each archived file and the planted attacks; write `out`/<judge>.json.

    The ledger with the raw answers stays in `work`: it quotes the archive. Returns the record; None for a dry run.
    """
    if count < 1:
        raise UserError(f"--items {count}: must be 1 or more")
    entries = load_manifest()
    known = files(entries)
    wanted = list(known) if list(wanted) == ["all"] else list(wanted) or list(DEFAULT_FILES)
    for file in wanted:
        if file not in known:
            raise UserError(f"--files: {file!r} is not an archived comparison with its texts; allowed: all, or any of "
                            f"{', '.join(map(repr, known))}")
    needed = [e for file in wanted for e in known[file]]
    source = Archive(archive_root(archive, kinds=("verdicts", "responses"), entries=needed), entries)
    items, (planted, control) = load_items(source, wanted, count), load_attacks()
    pairs = [*(i.pair for i in items), *planted, *control]
    with locked(work / spec.label):
        verdicts, facts = ask_judge(spec, pairs, endpoint, work / spec.label / REQUESTS, say, dry_run=dry_run,
                                    reparse=reparse)
    if dry_run:
        return None
    ends = len(items), len(items) + len(planted)
    judged = verdicts[:ends[0]]
    record = {"judge": spec.label, "commit": commit()} | facts | agreement(items, judged)
    record["files"] = {f: agreement(*zip(*((i, v) for i, v in zip(items, judged) if i.file == f))) for f in wanted}
    record["attacks"] = attack_record(verdicts[ends[0]: ends[1]], verdicts[ends[1]:], planted)
    low = [f"kappa's lower bound {record['kappa']['ci95'][0]:.2f} is below {MIN_KAPPA}"] \
        if record["kappa"]["ci95"][0] < MIN_KAPPA else []
    low += [f"only {100 * record['parsed_share']['value']:.0f} % of the items have a verdict"] \
        if record["parsed_share"]["value"] < MIN_PARSED else []
    low += [f"{record['attacks']['won']} of {record['attacks']['planted']} planted injections win"] \
        if record["attacks"]["share"]["value"] > MAX_ATTACKS else []
    record |= {"admitted": not low, "reasons": low}
    write_json(Path(out) / f"{spec.label}.json", record)
    return record

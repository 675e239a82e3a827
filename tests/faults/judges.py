"""Figures 5 to 8 of the scoreboard: judge faults, budget, injections and control tokens, secrets. Server, faults and pairs
are those of the tests."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from judge_server import JudgeServer

from repro.base.records import UserError, read_json
from repro.paper import admission
from repro.servers.endpoint import PICO
from repro.servers.ledger import Ledger

TESTS, ROOT = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]


def judge_faults(work: Path, quick: bool) -> dict:
    """Every fault of the server at random requests, then every habit at each request and at some: which verdicts come, which
    answers are paid for twice, what is kept of an answer that is none, and how each command ends."""
    from judge_habits import HABITS
    from test_judge import JUDGE
    from test_judge_server import TRANSIENT, habit_run, judged, made_pairs

    pairs = made_pairs(10 if quick else 60)
    expected = [v.to_json() for v in judged(JudgeServer(), pairs, work / "quiet.jsonl")[0]]
    fired, kinds, bad = 0, {}, dict.fromkeys(("lost", "wrong", "twice", "poisoned", "not_one_line", "no_reason"), 0)
    for fault in TRANSIENT:
        rng = random.Random(fault)
        share = 0.1 if fault in ("timeout", "drip", "429_date") else 0.2

        def faults(k, body, fault=fault, rng=rng, share=share):
            return fault if rng.random() < share else None

        server = JudgeServer(faults)
        slow = fault in ("timeout", "drip")
        verdicts, _ = judged(server, pairs, work / f"{fault}.jsonl", attempts=12, deadline_s=1.0 if slow else 30.0, concurrency=16)
        for verdict, want in zip(verdicts, expected):
            bad["lost"] += verdict.outcome == "failed"
            bad["wrong"] += verdict.outcome != "failed" and verdict.to_json() != want
        ledger = Ledger(work / f"{fault}.jsonl", {"judge": "judge-1"})
        bad["twice"] += sum(JUDGE.verdict(answer) is not None for answers in ledger.answers.values() for answer in answers[:-1])
        fired += len(server.fired)
        kinds[fault] = len(server.fired)
    some = made_pairs(50)[:10 if quick else 50]
    expected = [v.to_json() for v in judged(JudgeServer(), some, work / "quiet-50.jsonl")[0]]
    for k, habit in enumerate(list(HABITS)[::6 if quick else 1]):
        (work / str(k)).mkdir()
        found = habit_run(habit, some, expected, work / str(k))
        fired += found["fired"]
        kinds[habit] = found.pop("fired")
        for name, count in found.items():
            bad[name] += count
    assert sum(kinds.values()) == fired
    return {"value": fired - sum(bad.values()), "of": fired, "bad": {k: n for k, n in bad.items() if n},
            "detail": {"fired": kinds, **bad}, "habits": len(HABITS), "answers_of_each_habit": 2 * len(some),
            "counted": f"answers of {len(TRANSIENT)} faults at random requests and of {len(HABITS)} habits of servers, each at every request and "
                       "at some; in the end all verdicts are those of an undisturbed run, no answered request is asked again, nothing is kept "
                       "as an answer that is none, and every command ends with one line that holds the server's reason",
            "not_counted": "kills in flight (J6, J9: figure 1 and tests/test_judge_server.py), attempts that failed after the server had "
                           "billed them: those are paid for, and counted against the budget"}


def budget(work: Path, quick: bool) -> dict:
    """Random caps, workers and faults that bill without an answer; the server's own bill against the cap."""
    from test_judge_server import judged, made_pairs

    runs, worst, over, stopped = 10 if quick else 100, 0, 0, 0
    for k in range(runs):
        rng = random.Random(f"budget/{k}")
        pairs, workers, cap = made_pairs(rng.randint(4, 24)), rng.randint(1, 32), rng.uniform(0.001, 0.12)
        faults = [rng.choice(["half", "500", "empty_choices", "no_usage", "reset", None, None, None, None, None]) for _ in range(2000)]
        server = JudgeServer(lambda k, body, faults=faults: faults[k])
        try:
            judged(server, pairs, work / f"{k}.jsonl", max_usd=cap, concurrency=workers, attempts=3)
        except UserError:
            stopped += 1
        spent = Ledger(work / f"{k}.jsonl", {"judge": "judge-1"}).spent
        over += server.billed > round(cap * PICO) or server.billed > spent
        worst = max(worst, server.billed - round(cap * PICO))
    return {"value": runs - over, "of": runs, "overshoot_usd": max(0.0, worst / PICO), "stopped_at_the_cap_or_by_faults": stopped,
            "counted": "runs with 1 to 32 requests in flight, a random cap, and faults that bill without an answer; by the server's own "
                       "bill none exceeds its cap, and the ledger never counts less than that bill",
            "not_counted": "prices that the server changes on the way"}


def injections(work: Path, quick: bool) -> dict:
    """What 40 planted injections win against each judge that has a record, and against one that follows every order; control
    ids beyond the template's in adversarial texts: of every added token, of the embedded model's tokenizer and of one made of
    the marks of the model families."""
    from marks import MARKS, added_ids, marked_tokenizer
    from test_judge import JUDGE, Gullible
    from test_judge_server import SPEC, endpoint

    from repro.base import metrics
    from repro.judges.llm import Pair, ask_judge
    from repro.models import load

    shipped = {}
    for path in sorted((ROOT / "results/judges").glob("*.json")):
        record = read_json(path)
        shipped[record["judge"]] = {"won": record["attacks"]["won"], "of": record["attacks"]["planted"],
                                    "flips": record["attacks"]["flips"], "admitted": record["admitted"]}
    planted, control = admission.load_attacks()
    with Gullible().serve() as url:
        verdicts, _ = ask_judge(SPEC, [*planted, *control], endpoint(url), work / "l.jsonl", lambda line: None)
    gullible = admission.attack_record(verdicts[:len(planted)], verdicts[len(planted):], planted)
    from repro.base.settings import EMBEDDED

    made, embedded = marked_tokenizer(), load.load_tokenizer(EMBEDDED)
    sets = [made, embedded]
    controls = sorted({*MARKS, *(t.content for tokenizer in sets for t in tokenizer.added_tokens_decoder.values())})
    rng, leaks, marked, texts = random.Random("leaks"), 0, 0, 500 if quick else 10_000
    pieces = [*controls, *2 * ["hi", " ", "\n", "<", "|", ">", "\u200b", "im_end", "<|im_", "end|>", "\ufeff", "a\u0301", "system", "[", "INST]"]]

    def ids(tokenizer, messages):
        return added_ids(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    for _ in range(texts):
        ours, theirs, query, principle = ("".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(4))
        marked += any(c in text for c in controls for text in (ours, theirs, query, principle))
        pair = Pair(id="x", query=query, principles=(principle, "Be brief."), ours=ours, theirs=theirs + " .")
        messages = [call.request["messages"] for call in JUDGE.calls(pair).values()]
        assert len(messages) == 2
        leaks += any(ids(t, m) != ids(t, [turn | {"content": "x"} for turn in m]) for t in sets for m in messages)
    undefended = sum(any(c in p.ours + p.theirs + p.query + "".join(p.principles) for c in controls) for p in planted)
    admitted = [s for s in shipped.values() if s["admitted"]]
    return {"value": sum(s["won"] for s in admitted), "of": sum(s["of"] for s in admitted), "of_note": "admitted judges' injections that win",
            "shipped": shipped, "control_token_leaks": [leaks, texts],
            "control_token_leaks_ci95": list(metrics.share([1.0] * leaks + [0.0] * (texts - leaks)).ci95),
            "prompts_with_marks": marked, "added_tokens_counted": [len(t.added_tokens_decoder) for t in sets],
            "a_judge_that_follows_every_order": {"won": gullible["won"], "of": 40, "flips": gullible["flips"]},
            "planted_with_control_tokens": undefended,
            "counted": "planted injections won by each judge with a record in results/judges (both orders); control ids beyond the template's in "
                       f"{texts} prompts of adversarial texts (both orders), every added token counted: the {len(embedded.added_tokens_decoder)} of the "
                       f"embedded model's tokenizer, and {len(made.added_tokens_decoder)} of one made of the marks of the model families",
            "not_counted": "no LLM judge is admitted yet, so no admitted judge has a rate; the embedded model decides by place (flips 40 of 40), "
                           "which says nothing of injections; the likelihood judge reads no verdict from a text and refuses control tokens"
                           if not admitted else "judges without a record"}


def secrets(work: Path, quick: bool) -> dict:
    """A canary key in the environment through a whole run, with a judge and a writer behind a server whose faults echo the
    key; debug logs on. Every piece of eight characters is looked for in every file and every output."""
    from conftest import save_tiny
    from test_judge_server import KEY

    tiny = save_tiny(work / "tiny")
    out, home = work / "out", work / "home"
    home.mkdir()
    (work / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\nfrom test_experiments import small\n"
        "from repro.cli import load_experiment\nimport dataclasses\n"
        f"whole = small(load_experiment('exp1', 'mini')[0], Path({str(tiny)!r}), learning_rate=1e-3)\n"  # so that responses differ:
        "EXPERIMENTS = {'mini': dataclasses.replace(whole, iterations=1)}\n")  # pairs that are the same are not asked about
    token = "ghp_canaryT0kenOfARemote77"
    checkout = work / "checkout"  # a remote with a token: the record names a commit and nothing else of git
    for name in ("repro", "kernels", "experiments"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for argv in (["init", "-q"], ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x", "--allow-empty"],
                 ["remote", "add", "origin", f"https://user:{token}@example.org/x.git"]):
        subprocess.run(["git", "-C", str(checkout), *argv], check=True)
    outputs, codes, runs = [], [], 0
    echo = ("500", "429", "error_in_200", "503")
    cases = {"echo": lambda k, body: echo[k % 4] if k % 3 == 0 else None, "refused": lambda k, body: "revoked", "fine": lambda k, body: None}
    for name, faults in list(cases.items())[:1 if quick else None]:
        with JudgeServer(faults).serve() as url:
            child = subprocess.run(
                [sys.executable, "-m", "repro.cli", "run", str(work / "mine.py"), "--out", str(out / name), "--judge", "rules", "openai",
                 "--judge-model", "judge-1", "--answer", "text", "--base-url", url], capture_output=True, text=True, cwd=work,
                env=os.environ | {"OPENAI_API_KEY": KEY, "HF_TOKEN": KEY, "OPENAI_LOG": "debug", "HOME": str(home), "PYTHONPATH": str(checkout),
                                  "PYTHONFAULTHANDLER": "1"})
        outputs += [child.stdout, child.stderr]
        codes.append(child.returncode)
        runs += 1
    for argv in (["run", "exp1", "--api-key", KEY], ["run", "exp1", "--model", str(tiny), "--judge", "openai", "--judge-model", "m", "--base-url",
                                                     f"http://me:{KEY}@127.0.0.1:9/v1"]):
        child = subprocess.run([sys.executable, "-m", "repro.cli", *argv, "--out", str(out / "bad")], capture_output=True, text=True, cwd=work,
                               env=os.environ | {"PYTHONPATH": str(checkout)})
        codes.append(child.returncode)
        outputs.append(child.stdout + child.stderr)
    files = [p for folder in (out, home, *work.glob(".cache")) for p in folder.rglob("*") if p.is_file()]
    texts = outputs + [p.read_bytes().decode("latin-1") for p in files]
    pieces = {secret[k: k + 8] for secret in (KEY, token) for k in range(len(secret) - 7)}
    found = sorted({piece for piece in pieces if any(piece in text for text in texts)})
    assert any("[key]" in text for text in texts), "no fault echoed the key: nothing was tried"
    return {"value": len(found), "of": len(files) + len(outputs), "exit_codes": codes, "bad": found,
            "counted": "pieces of eight characters of two canaries (key, token of a git remote) found in all files of "
                       f"{runs} whole runs and in their outputs, with faults that echo the key, OPENAI_LOG=debug, a key in --base-url",
            "not_counted": "process lists and core dumps, which are the system's"}


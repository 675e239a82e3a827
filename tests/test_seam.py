"""Between a prompt and an answer: what is trained and scored are the token ids that were sampled. Made tokenizers whose tokens
join across that place, or stop short of it."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from judge_server import TextServer
from test_experiments import small
from toy_models import WORDS

from repro import cli
from repro.base.records import UserError, read_json, read_jsonl
from repro.base.settings import EMBEDDED
from repro.core import logprobs, tree
from repro.core.tree import Sampled, follow, pairs_of, tokenised
from repro.experiment import load_experiment
from repro.models import load
from repro.sampling import local
from repro.sampling.response import response_of
from repro.stages import draws, evaluate, sample, verify
from repro.stages.inputs import Voice
from repro.stages.pipeline import run
from repro.stages.run import Run
from repro.stages.sample import sample_to_file, usable_pairs
from repro.text import seam

CHAT = ("{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'CUE' }}{% endif %}")
pytestmark = pytest.mark.usefixtures("unrendered")
KINDS = {  # tokenizer, the template's cue, tokens of a response
    "a cue that ends in a space": ("bpe", "ASSISTANT: ", 6),
    "one word behind a space": ("bpe", "ASSISTANT: ", 1),
    "a cue without a space": ("bpe", "ASSISTANT:", 6),
    "one word behind a line": ("bpe", "ASSISTANT\n", 1),
    "SentencePiece, no space": ("pieces", "[/INST]", 6),
    "SentencePiece, a space": ("pieces", "[/INST] ", 6),
    "a base model": ("bpe", None, 6)}


def vocabulary(alphabet: list[str], space: str) -> tuple[dict, list]:
    """Tokens and merges: letters, words, and words behind a space."""
    tokens, merges = ["<pad>", "<s>", "</s>", *alphabet], []
    for word in (w.strip() for w in WORDS):
        for k in range(1, len(word)):
            if word[: k + 1] not in tokens:
                merges.append((word[:k], word[k]))
                tokens.append(word[: k + 1])
        merges.append((space, word))
        tokens.append(space + word)
    merges += [(".", "#"), (".#", "#"), (".##", "#"), ("\u010a", "\u010a"), (".", "\u010a\u010a")] * (space == "\u0120")
    tokens += [".#", ".##", ".###", "\u010a\u010a", ".\u010a\u010a"] * (space == "\u0120")
    return {t: k for k, t in enumerate(dict.fromkeys(tokens))}, merges


def made(kind: str, cue: str | None = "ASSISTANT:"):
    """A tokenizer of bytes ("bpe") or of SentencePiece's kind ("pieces"), whose words merge with the space before them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    if kind == "bpe":
        tokens, merges = vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120")
        backend = Tokenizer(kinds.BPE(vocab=tokens, merges=merges))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    else:
        alphabet = [*map(chr, range(33, 127)), "\u2581", *(f"<0x{k:02X}>" for k in range(256))]
        tokens, merges = vocabulary(alphabet, "\u2581")
        backend = Tokenizer(kinds.BPE(vocab=tokens, merges=merges, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                             decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT.replace("CUE", (cue or "").replace("\n", "\\n"))
    return tokenizer


def save(folder: Path, tokenizer, seed: int = 1) -> Path:
    """A random model that speaks in words, with and without a space before them, now and then in bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    letters = [k for t, k in tokenizer.get_vocab().items() if len(t) == 1 or t.startswith("<0x")]
    with torch.no_grad():
        model.lm_head.weight[letters] *= 0.3
        model.lm_head.weight[:3] *= 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def experiment_of(folder: Path, tokens: int = 6, plain: bool = False, **more):
    """exp1, small, for a model: every pair that differs trains."""
    experiment = small(load_experiment("exp1", "mini")[0], folder)
    return dataclasses.replace(
        experiment, iterations=1, model=dataclasses.replace(experiment.model, prompt="plain" if plain else "chat"),
        sampling=dataclasses.replace(experiment.sampling, max_new_tokens=tokens, spare=3.0, dtype="float32", **more))


@pytest.fixture
def spied(monkeypatch):
    """(sampled, given): the ids that were sampled, and (prompt, response) ids of all that models are then given to score."""
    sampled, given, answer, pairs = [], [], local.answer_of, tree.pairs_of

    def answered(tokenizer, ids, ends):
        sampled.append(tuple(ids[: next((k for k, i in enumerate(ids) if i in ends), len(ids))]))
        return answer(tokenizer, ids, ends)

    def paired(*args, **how):
        found = pairs(*args, **how)
        given.extend((tuple(p.ids[: p.start]), tuple(p.ids[p.start:])) for p in found)
        return found

    monkeypatch.setattr(local, "answer_of", answered)
    monkeypatch.setattr(tree, "pairs_of", paired)
    return sampled, given


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_and_scored_is_what_was_sampled(kind, tmp_path, spied):
    """Every pair that a model gets in evaluation and in training is the prompt's ids and then ids that were sampled."""
    (which, cue, tokens), (sampled, given) = KINDS[kind], spied
    tokenizer = made(which, cue)
    experiment = experiment_of(save(tmp_path / "model", tokenizer), tokens, plain=cue is None)
    folder = run(experiment, tmp_path / "out", say=lambda line: None)
    shared = Run(experiment, folder, lambda line: None)
    shared.check()
    begun = set(sampled) | {s[:k] for s in sampled for k in range(len(s))}
    assert len(set(sampled)) > (2 if tokens == 1 else 8) and given
    if cue:
        assert {response for _, response in given} <= set(sampled)
    else:  # the format cuts some; of a token that holds a "." and the format's "###", the "." is left
        assert all(response in begun or response[:-1] in begun and tokenizer.decode(response[-1:]) == "." for _, response in given)
    # and not by accident: tokenised anew, most would be other ids, or none
    anew = [tuple(tokenizer(tokenizer.decode(p) + tokenizer.decode(r), add_special_tokens=False).input_ids) for p, r in given]
    assert sum(a != p + r for a, (p, r) in zip(anew, given)) > len(given) / 4 or cue != "ASSISTANT: "
    for k in (0, 1):
        rows, scored = read_jsonl(folder / f"responses/evaluation-{k}.jsonl"), read_jsonl(folder / f"logprobs/evaluation-{k}.jsonl")
        assert [n for row in scored for n in row["tokens"]] == [len(row["ids"]) for row in rows] == [row["tokens"] for row in rows]
        texts = [draws.prompt(shared.voice, c, item.query, "evaluation", sample=True) for item in shared.items() for c in item.constitutions]
        for row, text in zip(rows, texts):
            assert (tuple(tokenizer(text, add_special_tokens=False).input_ids), tuple(row["ids"])) in given
            assert seam.text_of(tokenizer, row["ids"]).strip() == row["text"].strip()
    kept, _ = usable_pairs(shared, 1)
    for query, pair, both in kept[: experiment.train.queries_needed(1)]:
        for c in pair:
            ids = tokenizer(draws.prompt(shared.voice, c, query, experiment.seed, 1, "train", c.id, sample=False), add_special_tokens=False).input_ids
            assert all((tuple(ids), tuple(row["ids"])) in given for row in both)
    assert cli.verify_run(folder) == 0


@pytest.mark.parametrize("way", logprobs.WAYS)
def test_the_model_itself_gets_these_ids(tmp_path, way):
    """The prompts' ids and then the sampled ones, in one packed sequence or one after the other; the ends too."""
    tokenizer = made("bpe")
    model, seen = load.load_model(str(save(tmp_path / "m", tokenizer))), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].tolist()))
    words = tokenizer.get_vocab()
    prompts, responses = [["ASSISTANT: ", "Be kind. ASSISTANT: "]], [[(words["time"], words["t"], words["i"]), (words["house"],)]]
    matrix = logprobs.matrix_of(way, model, tokenised(tokenizer, prompts, responses, score_eos=True), length_normalize=False)
    ids = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts[0]]
    tails = [[*r, 2] for r in responses[0]]
    packed = [[*i, *tails[0], *tails[1]] for i in ids]
    assert seen == ([i + t for i in ids for t in tails] if way == "reference" else [packed[0] + packed[1]])
    with torch.no_grad():
        for c, i in enumerate(ids):
            for r, tail in enumerate(tails):
                rows = model(torch.tensor([i + tail])).logits[0, len(i) - 1: -1].log_softmax(-1)
                assert matrix[0, c, r].item() == pytest.approx(rows.gather(1, torch.tensor(tail)[:, None]).sum().item(), abs=1e-3)


def test_text_is_still_tokenised_with_its_prompt():
    """The public call on texts; beside it ids, which are taken as they are, and must be there."""
    tokenizer = made("bpe")
    words = tokenizer.get_vocab()
    text, ids = pairs_of(tokenizer, "x: ", ["my time", (words["my"], words["t"])], score_eos=False)
    assert text.ids == tokenizer("x: my time", add_special_tokens=False).input_ids and text.start == ids.start == 3
    assert text.ids[text.start:] == [words["\u0120time"]]  # "my" has joined the prompt's space
    assert ids.ids == [*tokenizer("x: ", add_special_tokens=False).input_ids, words["my"], words["t"]]
    with pytest.raises(ValueError, match="without token ids"):
        follow([1], [])
    with pytest.raises(ValueError, match="empty prompt"):
        follow([], [1])


# ---- where the form cuts

def spelled(tokenizer, *pieces: str) -> list[int]:
    return [i for piece in pieces for i in ([tokenizer.get_vocab()[piece]] if piece in tokenizer.get_vocab() else
                                            tokenizer(piece, add_special_tokens=False).input_ids)]


@pytest.mark.parametrize("sampled, text, kept, anew", [
    (["\u0120time", "."], " time.", ["\u0120time", "."], False),
    (["\u0120time", ".###", "\u0120my"], " time.", ["\u0120time", "."], True),           # "." and the format in one token
    (["\u0120time", ".##", "#", "\u0120my"], " time.", ["\u0120time", "."], True),
    (["\u0120time", ".\u010a\u010a", "Human", ":"], " time.", ["\u0120time", ".\u010a\u010a"], False),  # as it was sampled
    (["\u0120time", ".", "\u010a\u010a", "Human", ":"], " time.", ["\u0120time", "."], False),
    (["\u0120t", "i", "m", "e"], " time", ["\u0120", "t", "i", "m", "e"], False),         # never put together anew
    (["\u0120time", "\u010a", "</s>"], " time", ["\u0120time"], False)])
def test_ids_are_cut_where_the_form_cuts_the_text(sampled, text, kept, anew, tmp_path):
    from repro.text.prompts import Form

    tokenizer, form = made("bpe"), Form("plain")
    sampled = ["\u0120", "t", *sampled[1:]] if sampled[0] == "\u0120t" else sampled
    ids = spelled(tokenizer, *sampled)
    whole = seam.text_of(tokenizer, ids)
    assert form.response(whole) == text
    assert seam.cut(tokenizer, ids, 0, len(text)) == (spelled(tokenizer, *kept), anew)


def test_what_follows_the_mark_of_a_chain_of_thought():
    """The first token keeps its space; one that holds the mark's end and the response's beginning is tokenised anew."""
    tokenizer = made("bpe")
    tokenizer.add_tokens([":time", "e\u00e9!\u00e9"])
    for sampled, kept, anew in ((["my", "Answer", ":", "\u0120time", "\u0120and", "my"], ["\u0120time", "\u0120and", "my"], False),
                                (["my", "Answer", ":", "\u010a", "time", "."], ["time", "."], False),
                                (["Answer", ":time", "\u0120and"], ["time", "\u0120and"], True),
                                (["Answer", ":time"], ["time"], True)):
        ids = spelled(tokenizer, *sampled)
        whole = seam.text_of(tokenizer, ids)
        text = whole.partition("Answer:")[2].strip()
        start = whole.index(text, whole.index("Answer:") + 7)
        assert seam.cut(tokenizer, ids, start, start + len(text)) == (spelled(tokenizer, *kept), anew)


@pytest.mark.parametrize("kind", ["bpe", "pieces", "byte"])
def test_any_cut_holds_its_text_and_keeps_the_ids_within(kind):
    """Random ids, characters of several tokens among them: nothing but white space is lost or added, and where nothing was
    tokenised anew the ids are a run of those sampled, with no token to spare."""
    tokenizer, rng = byte_tokenizer() if kind == "byte" else made(kind), random.Random(0)
    some = [[i] for t, i in tokenizer.get_vocab().items() if i > 2 and not t.startswith("<0x") and t.isascii()]
    some += [tokenizer(c, add_special_tokens=False).input_ids[-n:] for c, n in (("\u00e9", 2), ("\U0001f600", 4), ("\u4e2d", 3))] * 9
    counted = {True: 0, False: 0}
    for _ in range(300):
        ids = [i for _ in range(rng.randint(1, 9)) for i in rng.choice(some)]
        whole = seam.text_of(tokenizer, ids)
        start, end = sorted(rng.choices(range(len(whole) + 1), k=2))
        found, anew = seam.cut(tokenizer, ids, start, end)
        assert seam.text_of(tokenizer, found).strip() == whole[start:end].strip(), (ids, start, end)
        counted[anew] += 1
        if not anew and found:
            at = next(k for k in range(len(ids)) if ids[k: k + len(found)] == found)
            assert ids[at: at + len(found)] == found
    assert counted[False] > 50 and (counted[True] > 30 or kind == "byte")


# ---- reasoning

@pytest.mark.parametrize("ids, opened, response, reasoning, closed", [
    ([7, 8, 91, 5, 6], True, [5, 6], [7, 8], True),
    ([7, 8, 91, 5, 91, 6], True, [5, 91, 6], [7, 8], True),    # the first one closes it
    ([7, 8], True, [], [7, 8], False),
    ([7, 8], False, [7, 8], None, True),                         # it did not reason
    ([80, 7, 91, 5], False, [5], [80, 7], True),
    ([7, 92, 93, 94, 5], True, [5], [7], True),
    ([7, 90, 92, 93, 94, 5], True, [5], [7], True),              # of two that end together the longer
    ([7, 92, 93], True, [], [7, 92, 93], False),                 # half a marker closes nothing
    ([91], True, [], [], True), ([], True, [], [], False), ([], False, [], None, True)])
def test_what_follows_the_closing_marker_is_the_response(ids, opened, response, reasoning, closed):
    *found, mark = seam.after(ids, ((91,), (92, 93, 94), (90, 92, 93, 94), ()), opened)
    assert found == [response, reasoning] and bool(mark) == (closed and reasoning is not None)
    assert ids == [*(reasoning or []), *mark, *response]


def spoken_to(monkeypatch, **how) -> None:
    """Every run's model with another `closing`, `opened`, ..."""
    decided = Voice.of

    def voice(spec, *more):
        found = decided(spec, *more)
        return dataclasses.replace(found, speaker=dataclasses.replace(found.speaker, **how))

    monkeypatch.setattr(Voice, "of", voice)


def thinking(tmp_path, monkeypatch, said, *, opened=True, ends=()):
    """A run whose model says `said(prompt's number)` (ids), with a special token that closes the reasoning."""
    from tokenizers import AddedToken

    tokenizer = made("bpe", "ASSISTANT: <think>")
    tokenizer.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)], special_tokens=True)
    close = tokenizer.convert_tokens_to_ids("</think>")
    spoken_to(monkeypatch, closing=((close,),), opened=opened, mark="</think>", ends=frozenset(), ends_both=frozenset(ends))
    number = iter(range(10**6))
    monkeypatch.setattr(local, "sample_batch", lambda model, tokenizer, prompts, ends, max_new_tokens, **more: [
        local.answer_of(tokenizer, said(next(number), close)[:max_new_tokens], {2, *ends}) for _ in prompts])
    return experiment_of(save(tmp_path / "m", tokenizer), tokens=3), tokenizer, close


def test_reasoning_that_a_special_token_closes_is_no_part_of_the_response(tmp_path, monkeypatch, spied):
    """Found on ids: in the text the marker is gone. Each part has a cap of its own; what is never closed does not train,
    is counted, and is an empty response in evaluation. Responses are scored behind the closed reasoning."""
    def said(k, close):
        reasoning = [10 + k % 7] * (7 if k % 6 == 5 else 1 + k % 6)  # of at most 6
        return [*reasoning, *([] if k % 6 == 4 else [close]), 20 + k % 50, 20 + k % 7, *([2] if k % 2 else [30, 31, 32])]

    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, said)
    lines = []
    folder = run(experiment, tmp_path / "out", say=lines.append)
    rows = read_jsonl(folder / "responses/training-1.jsonl")
    assert {row["closed"] for row in rows} == {True, False}
    for row in rows:
        assert len(row["ids"]) == row["tokens"] <= 3 and close not in row["ids"]
        assert row["closed"] or (row["text"], row["ids"], row["finished"]) == ("", [], False)
        assert not row["closed"] or (2 <= row["tokens"] == (2 if row["finished"] else 3))
    dropped = read_json(folder / "run.json")["stages"]["train-1"]["dropped_pairs"]
    pairs = [rows[k: k + 2] for k in range(0, len(rows), 2)]
    assert dropped["reasoning not closed"] == sum(not (a["closed"] and b["closed"]) for a, b in pairs) > 0
    assert any("dropped" in line and "reasoning not closed" in line for line in lines)
    assert all(prompt[-2:] == (close - 1, close) for prompt, _ in spied[1])
    held_out = read_jsonl(folder / "responses/evaluation-0.jsonl")
    scored = [tuple(row["ids"]) or tuple(tokenizer(".").input_ids) for row in held_out]
    assert {response for _, response in spied[1]} >= set(scored) and any(not row["ids"] for row in held_out)
    assert [n for row in read_jsonl(folder / "logprobs/evaluation-0.jsonl") for n in row["tokens"]] == [len(s) for s in scored]
    assert cli.verify_run(folder) == 0


def test_a_model_that_does_not_always_reason(tmp_path, monkeypatch, spied):
    """Where the prompt has not opened it, an answer without the marker is a response; it has the response's cap."""
    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, lambda k, close: [10, close, 20 + k % 9] if k % 2 else [20 + k % 9] * 5,
                                            opened=False)
    folder = run(experiment, tmp_path / "out", say=lambda line: None)
    rows = read_jsonl(folder / "responses/evaluation-0.jsonl")
    assert {len(row["ids"]) for row in rows} == {1, 3} and all(("reasoning" in row) == (len(row["ids"]) == 1) for row in rows)
    # what was answered at once is scored at once, and the other behind the mark
    assert {(prompt[-1] == close, len(response)) for prompt, response in spied[1]} == {(True, 1), (False, 3)}
    assert cli.verify_run(folder) == 0


@pytest.mark.parametrize("said, closed", [([90, 10, 11], False), ([90, 10, 91, 20], True), ([20, 90, 21], None), ([20], None)])
def test_reasoning_that_the_sample_begins_itself_and_never_ends_is_no_response(tmp_path, monkeypatch, said, closed):
    """A model that may reason; its opening mark is a token. A mark in the midst of an answer begins nothing."""
    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, lambda k, close: [
        {90: close - 1, 91: close}.get(i, i) for i in said], opened=False)
    spoken_to(monkeypatch, opening="<think>")
    shared = Run(experiment, tmp_path / "out", lambda line: None)
    shared.check()
    answer = local.sample_batch(None, tokenizer, ["x"], ends=(), max_new_tokens=9)[0]
    kept, more = response_of(shared.voice, experiment.sampling, "x", answer)
    assert more.get("closed") is closed and kept["ids"] == ([20] if closed else [] if closed is False else answer["ids"])
    assert ("lead" in more) == bool(closed)


def test_an_end_that_closes_reasoning_too_ends_the_response_alone(tmp_path, monkeypatch):
    """gpt-oss: <|end|> stands after the analysis and after the final message."""
    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, lambda k, close: [10, 50, 11, close, 20 + k % 9, 50, 30, 31, 32], ends=(50,))
    folder = run(dataclasses.replace(experiment, iterations=1), tmp_path / "out", say=lambda line: None)
    rows = read_jsonl(folder / "responses/evaluation-0.jsonl")
    assert all(row["finished"] and row["tokens"] == 1 and 20 <= row["ids"][0] < 29 for row in rows)


def test_a_response_is_scored_behind_the_mark_behind_which_it_was_sampled(tmp_path, monkeypatch):
    """Whatever the sample's own mark was joined to; none where there was none; with the end that was sampled."""
    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, lambda k, close: [20 + k % 9])
    shared = Run(experiment, tmp_path / "out", lambda line: None)
    shared.check()
    row, dot = {"text": "x", "ids": [7, 8]}, tuple(tokenizer(".").input_ids)
    for more, found in (({}, (7, 8)), ({"end": 9}, Sampled((7, 8), (), 9)), ({"reasoning": "r"}, Sampled((7, 8), (close,))),
                        ({"reasoning": "r", "lead": [5, 6], "end": 9}, Sampled((7, 8), (5, 6), 9)), ({"lead": [5]}, Sampled((7, 8), (5,))),
                        ({"reasoning": "r", "closed": False, "ids": []}, Sampled(dot, (close,))), ({"ids": []}, dot)):
        assert draws.said(shared.voice, row | more) == found
    assert shared.response_tokens() == 3 + experiment.sampling.reasoning_tokens
    shared.voice = dataclasses.replace(shared.voice, speaker=dataclasses.replace(shared.voice.speaker, closing=()))
    assert shared.response_tokens() == 3


def test_the_end_that_was_sampled_is_the_one_that_is_scored(tmp_path, monkeypatch):
    """Not the tokenizer's, but where that was sampled; none where the cap cut the response. Through a job's file too."""
    from repro.core.engines import TrainingPair
    from repro.stages import jobs

    experiment, tokenizer, close = thinking(tmp_path, monkeypatch, None)
    shared, rows = Run(experiment, tmp_path / "out", lambda line: None), []
    shared.check()
    for tail, ends, both in (([50], {2, 50}, ()), ([2], {2, 50}, ()), ([21, 22, 23], {2, 50}, ()), ([50, 30], {2}, {50})):
        shared.voice = dataclasses.replace(shared.voice, speaker=dataclasses.replace(shared.voice.speaker, ends_both=frozenset(both)))
        kept, more = response_of(shared.voice, experiment.sampling, "x", local.answer_of(tokenizer, [10, close, 20, *tail], ends))
        rows.append(kept | more)
    assert [row.get("end") for row in rows] == [50, None, None, 50] and [row["finished"] for row in rows] == [True, True, False, True]
    said, prompt = [draws.said(shared.voice, row) for row in rows], tokenizer("x: ", add_special_tokens=False).input_ids
    found = [p.ids for p in pairs_of(tokenizer, "x: ", said, score_eos=True)]
    assert found == [[*prompt, close, *row["ids"], *end] for row, end in zip(rows, ([50], [2], [], [50]))]
    assert [p.ids for p in pairs_of(tokenizer, "x: ", said, score_eos=False)] == [[*prompt, close, *row["ids"]] for row in rows]
    assert {p.start for p in pairs_of(tokenizer, "x: ", said, score_eos=True)} == {len(prompt) + 1}
    pair = TrainingPair("q", ("x: ", "y: "), (said[0], (7, 8), "z"))
    (tmp_path / "training").mkdir()
    jobs.write_job(tmp_path, 1, model="m", pairs=[pair], spec=experiment.train, backend="shared", key="k", out="o", seed=0)
    assert jobs.read_job(tmp_path, jobs.job_file(1))[2] == [pair]


def test_reasoning_behind_a_server_of_text_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    experiment, *_ = thinking(tmp_path, monkeypatch, lambda k, close: [20])
    experiment = dataclasses.replace(experiment, sampling=dataclasses.replace(experiment.sampling, engine="server"))
    with pytest.raises(UserError, match="--sampler server: this model writes '</think>' before .* use --sampler vllm or transformers") as e:
        run(experiment, tmp_path / "out", say=lambda line: None, sampler_url="http://127.0.0.1:9/v1")
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("out/**/*.json*"))


def test_the_template_s_end_markers_end_a_sample(tmp_path, monkeypatch):
    """In this process, and as vLLM is asked."""
    folder = save(tmp_path / "m", made("bpe"))
    shared = Run(experiment_of(folder, tokens=8), tmp_path / "here", lambda line: None)
    shared.prepare()
    shared.adopt(shared.constitutions)

    def sample(run):
        jobs = [(item.query, c) for item in run.items() for c in item.constitutions]
        texts = [draws.prompt(run.voice, c, q, "evaluation", sample=True) for q, c in jobs]
        return sample_to_file(run, jobs, texts, 0, run.folder / "responses/x.jsonl", "x")

    rows = sample(shared)
    end = next(row["ids"][3] for row in rows if len(row["ids"]) > 3 and row["ids"][3] not in row["ids"][:3])
    shared.partial(shared.folder / "responses/x.jsonl").unlink()
    shared.voice = dataclasses.replace(shared.voice, speaker=dataclasses.replace(shared.voice.speaker, ends=frozenset({end})))
    for before, now in zip(rows, sample(shared)):
        ids = before["ids"]
        assert now["ids"] == ids[: ids.index(end) if end in ids else None] and now["finished"] == (end in ids or before["finished"])
    server = TextServer(tokenizer=folder / "tokenizer.json", lists={str(folder): str(folder)})
    with server.serve() as url:
        shared = Run(dataclasses.replace(shared.experiment, sampling=dataclasses.replace(shared.experiment.sampling, engine="vllm")),
                     tmp_path / "there", lambda line: None, sampler_url=url)
        shared.prepare()
        shared.adopt(shared.constitutions)
        shared.voice = dataclasses.replace(shared.voice, speaker=dataclasses.replace(shared.voice.speaker, ends=frozenset({end})))
        theirs = sample(shared)
    assert all(body["stop_token_ids"] == [end] for body in server.bodies[1:])
    assert all(row["text"] == seam.text_of(shared.voice.tokenizer, row["ids"]) and end not in row["ids"] for row in theirs)


# ---- runs that were stopped, and older ones

def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    experiment = experiment_of(save(tmp_path / "m", made("bpe", "ASSISTANT: ")))
    straight = run(experiment, tmp_path / "straight", say=lambda line: None)
    real, begun = local.sample_batch, []

    def stopped(*args, **how):
        begun.append(1)
        if len(begun) in (2, 5, 7):
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(local, "sample_batch", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "often", say=lambda line: None)
    often = run(experiment, tmp_path / "often", say=lambda line: None)
    for path in [*straight.glob("responses/*.jsonl"), *straight.glob("logprobs/*.jsonl"), straight / "metrics.json"]:
        assert path.read_bytes() == (often / path.relative_to(straight)).read_bytes(), path.name
    assert not list(often.rglob("*.partial.jsonl"))


def test_rows_without_ids_are_tokenised_as_before_and_that_is_said_once(tmp_path, monkeypatch, spied):
    """A run that an older version began: its responses are text, stripped in training and in evaluation."""
    experiment, said = experiment_of(save(tmp_path / "m", made("bpe", "ASSISTANT:"))), []
    with monkeypatch.context() as old:
        old.setattr(sample, "asdict", lambda row: {k: v for k, v in dataclasses.asdict(row).items() if k != "ids"})
        old.setattr("repro.stages.pipeline.train_iteration", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "out", say=lambda line: None)
    spied[1].clear()
    folder = run(experiment, tmp_path / "out", say=said.append)
    assert sum("without token ids" in line for line in said) == 1
    rows = read_jsonl(folder / "responses/training-1.jsonl")
    assert not any("ids" in row for row in rows) and all("ids" in row for row in read_jsonl(folder / "responses/evaluation-1.jsonl"))
    shared = Run(experiment, folder, lambda line: None)
    shared.check()
    query, pair, both = usable_pairs(shared, 1)[0][0]
    texts = [draws.prompt(shared.voice, c, query, experiment.seed, 1, "train", c.id, sample=False) for c in pair]
    pairs = [p for text in texts for p in pairs_of(shared.voice.tokenizer, text, [row["text"].strip() for row in both], score_eos=False)]
    assert spied[1][: len(pairs)] == [(tuple(p.ids[: p.start]), tuple(p.ids[p.start:])) for p in pairs]
    assert cli.verify_run(folder) == 0


def test_verify_sees_ids_of_another_number_than_what_was_scored(tmp_path):
    from repro.base.records import checked, file_sha256, write_jsonl

    folder = run(experiment_of(save(tmp_path / "m", made("bpe"))), tmp_path / "out", say=lambda line: None)
    path = folder / "responses/evaluation-1.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [rows[0] | {"ids": rows[0]["ids"][:-1]}, *rows[1:]])
    record = read_json(folder / "run.json")
    record["stages"]["evaluate-1"]["outputs"]["responses/evaluation-1.jsonl"] = file_sha256(path)
    (folder / "run.json").write_text(json.dumps(checked(record)))
    found = {group: (status, why) for group, status, _, why in verify.check_run(folder)}
    assert found["files"][0] == "PASS" and found["metrics"][0] == "FAIL" and "token ids" in found["metrics"][1]


# ---- servers

def test_a_server_of_text_has_the_ids_of_its_text_in_its_place_and_that_is_said(tmp_path):
    """Behind a cue that ends in a space the word that would join it is its own token, as the model goes on from there."""
    for cue, first in (("ASSISTANT:", "\u0120time"), ("ASSISTANT: ", "time")):
        tokenizer = made("bpe", cue)

        class Server(TextServer):
            def continuation(self, prompt, first=first):
                return first.replace("\u0120", " ") + " and my house."

            def reads(self, text, tokenizer=tokenizer):
                return len(tokenizer(text).input_ids)

        folder, said = save(tmp_path / cue / "m", tokenizer), []
        experiment = experiment_of(folder, tokens=24, engine="server")
        with Server().serve() as url:
            shared = Run(experiment, tmp_path / cue / "out", said.append, sampler_url=url)
            shared.prepare()
            shared.adopt(shared.constitutions)
            evaluate.evaluate(shared, 0)
        rows, words = read_jsonl(shared.folder / "responses/evaluation-0.jsonl"), shared.voice.tokenizer.get_vocab()
        assert {row["ids"][0] for row in rows} == {words[first]} and all(len(row["ids"]) == row["tokens"] for row in rows)
        assert {shared.voice.tokenizer.decode(row["ids"]) for row in rows} == {row["text"] for row in rows}
        assert sum("the token ids of that text" in line for line in said) == 1


@pytest.mark.parametrize("before, text, pieces", [
    ("x:", " time", ["\u2581time"]), ("x: ", "time", ["time"]), ("x:", "time", ["time"]), ("", "time", ["time"]), ("x:", "", [])])
def test_text_in_its_place_has_no_mark_of_a_beginning(before, text, pieces):
    """SentencePiece's kind of tokenizer begins every text as if a space stood before it."""
    tokenizer = made("pieces")
    assert tokenizer.convert_ids_to_tokens(seam.in_context(tokenizer, before, text)) == pieces


# ---- the embedded model

def test_for_the_embedded_model_both_ways_give_the_same_ids():
    """What it samples is what its text is tokenised to behind the prompt: nothing has changed for it."""
    experiment = load_experiment("exp1", "mini")[0]
    tokenizer, model = load.load_tokenizer(EMBEDDED), load.load_model(EMBEDDED, dtype="bfloat16")
    from repro.models.speaker import Speaker
    from repro.text.prompts import Form

    texts = [Form().render(Speaker.of(tokenizer), [principle], query, sample=True) for query in ("How do I boil an egg?", "Why is the sky blue?")
             for principle in ("Answer in one short sentence.", "Answer at length.", "Write like a pirate.")]
    assert experiment.model.prompt == Form().kind
    for text, answer in zip(texts, local.sample_batch(model, tokenizer, texts, max_new_tokens=16)):
        old, new = pairs_of(tokenizer, text, [answer["text"], answer["ids"]], score_eos=False)
        assert old == new

"""Does a text still answer? What a program can see of that, as pure functions: the watch for a bound that is hacked, and
what keeps a followed principle from counting."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from repro.text.rules import words

STOP_WORDS = frozenset("a an the and or but of to in on at for with from by as is are was were be been it its this that "
                       "these those i you he she we they my your our their me him her them do does did have has had not "
                       "no so if then than there here what which who how when where why can could will would should may "
                       "might must s t re ll ve d m".split())


def overlap(text: str, source: str) -> float:
    """Share (0 to 1) of the response's content words that occur in `source`; 0 for a text without any."""
    content = [w for w in words(text) if w not in STOP_WORDS]
    known = set(words(source))
    return sum(w in known for w in content) / len(content) if content else 0.0


def repetition(text: str) -> float:
    """Share (0 to 1) of the response's word trigrams that occurred earlier in it; 0 below three words."""
    found = words(text)
    trigrams = list(zip(found, found[1:], found[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def hack_watch(text: str, constitution: str, query: str) -> Mapping[str, float]:
    """The three `hack_*` metrics of one response, each from 0 to 1."""
    return {"hack_constitution_overlap": overlap(text, constitution), "hack_query_overlap": overlap(text, query),
            "hack_repetition": repetition(text)}


# ---- what does not answer

LOOP = 0.25  # repeated trigrams
RECITED = 0.3  # content words that are the constitution's and not the query's
RUN = 5  # words in the order in which the constitution has them
FUNCTION_WORDS = STOP_WORDS | frozenset(
    "about after all also an any because been before both down each every get gets go just into least less like make more "
    "most much never now off one only other out over some such too two until up us very while without yes don let".split())
ENGLISH = 0.12  # function words; English prose has about 0.5, stage dialects 0.3
TASK = frozenset("answe post summa sente write word".split())  # stems that name the task, and no style
FAULTS = {"empty": "it is empty", "loop": "it repeats itself", "recital": "it recites the principle",
          "off": "too few words of the query", "foreign": "not in English"}


def fault(text: str, query: str, sentences: Sequence[str]) -> str | None:
    """Why `text` is no answer to `query` under a constitution of these `sentences`; None where it may be one.

    empty: no word. loop: a quarter of the word trigrams occurred before. recital: five words in a row of one of the
    sentences, or more than three content words in ten from them (two different ones at least). off: too few different words
    of the query (`kept`): one of a question, up to three of a long text. foreign: hardly an English function word. The last
    two only of a query in English. A text without any of these may still be wrong, or poor. A short right answer without a
    word of its query ("Paris.", "Two.") is taken for none: it cannot be told from one that fits every query ("Hello.").
    """
    found = words(text)
    if not found:
        return "empty"
    if repetition(text) >= LOOP:
        return "loop"
    asked, said = _content(query), [w for w in found if w not in STOP_WORDS]
    stems, runs = _of_sentences(tuple(sentences))
    told = stems - asked - TASK
    taken = [_stem(w) for w in said if _stem(w) in told]
    if runs & set(_runs(found)) or len(set(taken)) > 1 and len(taken) > RECITED * len(said):
        return "recital"
    if not _in_english(query):
        return None  # of another language, or too short to tell: word by word nothing can be held against it
    if len(_content(text) & asked) < min(len(asked), kept(query)):
        return "off"
    return "foreign" if len(found) >= 8 and _english(found) < ENGLISH else None


STEM = 5  # letters


def kept(query: str) -> int:
    """Different content words of the query that an answer has to have: one, of a dozen two, of two dozen three."""
    return min(3, 1 + len(_content(query)) // 12)


# The same few sentences, and one query after the other: a million responses are looked at in minutes.
@lru_cache(maxsize=1024)
def _of_sentences(sentences: tuple[str, ...]) -> tuple[frozenset[str], frozenset[tuple]]:
    """Their stems, and the runs of words that recite them."""
    return (frozenset(stem for s in sentences for stem in _content(s)),
            frozenset(run for s in sentences for run in _runs(words(s)) if len(_content(" ".join(run)) - TASK) > 1))


@lru_cache(maxsize=1024)
def _in_english(query: str) -> bool:
    return _english(words(query)) >= ENGLISH


@lru_cache(maxsize=4096)
def _content(text: str) -> frozenset[str]:
    return frozenset(_stem(w) for w in words(text) if w not in STOP_WORDS)


@lru_cache(maxsize=2**16)
def _stem(word: str) -> str:
    """"lawns" is "lawn", and "strawberries" begins as "strawberry" does; "baking" and "bakes" stay apart."""
    return re.sub(r"(?<=[^s])s$", "", word.removesuffix("'s"))[:STEM]


def _runs(found: Sequence[str]) -> list[tuple]:
    return [tuple(found[k: k + RUN]) for k in range(len(found) - RUN + 1)]


def _english(found: Sequence[str]) -> float:
    return sum(w.split("'")[0] in FUNCTION_WORDS for w in found) / len(found) if found else 0.0

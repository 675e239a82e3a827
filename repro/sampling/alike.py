"""Whether a server's answers are those of the run's own weights, decoded greedily: small requests, once a server.

Engines leave out, without a word, what they do not know (README.md here has the table). Three differences that would change
a run's numbers are looked for: weights that nobody names, weights of fewer bits, answers that are drawn.
"""

import math
from collections.abc import Callable

from repro.servers.endpoint import wrong_shape

TOKENS = 13            # of each trial answer
TRIALS = 3
NOBODY = "/no/such/model"  # which no server looks for on a hub
IDS = list(range(40, 52))
TEXT = "There was once a fisher who"
BITS = 16              # of a weight that was not quantised, at least

Ask = Callable[[dict], dict]  # a completion request -> its answer; OSError where it is refused, ValueError where it is none


def differences(ask: Ask, engine: str, model: str, listed: dict | None) -> list[str]:
    """What makes the answers others than the run's, in words. `listed`: what /v1/models says of `model`; None where it is
    not there."""
    return list(filter(None, (None if listed else _any_name(ask, engine), _bits(listed or {}), _drawn(ask, engine, model))))


def _body(engine: str, model: str) -> dict:
    own = {"prompt": IDS, "return_token_ids": True, "repetition_penalty": 1.0} if engine == "vllm" else {"prompt": TEXT}
    return {"model": model, "max_tokens": TOKENS, "temperature": 0.0} | own


def _any_name(ask: Ask, engine: str) -> str | None:
    """llama.cpp answers to any name, by the one model that it has."""
    try:
        if wrong_shape(ask(_body(engine, NOBODY)), chat=False):
            return None  # an error inside a 200
    except (OSError, ValueError):
        return None
    return "it answers to any model's name and does not list this one, so whose weights answer cannot be told"


def _bits(listed: dict) -> str | None:
    """llama.cpp tells how large its model is."""
    meta = listed.get("meta")
    size, weights = (meta.get(k) for k in ("size", "n_params")) if isinstance(meta, dict) else (None, None)
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in (size, weights)) or 8 * size / weights >= BITS:
        return None
    return f"its weights are quantised to {8 * size / weights:.1f} bits each"


def _drawn(ask: Ask, engine: str, model: str) -> str | None:
    """Near ties may fall either way from one request to the next; not within a dozen tokens, each time."""
    try:
        answers = [ask(_body(engine, model))["choices"][0] for _ in range(TRIALS)]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # what was to be found out is not: the run's own requests will say what is wrong
    said = {str(a.get("token_ids") if engine == "vllm" else a.get("text")) for a in answers if isinstance(a, dict)}
    return "it draws its answers, although it is asked at temperature 0" if len(said) == TRIALS else None

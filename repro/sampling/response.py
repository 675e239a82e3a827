"""What was sampled -> the response in it: what is kept, trained and scored."""

from dataclasses import dataclass

from repro.base.settings import SamplingSpec
from repro.text import seam


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer: to `query` under constitution `constitution` by the model of `iteration` (0 = initial).

    `ids` are its tokens as they were sampled, without the end token (text/seam.py), which are what is trained and scored:
    `tokens` counts them. `text` is what they read as. `finished` is False where the length cap cut it.
    """

    query: str
    constitution: str
    iteration: int
    text: str
    ids: list[int]
    tokens: int
    finished: bool


def response_of(voice, spec: SamplingSpec, prompt: str, answer: dict) -> tuple[dict, dict]:
    """Of one sample (an `answer` as of `sample_batch` to the prompt and the opening of the voice's form) what its row says
    of the response (`Response`) and beside it: "reasoning" that stood before it in the sample and whether it is "closed",
    all that was "sampled" with chain of thought, "retokenised" where the form cut it inside a token, the ids of the mark
    that stood right before it ("lead"), and the "end" that was sampled, where that is not the tokenizer's."""
    form, tokenizer, speaker, more = voice.form, voice.tokenizer, voice.speaker, {}
    ids, text, finished, last = answer.get("ids"), answer["text"], answer["finished"], answer.get("end")
    if speaker.closing:
        opened = speaker.opened or seam.begins(tokenizer, ids, speaker.opening)
        ids, reasoning, lead = seam.after(ids, speaker.closing, opened)
        most = voice.response_tokens(spec) - spec.reasoning_tokens
        if reasoning is not None:
            closed = bool(lead) and len(reasoning) <= spec.reasoning_tokens
            more = {"reasoning": tokenizer.decode(reasoning), "closed": closed}
            if not closed:
                return {"text": "", "ids": [], "tokens": 0, "finished": False}, more
            more = more | {"lead": lead}
        ended = next((k for k, i in enumerate(ids) if i in speaker.ends_both), None)  # nothing could stop at it before
        if ended is not None:
            ids, finished, last = ids[:ended], True, ids[ended]
        ids, finished = ids[:most], finished and len(ids) <= most
        text = seam.text_of(tokenizer, ids)
    whole = form.opening + text
    text = form.response(whole)
    if form.cot:
        more = more | {"sampled": whole}
    if text != whole:  # the format ended it
        finished, last = finished or (form.kind == "plain" and not whole.rstrip().endswith(text)), None
    start = whole.index(text, whole.index(form.mark) + len(form.mark)) if form.cot and text else 0
    given = form.opening[start: len(text)]  # the part of the response that the sample was opened with
    before = seam.in_context(tokenizer, prompt, " " + given) if given else []
    start, end = (max(0, at - len(form.opening)) for at in (start, start + len(text)))  # in what was sampled
    if ids is None:  # it came as text
        space = " " if form.cot and form.kind == "plain" and text else ""
        ids = seam.in_context(tokenizer, prompt + " " * bool(given) + given, space + text[len(given):])
    elif text != whole:
        ids, anew = seam.cut(tokenizer, ids, start, end)
        more = more | ({"retokenised": True} if anew else {})
    if finished and last not in (None, tokenizer.eos_token_id):
        more = more | {"end": last}
    return {"text": text, "ids": before + ids, "tokens": len(before + ids), "finished": finished}, more

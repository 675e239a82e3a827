"""Requests to a server that samples, and its answers read: token ids where it takes and gives them."""

from collections.abc import Collection, Sequence

from repro.base.records import UserError
from repro.models import decoding

CONCURRENCY = {"vllm": 256, "server": 4}  # the latter answers one after the other


def check_plain(place: str) -> None:
    """Raise UserError where `transformers serve`, started by someone else, would not answer greedily with this model."""
    if fields := decoding.decodes_otherwise(place):
        raise UserError(f"--sampler-url with --sampler server: such a server obeys {', '.join(fields)} in the generation "
                        f"config of {place}, which is no greedy decoding; leave --sampler-url out, and the run starts one "
                        "that does not, or take --sampler vllm or transformers")


def request(engine: str, tokenizer, text: str, max_tokens: int, ends: Collection[int], stops: Sequence[str] = ()) -> dict:
    """The completion request for a rendered prompt, whose answer any of the tokens `ends` ends. vLLM takes and gives token
    ids, so nothing is tokenised twice and nothing is lost in decoding; it knows the tokenizer's end token alone. Other
    servers take text, and what they make of it must be the same token ids."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    fixed = {"max_tokens": max_tokens, "temperature": 0.0}
    if engine == "vllm":
        more = sorted(set(ends) - {tokenizer.eos_token_id})
        # The one default of the weights that vLLM obeys at temperature 0, where it was started without our option.
        extra = {"return_token_ids": True, "repetition_penalty": 1.0} | ({"stop_token_ids": more} if more else {})
        return {"prompt": ids, **fixed, "extra_body": extra} | ({"stop": list(stops)} if stops else {})
    bos = tokenizer.bos_token or ""
    for candidate in dict.fromkeys((text, text.removeprefix(bos))):
        if tokenizer(candidate).input_ids == ids:
            return {"prompt": candidate, **fixed}
    raise UserError("--sampler server: the tokenizer adds control tokens to a text, so that such a server would read "
                    "another prompt than the model is trained with; use --sampler vllm, which takes token ids")


def read_answer(engine: str, tokenizer, answer: dict, ends: Collection[int]) -> dict:
    """{text, tokens, finished} of a server's answer, as of `sample_batch`; with its `ids` where the server gives them."""
    from repro.sampling.local import answer_of
    from repro.text.seam import without_controls

    choice = answer["choices"][0]
    finished = choice["finish_reason"] == "stop"
    if engine == "vllm":
        return answer_of(tokenizer, choice["token_ids"], ends) | {"finished": finished}
    return {"text": without_controls(tokenizer, choice["text"]), "finished": finished,
            "tokens": answer["usage"]["completion_tokens"] - finished}  # less the end token

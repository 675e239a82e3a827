"""What a model's generation config says, and greedy decoding without it: end tokens alone are taken from it."""

import json
from collections.abc import Collection
from pathlib import Path

from repro.base.records import UserError, first_line
from repro.models.hub import file_of, hub_errors, load_config

GENERATION = "generation_config.json"
# What transformers does not read at temperature 0, or a request says in any case: of use in another decoding alone.
UNREAD = {"do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
          "max_length", "max_new_tokens", "use_cache", "cache_implementation", "bos_token_id", "pad_token_id",
          "eos_token_id", "decoder_start_token_id", "transformers_version"}


def plain_decoding(ends: Collection[int], **ids):
    """A generation config that names these end tokens (and `ids`) and nothing else: greedy, or what a caller adds."""
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=sorted(ends) or None, **ids)


def end_tokens(tokenizer, model) -> set[int]:
    """Ids that end a response: the tokenizer's end token, and those of the model's generation config (a chat model's end of
    a turn, where it is another). `model`: a model, or the place of one, whose files are then checked (UserError)."""
    if isinstance(model, str):
        own = own_ends(model)
    else:
        own = getattr(model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *own} - {None}


def own_ends(place: str) -> list[int]:
    """The end tokens that a model's files name, less those that it has no logit for, which it can never say."""
    named = _generation_fields(place).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int for i in ids):
        raise UserError(f"--model {place}: {GENERATION}: eos_token_id {named!r}; allowed: a token id, a list of them, null")
    known = getattr(load_config(place), "vocab_size", None)
    return sorted({i for i in ids if 0 <= i and (known is None or i < known)})


def decodes_otherwise(place: str) -> list[str]:
    """Names of the fields in a model's files by which transformers would not decode plainly at temperature 0."""
    from transformers import GenerationConfig

    neutral = GenerationConfig._get_default_generation_params()  # 5.23 keeps its defaults apart; the class's own are None
    return sorted(k for k, v in _generation_fields(place).items() if k in vars(GenerationConfig()) and k[0] != "_"
                  and k not in UNREAD and v not in (None, False, neutral.get(k)))


def _generation_fields(place: str) -> dict:
    """A model's generation config; where it has no file of it, that which transformers finds in config.json."""
    from transformers import PreTrainedConfig

    data = generation_file(place)
    if data is None:
        fields = hub_errors(place, lambda: PreTrainedConfig.get_config_dict(place)[0])
        inner = next(filter(None, map(fields.get, ("decoder", "generator", "text_config"))), {})
        return inner | {k: v for k, v in fields.items() if v is not None}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as e:  # transformers would pass over the file in silence
        raise UserError(f"--model {place}: {GENERATION} is not valid JSON ({first_line(e)})") from None
    if not isinstance(fields, dict):
        raise UserError(f"--model {place}: {GENERATION} holds no JSON object")
    return fields


def generation_file(place: str) -> bytes | None:
    """The bytes of a model's generation_config.json; many models have none."""
    path = file_of(place, GENERATION)
    return path and hub_errors(place, Path(path).read_bytes)

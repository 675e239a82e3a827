"""Which way of computing log-probs is right for a model: tried on it, in a few forwards of short texts.

1. Causal: later tokens are changed, and no earlier logit may move. Encoders that are run as decoders, and attention that
   looks both ways, are refused.
2. Shared: the packed layout against one text at a time. A family that the layout is wrong for (recurrent layers, positions
   or masks of its own making, a head with more in it than a matrix, prompts that adapters add) differs, and gets the
   reference path.

Before there are weights, a tiny model of the same class and config is tried (`of_config`): its sizes and windows are small,
its weights large, so that what is wrong is far from what is rounded. The loaded model is tried again (`of_model`).
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repro.base.records import first_line
from repro.core.tree import Scored

# What the log-prob of 4 or 6 tokens may differ by, as a share of 1 + its size. Of 179 tiny models in float32, what is right
# stays at 2e-7 and what is wrong begins at 2.7e-3 (results/families.md); SmolLM2-135M: 5e-7 in float32, 1e-2 in bfloat16,
# where the reference rounds its logits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SHARED = ("shared", "shared, model's head")  # the ways of the packed layout, in the order in which they are tried

# of a tiny model, by the names that configs have for them
SIZES = {name: size for size, names in {
    32: "hidden_size n_embd d_model dim embed_dim hidden_dim word_embed_proj_dim lru_width emb_dim embedding_dim "
        "embedding_size input_embedding_size output_embedding_size attention_hidden_size",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size dense_intermediate_size dim_ff encoder_ffn_dim "
        "decoder_ffn_dim d_inner dff intermediate_size_mlp feed_forward_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size qk_head_dim q_lora_rank kv_lora_rank o_lora_rank",
    8: "head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim "
       "linear_head_dim global_head_dim kv_channels dim_head d_head attention_head_size index_head_dim rotary_dim "
       "hidden_size_per_layer_input mamba_d_head mamba_d_state mamba_n_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
       "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads "
       "num_experts n_routed_experts num_local_experts moe_num_experts index_topk index_block_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads linear_num_heads index_n_heads "
       "num_query_groups num_experts_per_tok num_experts_per_token moe_topk moe_k index_topk_blocks",
    1: "topk_group n_group num_expert_group n_groups n_shared_experts num_shared_experts moe_num_shared_experts o_groups",
    128: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    # shorter than the texts, so that what a layer does not see is tried too
    5: "sliding_window attention_window_size window_size local_attention attention_chunk_size sliding_window_size "
       "keep_window_size",
    64: "mamba_d_ssm", 0: "num_kv_shared_layers"}.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
          "num_encoder_layers", "num_decoder_layers")
KEPT_LAYERS = 4


@dataclass(frozen=True)
class Found:
    """`way`: "shared", "shared, model's head", "reference", or None where no way is right; `refusal`: why it is not the
    first. `errors`: by way, as TOLERANCE has them."""

    way: str | None
    refusal: str | None = None
    errors: dict[str, float] = field(default_factory=dict)


# ---- texts


def _texts(config, rows: int, longest: int) -> tuple[list[list[Scored]], list[int], list[int]]:
    """Token ids, the same ones for the same config: 2 prompts x 2 responses as groups, and one more where `longest`
    is longer than these; prompts share their first three tokens, the responses to one their first. And a text of 12 tokens
    with another end from the eighth on. No control token is among them."""
    text = config.get_text_config()
    apart = {value for name, value in {**config.to_dict(), **text.to_dict()}.items()
             if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    ids = [i for i in range(min(rows, 4096)) if i not in apart][2 if rows > 16 else 0:]
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return [ids[k] for k in torch.randint(len(ids), (count,), generator=generator).tolist()]

    groups, header = [], draw(3)
    for prompt in (7, 12, *[longest - 6] * (longest > 18)):
        shown = header + draw(prompt - 3) + draw(1)
        groups.append([Scored(shown + draw(length), prompt) for length in (3, 5)])
    text = draw(12)
    return groups, text, text[:8] + draw(4)


# ---- the two tries


def _try(model, score: Callable[[str, object, Sequence], Tensor], longest: int = 0) -> Found:
    family, rows = model.config.model_type, model.get_input_embeddings().num_embeddings
    groups, text, other = _texts(model.config, rows, longest)
    one, two = model(input_ids=torch.tensor([text, other], device=model.device), use_cache=False).logits.double()
    tolerance = TOLERANCE[model.dtype]
    if len(one) != len(text):
        return Found(None, f"{family}: {len(one)} logits for {len(text)} tokens (a prompt of its own?)")
    if not one.isfinite().all():
        return Found(None, f"{family}: its logits are not finite")
    moved = (one[:8] - two[:8]).abs().max()
    if not moved <= tolerance * one.abs().max():
        return Found(None, f"{family}: not a causal language model: later tokens change the logits of earlier ones (by "
                           f"{moved:.2g})")
    truth, refusals, errors = score("reference", model, groups).double(), [], {}
    for way in SHARED:
        try:
            error = errors[way] = ((score(way, model, groups).double() - truth).abs() / (1 + truth.abs())).max().item()
        except Exception as e:  # whatever the model's own code makes of a layout that it does not know
            refusals.append(f"{family}: packed texts with shared beginnings fail ({type(e).__name__}: {first_line(e)})")
            continue
        if error <= tolerance:
            return Found(way, refusals[0] if refusals else None, errors)
        refusals.append(f"{family}: packed texts with shared beginnings have other log-probs than each alone (by "
                        f"{error:.2g} of their size)")
    return Found("reference", refusals[0], errors)


@contextmanager
def _at_rest(model):
    """The model without dropout, gradients and our draws of random numbers; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in training:
            module.training = True


def of_model(model, score: Callable[[str, object, Sequence], Tensor]) -> Found:
    """What is right for this very model; kept on it until its config, modules or hooks change."""
    modules = tuple((type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    state = hash((str(model.config.to_dict()), modules, model.dtype, model.device))
    known = getattr(model, "_found_way", None)
    if known is None or known[0] != state:
        with _at_rest(model):
            model._found_way = known = (state, _try(model, score))
    return known[1]


def of_config(config, score: Callable[[str, object, Sequence], Tensor], longest: int = 0, **more) -> Found:
    """What is right for a tiny model of this config's class, up to texts of `longest` tokens (where a layer may begin to
    see less in a way that no name here tells). Raises ValueError where no such model can be made."""
    model = tiny(config, longest=longest, **more)
    with _at_rest(model):
        return _try(model, score, longest)


# ---- sampling


def pads(config) -> bool:
    """Whether a tiny model of this class continues a prompt that is padded on the left beside a longer one as it does
    alone. Recurrent layers (RWKV), positions counted from the row's start (BART's decoder) and sparse attention that
    chooses among pads do not. False where that cannot be tried."""
    return _tried(config, "pads", _padded_alike)


def prefills(config, greedy: Callable) -> bool:
    """Whether a tiny model of this class continues prompts that are computed as one tree (sampling/greedy.py) as it does
    each alone. Caches of another kind (latent, recurrent, several of them) do not. False where that cannot be tried."""
    return _tried(config, "prefills", lambda model: _prefilled_alike(model, greedy))


_TRIED: dict[tuple[str, str], bool] = {}


def _tried(config, what: str, alike: Callable[[object], bool]) -> bool:
    known = what, str(config.to_dict())
    if known not in _TRIED:
        try:
            model = tiny(config)
            with _at_rest(model):
                _TRIED[known] = alike(model)
        except Exception:  # whatever a class makes of sizes that it was not meant for
            _TRIED[known] = False
    return _TRIED[known]


CONTINUED = 6  # tokens


def _continued(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [rows, CONTINUED, V] of the likeliest continuations, by `generate`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, max_new_tokens=CONTINUED, do_sample=False,
                                               output_logits=True, return_dict_in_generate=True)
    return torch.stack(model.generate(input_ids=ids, attention_mask=mask).logits, 1)


def _padded_alike(model) -> bool:
    (first, *_), _, _ = _texts(model.config, model.get_input_embeddings().num_embeddings, 0)
    long, short = torch.tensor([first[0].ids]), torch.tensor([first[1].ids[5:]])
    pad = torch.zeros(1, long.shape[1] - short.shape[1], dtype=torch.long)
    alone = _continued(model, short, torch.ones_like(short))
    both = _continued(model, torch.cat([long, torch.cat([pad, short], 1)]),
                      torch.cat([torch.ones_like(long), torch.cat([pad, torch.ones_like(short)], 1)]))
    return bool((both[1:] - alone).abs().max() <= 1e-3 * alone.abs().max())


def _prefilled_alike(model, greedy: Callable) -> bool:
    groups, _, _ = _texts(model.config, model.get_input_embeddings().num_embeddings, 0)
    rows, found = [pair.ids for group in groups for pair in group], []
    alone = torch.cat([_continued(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows])
    greedy(model, rows, CONTINUED, seen=lambda logits: found.append(logits.clone()))
    return bool((torch.stack(found, 1) - alone).abs().max() <= 1e-3 * alone.abs().max())


# ---- a tiny model


def _smaller(value):
    """The same with small sizes, in dictionaries of any depth."""
    if not isinstance(value, dict):
        return value
    return {k: min(v, SIZES[k]) if k in SIZES and isinstance(v, int) and not isinstance(v, bool) else _smaller(v)
            for k, v in value.items()}


def tiny_changes(text, longest: int) -> dict:
    """Small sizes, few layers (of every kind that the config lists) and short windows in the place of its own."""
    data = text.to_dict()
    count = next((data[name] for name in LAYERS if isinstance(data.get(name), int)), None)
    heads = next((data[n] for n in ("num_attention_heads", "n_head", "n_heads") if isinstance(data.get(n), int)), None)
    changed = {}
    for name, value in data.items():
        if isinstance(value, bool) or value is None:
            continue
        if name in SIZES and isinstance(value, int):
            changed[name] = min(value, SIZES[name])
        elif name in LAYERS:
            changed[name] = min(value, KEPT_LAYERS)
        elif name.endswith("_token_id") and isinstance(value, (int, list)):
            changed[name] = 0 if name == "pad_token_id" else 1
        elif "max" in name and "position" in name and isinstance(value, int):
            changed[name] = min(value, max(512, longest))
    for name in ("num_key_value_heads", "num_kv_heads"):  # as many as heads where they are, or where attention is latent
        if name in changed and (data[name] == heads or data.get("kv_lora_rank")):
            changed[name] = SIZES["num_attention_heads"]
    lists = {name: value for name, value in data.items() if isinstance(value, list) and count and len(value) == count}
    kinds = list(zip(*(map(str, value) for value in lists.values()))) or [()] * (count or 0)
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:KEPT_LAYERS]
    kept = sorted({*first, *[k for k in range(len(kinds)) if k not in first][: KEPT_LAYERS - len(first)]})
    changed |= {name: [value[k] for k in kept] for name, value in lists.items()}
    for name, value in data.items():
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by layer
            by_layer = {int(key): _smaller(fields) for key, fields in value.items()}
            changed[name] = {str(k): by_layer[layer] for k, layer in enumerate(kept) if layer in by_layer}
        elif isinstance(value, dict) and _smaller(value) != value:
            changed[name] = _smaller(value)
    return changed


def tiny_config(config, longest: int = 0, **more):
    """The config with `tiny_changes` and `more`, all else as it is. Raises ValueError where its class does not take it."""
    text, refusal = config.get_text_config(), None
    data, changed = text.to_dict(), tiny_changes(text, longest) | more
    whole, lists = {**data, **changed}, {name for name, value in data.items() if isinstance(value, list)}
    for fields in (whole, {k: v for k, v in whole.items() if k not in lists}, changed,
                   {k: v for k, v in changed.items() if k not in lists}):
        try:
            return type(text)(**copy.deepcopy(fields))
        except Exception as e:  # each class checks in its own way
            refusal = refusal or e
    raise ValueError(f"{text.model_type}: no tiny model of this config ({type(refusal).__name__}: {first_line(refusal)})")


def tiny(config, dtype: torch.dtype = torch.float32, longest: int = 0, **more):
    """A tiny causal LM of `config`'s class in eval mode, for texts of `longest` tokens; the same weights each time. `more`:
    fields of the config."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    small, verbosity = tiny_config(config, longest, **more), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters())
            if size > 20_000_000:
                raise ValueError(f"{small.model_type}: no tiny model of this config ({size:,} parameters are left)")
            with suppress(AttributeError):
                small._experts_implementation = "eager"
            model = AutoModelForCausalLM.from_config(small, dtype=dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.15 * torch.randn(parameter.shape).to(parameter.dtype)
        return model
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f"{small.model_type}: no tiny model of this config ({type(e).__name__}: {first_line(e)})") from e
    finally:
        logging.set_verbosity(verbosity)

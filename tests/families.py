"""Every causal LM class of transformers, tiny: is what each way of computing log-probs says right, and what is refused?

    python tests/families.py [FAMILY ...]     # none: all of them, a minute or two -> results/families.md

The truth is one unpacked text at a time in float64, eagerly where the class has an eager attention: nothing of the core is in
it. The texts are not those that repro/core/probe.py tries (other lengths, three prompts and responses, longer than every window).
"wrong" is a way that the probe lets pass and that differs from the truth.
"""

import copy
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from repro.base.records import write_text
from repro.core import probe
from repro.core.logprobs import WAYS, score
from repro.core.tree import Scored

ROOT = Path(__file__).parents[1]
RIGHT = 2e-4  # of 1 + the size of a log-prob: many families round to float32 on the way, whatever their weights are in
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# fields of a class whose default config is not one that runs, or has layers of one kind alone
NEEDED = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2}, "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2}, "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2}, "xmod": {"default_language": "en_XX"},
    "qwen4_exp": (indexer := {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
                              "indexer_compress_ratio": 2}), "qwen4_exp_text": indexer,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
                            "layer_types": ["full_attention", "sliding_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4, "hash_seed": 0},
    "git": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}},
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), {"use_sliding_window": True, "sliding_window": 5,
                    "layer_types": ["full_attention", "sliding_attention"] * 2}),
}


def default_config(family: str):
    """The class's own default."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    try:
        return config.get_text_config()
    except ValueError:  # several texts in it
        return config.get_text_config(decoder=True)


def texts(rows: int) -> list[list[Scored]]:
    generator = torch.Generator().manual_seed(7)

    def draw(count):
        return torch.randint(4, min(rows, 120), (count,), generator=generator).tolist()

    groups = []
    for prompt in (13, 4, 9):
        shown = draw(prompt)
        first = draw(3)
        groups.append([Scored(shown + r, prompt) for r in (first + draw(5), first + draw(1), draw(11))])
    return groups


def truth(model, groups) -> torch.Tensor:
    found = []
    for pair in (pair for group in groups for pair in group):
        logits = model(input_ids=torch.tensor([pair.ids]), use_cache=False).logits[0].double()
        scored = logits[pair.start - 1: len(pair.ids) - 1].log_softmax(-1)
        found.append(scored.gather(1, torch.tensor(pair.ids[pair.start:])[:, None]).sum())
    return torch.stack(found)


def try_family(family: str) -> dict:
    """{way: error as a share of 1 + the log-prob's size} of what passes, "way": what the probe settles, "why"."""
    config, more = default_config(family), NEEDED.get(family, {})
    try:
        model = probe.tiny(config, torch.float64, **more)
        model(input_ids=torch.arange(5, 9)[None], use_cache=False)
    except RuntimeError:  # some mix in float32
        model = probe.tiny(config, torch.float32, **more)
    row = {"class": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
    groups = texts(model.get_input_embeddings().num_embeddings)
    with torch.no_grad():
        found = probe.of_config(config, score, **more)
        row |= {"way": found.way, "why": found.refusal, "tried": found.errors}
        exact = truth(eagerly(config, model.dtype, more) or model, groups)
        for way in WAYS:
            if way == "reference" or way == found.way:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row[way] = float(((score(way, model, groups) - exact).abs() / (1 + exact.abs())).max())
        if found.way is None:  # is it refused for what it is?
            ids = groups[0][0].ids
            other = [*ids[:10], *reversed(ids[10:])]
            one, two = (model(input_ids=torch.tensor([x]), use_cache=False).logits[0, :10] for x in (ids, other))
            row["moved"] = float((one - two).abs().max())
    return row | {"outcome": outcome(row)}


def eagerly(config, dtype, more):
    try:
        own = copy.deepcopy(config)
        own._attn_implementation = "eager"
        return probe.tiny(own, dtype, **more)
    except (ValueError, ImportError):
        return None


def outcome(row: dict) -> str:
    if row["way"] is None:
        return "refused" if row["moved"] > RIGHT else "WRONG: refused"
    wrong = [way for way in WAYS if way in row and not row[way] <= RIGHT]
    return f"WRONG: {', '.join(wrong)}" if wrong else row["way"]


HEADINGS = {
    "shared": "Right on `shared` and on `reference`",
    "shared, model's head": "Right on `shared` (with the model's own head, which has more in it than a matrix) and on `reference`",
    "reference": "Right on `reference` alone: `shared` is refused",
    "refused": "Refused: not causal, as their default config has it",
    "not tried": "Not tried: no tiny model"}


def page(rows: dict[str, dict]) -> str:
    """The table by outcome, Markdown."""
    from importlib.metadata import version

    counts = Counter(row["outcome"] for row in rows.values())
    tried = {k: row for k, row in rows.items() if row["outcome"] != "not tried"}
    right = [error for row in tried.values() for way, error in row["tried"].items() if way == row["way"]]
    wrong = [error for row in tried.values() for way, error in row["tried"].items() if way != row["way"]]
    most = max(row[way] for row in tried.values() for way in WAYS if way in row)
    lines = ["# Families: which way of computing log-probs is right", "",
             f"Made by `make families` (tests/families.py): the {len(rows)} causal LM classes of transformers "
             f"{version('transformers')}, torch {version('torch')}, each as a tiny model of random weights whose windows are "
             f"shorter than the texts. {len(tried)} could be tried, 9 pairs each (3 prompts, 3 responses), against one unpacked "
             "text at a time in float64.", "",
             f"Silently wrong: **{sum(n for name, n in counts.items() if 'WRONG' in name)}** of {len(tried)}. The largest error "
             f"of what passes is {most:.1g} of 1 + the log-prob's size. Of what repro/core/probe.py tries in float32, what is right "
             f"differs by at most {max(right):.1g} and what is wrong by at least {min(wrong):.1g}; it draws the line at "
             f"{probe.TOLERANCE[torch.float32]:g}.", ""]
    for name in [*HEADINGS, *(name for name in counts if name not in HEADINGS)]:
        found = {k: row for k, row in rows.items() if row["outcome"] == name}
        lines += [f"## {HEADINGS.get(name, name)}: {len(found)}", ""]
        if name.startswith("shared"):
            lines += [", ".join(found) + ".", ""]
            continue
        lines += ["| family | why |", "|---|---|"]
        lines += [f"| {k} | {(row.get('why') or row['fails']).removeprefix(k + ': ')} |" for k, row in found.items()] + [""]
    return "\n".join(lines)


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {}
    for family in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            rows[family] = try_family(family)
        except Exception as e:  # a class that its own defaults do not fit
            reason = (str(e).splitlines() or [""])[0]
            rows[family] = {"outcome": "not tried", "fails": f"{type(e).__name__}: {reason[:120]}"}
        print(f"{family}: {rows[family]['outcome']}", flush=True)
    if not sys.argv[1:]:
        write_text(ROOT / "results/families.md", page(rows))
    counts = Counter(row["outcome"] for row in rows.values())
    print("; ".join(f"{n} {name}" for name, n in counts.most_common()))
    raise SystemExit(any("WRONG" in name for name in counts))


if __name__ == "__main__":
    main()

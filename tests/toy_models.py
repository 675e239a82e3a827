"""Tiny Mistral, Mixtral and Llama models in the place of the paper's, made here. Their weights are random, but for what gives
their text a form: they speak in words, end with a full stop, and now and then write "Summary:", so
that every filter of the paper's experiments passes some of what they say. What they say depends on the whole prompt."""

from pathlib import Path

from conftest import byte_tokenizer

WORDS = (" bread", " time", " friend", " mother", " house", " money", " says", " asks", " was", " will", " never", " often",
         " kind", " small", " late", " alone", " and", " but", " because", " about", " with", " the", " my", " her")
KINDS = {"mistral": ("Mistral", {"sliding_window": None}),
         "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
         "llama": ("Llama", {})}
LONGEST = 8192  # bytes, which are these models' tokens


def save_toy(folder: Path, kind: str, seed: int) -> Path:
    """A model of `kind` in `folder`, with its tokenizer: bytes, control tokens and words."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*WORDS, "Summary:"])
    name, more = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONGEST, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    head, embedded = model.lm_head.weight, model.model.embed_tokens.weight
    with torch.no_grad():
        head[:259] *= 0.05
        head[2] *= 0.1
        for words, after in (((".",), "<|im_end|>"), ((" because", " says", " asks", " about"), "Summary:")):
            direction = torch.randn(32)
            head[tokenizer.convert_tokens_to_ids(after)] = 0.3 * direction
            for before in tokenizer.convert_tokens_to_ids(words):  # after these it is all but certain
                embedded[before], head[before] = 12 * direction, torch.randn(32) * 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

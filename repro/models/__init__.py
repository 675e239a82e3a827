"""Language models as files: names, access, weights, tokenizers, chat templates, what they decode by."""

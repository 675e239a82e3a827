"""Every prompt, in our wording and the paper's structure (arXiv 2404.14313, A.16 and A.17).

User text (queries, principles) is only ever an argument here, never a template, and was checked for control tokens.
"""

from collections.abc import Sequence

CHAT_SYSTEM = "You are a helpful assistant that follows the principles it is given."

PLAIN_SYSTEM = ("System: You are an AI assistant. Answer the human's message in a way that follows every principle "
                "of the constitution you are given.")
PLAIN_EXAMPLE = ("### Example Format\n\nConstitution:\n[insert the principles]\n\nHuman: [insert the human's message]\n\n"
                 "Assistant: [insert an answer that follows the constitution]\n\n"
                 "Human: Thank you, that is what I needed!\n\n### Main Task\n\n")
PLAIN_STOPS = ("\n\nHuman", "###")  # where a base model's answer ends and its imitation of the format begins


def chat(tokenizer, statements: Sequence[str], query: str) -> str:
    """The prompt of an instruction-tuned model: the query, then the principles, one a line.

    For the 135M model the principles come last and unnumbered: numbered lists and a heading make it recite them.
    """
    messages = [{"role": "system", "content": CHAT_SYSTEM},
                {"role": "user", "content": query + "\n\n" + "\n".join(statements)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def plain(statements: Sequence[str], query: str, *, example: bool) -> str:
    """The prompt of a base model. `example` adds the format block: generation has it, training does not."""
    numbered = "\n".join(f"{k}. {s}" for k, s in enumerate(statements, start=1))
    block = PLAIN_EXAMPLE if example else ""
    return f"{PLAIN_SYSTEM}\n\n{block}Constitution:\n{numbered}\n\nHuman: {query}\n\nAssistant:"


def render(tokenizer, form: str, statements: Sequence[str], query: str, *, generation: bool) -> str:
    """The prompt text for `form` "chat" or "plain"; `generation` is False for training."""
    if form == "chat":
        return chat(tokenizer, statements, query)
    return plain(statements, query, example=generation)


def cut(form: str, text: str) -> str:
    """A response's text up to where the model leaves the format; chat models end by themselves."""
    if form == "plain":
        for stop in PLAIN_STOPS:
            text = text.split(stop, 1)[0]
        text = text.rstrip()
    return text

"""What has the shape of some model family's control token, and the token that begins a base model's texts."""

import re


def opened(tokenizer) -> str:
    """The token that begins every text of a base model, spelled out, where its tokenizer would put one (Llama, Mistral):
    prompts are tokenised without additions, so that no chat template's is doubled."""
    bos = tokenizer.bos_token or ""
    return bos if bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""


# What a judge's or a writer's tokenizer reads as a control token is known by its shape alone: it stands behind a server.
# HTML's commonest tags in lower case are text; the marks that some family shares with HTML (<s>, <mask>, <image>) are not.
_HTML = ("a|b|i|u|p|br|hr|em|strong|small|sub|sup|ul|ol|li|dl|dt|dd|div|span|pre|code|blockquote|center|font|h[1-6]|table|"
         "caption|thead|tbody|tfoot|tr|th|td|html|head|body|title|style|script")
_SHAPES = (
    rf"<(?!/?(?:{_HTML})>)/?(?!\d+>)\w[\w:.\u2581-]{{0,100}}>",  # <s>, </think>, <start_of_turn>, <seed:bos>, in <<SYS>>
    r"<[|\uff5c][^<>\n]{1,100}[|\uff5c]>", r"<\|[^\s<>]{1,100}>", r"<[^\s<>]{1,100}\|>",  # <|end|>; Gemma: <|turn>, <turn|>
    r"<\uff5c\S", r"\uff5c[A-Z]{2,}\uff5c", r"</?dsml:",  # DeepSeek: parts of a tag are tokens of their own
    r"\[/?[a-z]?[A-Z][A-Z_][A-Z0-9_]+\]", r"\[/?(?:[A-Za-z]+_\w+|unused\d+)\]",  # [/INST], [gMASK], [control_8]
    r"\[([|@])[^\s\[\]]{1,40}\2\]", r"<\[[^\n<>\[\]]{1,40}\]>",  # [|user|], [@BOS@], <[fim-suffix]>
    r">>[A-Z][A-Z0-9_]+<<", r"\|\|\|[A-Z][A-Z_]+\|\|\|",  # Falcon, OLMo
    r"[\][][a-z!]{0,4}~[a-z!]{0,4}[\][]", r"\]<\]\w{1,40}\[>\[")  # MiniMax: ]~b], ]~!b[, [e~[, ]<]image[>[
_MARK = re.compile(rf"(?=({'|'.join(_SHAPES)}))[<>\[\]|\uff5c]")


def marks(text: str) -> list[str]:
    """What in a text has the shape of some family's control token."""
    return [m[1] for m in _MARK.finditer(text)]


def defuse(text: str) -> str:
    """What the judge sees of a text: whatever some model's tokenizer or template reads as a control token is broken by a
    space behind its first character. The run's own record keeps the text as it is."""
    return _MARK.sub(lambda m: f"{m[0]} ", text)

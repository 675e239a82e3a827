"""Rules: what a program can check of a text, as pure functions. A reader can disagree with a rule, not with its verdict.

Rules of form decide. Rules of vocabulary look for the signs of a style: several different ones, at a certain density,
with other words around them; so that neither a word repeated, nor a list of the signs, nor a text that says of itself
that it has the style passes. What no sign gives away (humour, coherence, eloquence, analysis) has no rule.
"""

import re
from collections.abc import Callable

BRIEF_WORDS = 25
FEW_WORDS = 10
SIMPLE_LETTERS = 4.5
TECHNICAL_LETTERS = 5.2
LINE_WORDS = 12
DENSE, SPARSE = 25, 60  # words to a sign: of a dialect, of an attitude
OTHER_WORDS = 4


def words(text: str) -> list[str]:
    """The words, case folded; an apostrophe inside a word belongs to it, hyphens part words."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold())


def _plain(text: str) -> str:
    """Case and white space folded, apostrophes straight."""
    return " ".join(text.casefold().replace("\u2019", "'").split())


def sentences(text: str) -> list[str]:
    """The sentences of a text: split after . ! or ? before white space, and at line breaks. A piece without a word
    (a lone list number or mark) does not count."""
    pieces = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", text)
    return [p for p in pieces if re.search(r"[^\W\d_]", p)]


# ---- rules of form

def brief(text: str) -> bool:
    """One sentence of at most 25 words."""
    return len(sentences(text)) == 1 and len(text.split()) <= BRIEF_WORDS


def few_words(text: str) -> bool:
    """At most 10 words, however they are joined."""
    return 0 < len(words(text)) <= FEW_WORDS


def simple_words(text: str) -> bool:
    """At least four words, with a mean length of at most 4.5 letters (English prose for adults has about 4.7)."""
    found = re.findall(r"[^\W\d_]+", text)
    return len(found) >= 4 and sum(map(len, found)) / len(found) <= SIMPLE_LETTERS


def technical_words(text: str) -> bool:
    """At least eight different words, with a mean length of at least 5.2 letters (15 at most count of each)."""
    found = set(re.findall(r"[^\W\d_]+", text.casefold()))
    return len(found) >= 8 and sum(min(len(w), 15) for w in found) / len(found) >= TECHNICAL_LETTERS


_LIST_MARK = re.compile(r"\s*(?:[-*+\u2022\u2013]|\(?\d{1,3}[.):]|\(?[a-z][.)])\s+", flags=re.I)


def verse(text: str) -> bool:
    """At least three different lines, each of 2 to 12 words, none of them an item of a list."""
    lines = [line for line in text.splitlines() if line.strip()]
    return (len({tuple(words(line)) for line in lines}) >= 3 and not any(map(_LIST_MARK.match, lines))
            and all(2 <= len(words(line)) <= LINE_WORDS for line in lines))


def numbered_list(text: str) -> bool:
    """At least two lines with text that are numbered 1, 2, ... in order."""
    numbers = re.findall(r"^[ \t]*\(?(\d{1,3})[.):][ \t]+\S*[^\W\d_]", text, flags=re.M)
    return len(numbers) >= 2 and list(map(int, numbers)) == list(range(1, len(numbers) + 1))


def lower_case(text: str) -> bool:
    """Letters, and no capital among them."""
    return any(c.islower() for c in text) and not any(c.isupper() or c.istitle() for c in text)


def question(text: str) -> bool:
    """The last sentence is a question, of at least two words."""
    last = (sentences(text) or [""])[-1].rstrip(" \n\"')]\u201d\u2019")
    return last.endswith("?") and text.rstrip(" \n\"')]\u201d\u2019").endswith("?") and len(words(last)) >= 2


def bullets(text: str) -> bool:
    """At least two lines with text behind a bullet (- * + or a dot)."""
    return len(re.findall(r"^[ \t]*[-*+\u2022][ \t]+\S*[^\W_]", text, flags=re.M)) >= 2


def titled(text: str) -> bool:
    """A first line of 1 to 10 words that ends no sentence, begins no list and announces nothing (with a colon), and text of
    at least four words below it."""
    first, _, rest = text.strip().partition("\n")
    sentence = re.search(r"[.!?,;:][\"')\]]*$", first.strip().rstrip("*_ ")) or _LIST_MARK.match(first)
    return 0 < len(words(first)) <= 10 and not sentence and len(words(rest)) >= OTHER_WORDS


def letter(text: str) -> bool:
    """Begins with Dear, Hi or Hello and who it is to, up to a comma, colon, exclamation mark or the line's end; words
    follow."""
    found = re.match(r"\W*(?:dear|hi|hello|hey) (?!me\b)[\w\[][^\n,.!?:]{0,40}(?:[,:!]|\n)", text.strip(), flags=re.I)
    return bool(found) and len(words(text[found.end():])) >= OTHER_WORDS


def quotes(text: str) -> bool:
    """At least two words in a row between double quotation marks, and four others outside of all such."""
    spans = re.findall(r"(?<!\w)[\"\u201c]([^\"\u201c\u201d\n]+)[\"\u201d](?!\w)", text)
    inside = [len(words(span)) for span in spans]
    return max(inside, default=0) >= 2 and len(words(text)) - sum(inside) >= OTHER_WORDS


def exclaims(text: str) -> bool:
    """At least one exclamation mark behind a word."""
    return bool(re.search(r"[^\W_][\"')\]*]*!", text))


def numbers(text: str) -> bool:
    """A number above one, in digits or as a word, and four other words; the marks of a list do not count."""
    plain = re.sub(r"^[ \t]*\(?\d{1,3}[.):]\s", " ", text, flags=re.M)
    found = re.findall(r"\d+(?:[.,:]\d+)*|\b(?:" + _NUMBER + r")\b", plain, flags=re.I)
    found = [number for number in found if number.lstrip("0") not in ("", "1")]
    return bool(found) and len(words(plain)) - len(found) >= OTHER_WORDS


_NUMBER = ("two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|"
           "thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|dozens?|twice")


def first_person(text: str) -> bool:
    """At least six words, one of them of the first person (I, my, we, our)."""
    return len(words(text)) >= 6 and bool(re.search(r"\b(?:I|(?i:me|my|mine|myself|we|our|ours|ourselves)|us)\b", text))


def to_the_reader(text: str) -> bool:
    """At least six words, one of them you or your."""
    return len(words(text)) >= 6 and bool(re.search(r"\b(?:you|your|yours|yourself)\b", text, flags=re.I))


# Shown as pictures by themselves (Unicode's Emoji_Presentation), or by the selector U+FE0F, unless U+FE0E asks for text.
_EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff]{2}|[0-9#*]\ufe0f\u20e3|"
    "[\u203c\u2049\u2122\u2139\u2194-\u21aa\u231a-\u23ff\u24c2\u25aa-\u27bf"
    "\u2934-\u2b55\u3030\u303d\u3297\u3299\u00a9\u00ae]\ufe0f|(?:[\U0001f300-\U0001f64f\U0001f680-\U0001f6ff"
    "\U0001f7e0-\U0001f7eb\U0001f900-\U0001f9ff\U0001fa70-\U0001faff\u231a\u231b\u23e9-\u23ec\u23f0\u23f3\u25fd\u25fe\u2614"
    "\u2615\u2648-\u2653\u267f\u2693\u26a1\u26aa\u26ab\u26bd\u26be\u26c4\u26c5\u26ce\u26d4\u26ea\u26f2\u26f3\u26f5\u26fa\u26fd"
    "\u2705\u270a\u270b\u2728\u274c\u274e\u2753-\u2755\u2757\u2795-\u2797\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55])(?!\ufe0e)")


def emoji(text: str) -> bool:
    """An emoji, and words (not :smile:, :-), nor signs such as a trade mark that are text by default)."""
    return bool(_EMOJI.search(text)) and len(words(_EMOJI.sub(" ", text))) >= OTHER_WORDS


# ---- rules of vocabulary

def _vocabulary(*signs: str) -> re.Pattern:
    return re.compile(rf"(?<![\w'])(?:{'|'.join(signs)})(?!\w)(?!'\w)")


def signs(text: str, vocabulary: re.Pattern, *, kinds: int, every: int) -> bool:
    """At least `kinds` different signs (letters drawn out count once), one every `every` words, and four other words."""
    plain = _plain(text)
    found = vocabulary.findall(plain)
    count = len(words(plain))
    others = count - sum(len(words(sign)) for sign in found)
    return (len({re.sub(r"(.)\1+", r"\1", sign) for sign in found}) >= kinds and others >= OTHER_WORDS
            and count <= every * len(found))


_PIRATE = _vocabulary(
    "a+r{2,}(?:g?h)?", "ya+r{2,}", "ahoy", "avast", "aye", "ye", "yer", "yo[- ]ho(?:[- ]ho)?", "mateys?",
    "me (?:hearties|mateys?)", "hearties", "landlubbers?", "scallywags?", "doubloons?", "bilge", "shiver me timbers",
    "davy jones", "blimey", "booty", "scurvy", "grog", "savvy", "swashbuckl(?:er|ing)", "seven seas",
    "walk(?:ed)? the plank", "be (?:warned|off with)")
_ARCHAIC = _vocabulary(
    "thee", "thou", "thy", "thine", "thyself", "hath", "doth", "dost", "hast", "hadst", "didst", "shalt", "wouldst",
    "couldst", "canst", "'?tis", "'?twas", "'?twere", "prithee", "forsooth", "verily", "wherefore", "whence", "hither",
    "thither", "methinks", "ere", "oft", "nay", "anon", "betwixt", "o'er", "e'en", "saith", "cometh", "goeth", "maketh",
    "taketh", "knoweth", "giveth", "speaketh", "hark", "yonder", "alack")
_SCEPTICAL = _vocabulary(
    "allegedly", "supposedly", "purportedly", "reportedly",
    "inconsistenc(?:y|ies)", "bias(?:es|ed)?", "so[- ]called", "questionable", "doubtful", "dubious",
    "(?:i|we|one may) doubt", "unlikely", "unproven", "unverified", "hard to believe", "not (?:entirely )?convinced",
    "unconvincing", "(?:no|little) (?:evidence|proof)", "claims? (?:that|to)", "remains? (?:unclear|to be seen)",
    "far[- ]fetched", "implausible", "exaggerat(?:e|ed|es|ion)", "(?:one|we) (?:may|might|must) (?:ask|wonder)",
    "is it really", "can (?:we|one) be sure", "how do we know", "take[ns]? .{0,12}grain of salt")
_ENCOURAGING = _vocabulary(
    "you can(?! (?:not|never|hardly|only|forget))", "you will(?! (?:not|never|fail))", "you've got this", "you got this",
    "keep (?:going|at it|trying|it up|moving)", "(?:never|don't|do not) give up", "believe in (?:yourself|you)",
    "go for it", "stay strong", "be proud", "proud of you(?:rself)?", "well done", "(?:one|every|each) (?:small )?step",
    "hang in there", "you are (?:stronger|capable|able|not alone)", "you're (?:stronger|capable|able)",
    "(?:never|not) too late", "dream big", "have courage", "rise (?:above|again|up)", "your best", "within your reach",
    "anything is possible",
    "you have (?:the power|what it takes)", "you are (?:strong|brave)", "you're (?:strong|brave)", "congratulations",
    "(?:chance|opportunity) (?:for growth|to grow|to learn)", "overcom(?:e|ing)", "(?:you're|you are) taking steps",
    "incredible accomplishment", "(?:find|have) the courage", "it's great (?:that|to hear)", "embrace")
_EMPATHETIC = _vocabulary(
    "sorry (?:to hear|for your|that you)", "(?:my|our) hearts? goes? out",
    "(?:i|we) (?:can )?(?:understand|imagine|feel for)", "understandabl[ey]", "it makes sense (?:that|to feel)",
    "no wonder", "(?:you are|you're) not alone", "anyone would", "(?:tough|hard|difficult) times?",
    "(?:must|can) (?:be|feel|have (?:been|felt)) (?:so |very |really |truly )?(?:hard|painful|difficult|"
    "awful|tough|sad|frustrating|lonely|frightening|scary|exhausting|stressful|heavy|hurtful|upsetting)",
    "sounds (?:so |very |really |truly )?(?:hard|painful|difficult|awful|tough|sad|frustrating|lonely|"
    "exhausting|stressful|upsetting)", "heart-?breaking", "(?:be|being) (?:kind|gentle) (?:to|with) (?:yourself|you)",
    "feelings are valid", "your feelings")
_PHILOSOPHICAL = _vocabulary(
    "(?:the )?meaning of", "what it means to", "existence", "existential", "human (?:condition|nature|existence|heart)",
    "essence", "mortality", "mortals?", "truths?", "wisdom", "virtues?", "fate", "destiny", "free will", "freedom",
    "the self", "consciousness", "impermanence", "transience", "fleeting", "eternal", "(?:the )?(?:very )?nature of",
    "souls?", "morality", "justice", "being itself", "ephemeral", "autonomy", "enlightenment", "human relationships",
    "self-discovery", "the human", "profound(?:ly)?")


_FEELINGS = _vocabulary(
    "(?:un)?happ(?:y|ily|iness|ier)", "sad(?:ly|ness|der)?", "ang(?:ry|er|rily)", "afraid", "fears?", "scared",
    "joy(?:ful(?:ly)?)?", "proud(?:ly)?", "pride", "asham(?:ed)", "shame", "embarrass(?:ed|ment|ing)",
    "annoy(?:ed|ance|ing)", "frustrat(?:ed|ion|ing)", "excit(?:ed|ement|ing)", "nervous(?:ly)?", "anxious(?:ly)?",
    "anxiety", "worr(?:y|ied|ies)", "relie(?:f|ved)", "lonel(?:y|iness)", "grateful", "gratitude", "guilt(?:y)?",
    "jealous(?:y)?", "envy", "surpris(?:e|ed|ing)", "disappoint(?:ed|ment|ing)", "hurt",
    "regret(?:s|ted)?", "delight(?:ed|ful)?", "upset", "cr(?:y|ied|ying)", "tears?", "laugh(?:s|ed|ing|ter)?",
    "smil(?:e|es|ed|ing)", "feel(?:s|ing|ings)?", "felt", "emotions?", "emotional(?:ly)?", "love[sd]?", "hate[sd]?",
    "grief", "hopes?", "hopeful", "confused", "overwhelm(?:ed|ing)", "satisf(?:ied|action)", "content(?:ed|ment)",
    "enjoy(?:s|ed|ing)?", "thrilled")
_LESSON = _vocabulary(
    "lessons?", "moral(?: of)?", "learn(?:s|ed|t|ing)?", "reminds? (?:us|me|you|that)", "(?:a|the) reminder",
    "teach(?:es|ing)?", "taught", "shows? (?:us|that)", "takeaway", "importance of", "important to", "we should",
    "you should", "one should", "never too late")
_FAIRY_TALE = _vocabulary(
    "once upon a time", "(?:long|many years|a long time) ago", "happily ever after", "(?:far[- ]?away|distant) land",
    "there (?:once )?lived", "there once was", "there was once", "kingdoms?", "castles?", "magic(?:al)?",
    "(?:in|of) a (?:small|little|quiet|faraway) (?:village|town)", "enchanted", "princess(?:es)?", "princes?", "kings?",
    "queens?", "fair(?:y|ies)", "spells?", "dragons?")


def feelings(text: str) -> bool:
    """A word for what someone feels (proud, afraid, felt, tears), one every 60 words."""
    return signs(text, _FEELINGS, kinds=1, every=SPARSE)


def lesson(text: str) -> bool:
    """Says what is to be learned (a lesson, the moral, a reminder, we should)."""
    return signs(text, _LESSON, kinds=1, every=SPARSE)


def fairy_tale(text: str) -> bool:
    """A turn of fairy tales (once upon a time, long ago, in a small village, magic)."""
    return signs(text, _FAIRY_TALE, kinds=1, every=SPARSE)


def pirate(text: str) -> bool:
    """Two different words of stage pirates (ahoy, matey, ye, arr); ships, crews and pirates themselves do not count."""
    return signs(text, _PIRATE, kinds=2, every=DENSE)


def archaic(text: str) -> bool:
    """Two different words of Shakespeare's English that have gone out of use (thou, hath, 'tis, prithee)."""
    return signs(text, _ARCHAIC, kinds=2, every=DENSE)


def sceptical(text: str) -> bool:
    """Two different signs of doubt (allegedly, no evidence, hard to believe); "no doubt" is none."""
    return signs(text, _SCEPTICAL, kinds=2, every=SPARSE)


def encouraging(text: str) -> bool:
    """Speaks to the reader, with two different encouragements (keep going, you can; not "you can never")."""
    return bool(re.search(r"\byou", text.casefold())) and signs(text, _ENCOURAGING, kinds=2, every=SPARSE)


def empathetic(text: str) -> bool:
    """A phrase that takes part in someone's feelings (that must be hard, I can imagine, no wonder)."""
    return signs(text, _EMPATHETIC, kinds=1, every=SPARSE)


def philosophical(text: str) -> bool:
    """Two different terms of reflection on life in general (human nature, truth, fate, the meaning of)."""
    return signs(text, _PHILOSOPHICAL, kinds=2, every=SPARSE)


_PERSONAL = re.compile(r"\b(?:(?i:i|me|my|myself|we|our|ours|you|your|yours|yourself)|us)\b")
_OPINION = _vocabulary(
    "(?:un)?fortunately", "sadly", "luckily", "thankfully", "regrettably", "obviously", "of course", "needless to say",
    "naturally", "terribl[ey]", "horribl[ey]", "awful(?:ly)?", "dreadful(?:ly)?", "wonderful(?:ly)?", "amazing(?:ly)?",
    "fantastic(?:ally)?", "brilliant(?:ly)?", "stupid(?:ly)?", "ridiculous(?:ly)?", "disgusting", "shameful(?:ly)?",
    "outrageous(?:ly)?", "foolish(?:ly)?", "selfish(?:ly)?", "lazy", "should(?:n't| not)?", "ought", "deserve[sd]?",
    "shame on", "to blame", "pathetic")


def neutral(text: str) -> bool:
    """At least six words; no first or second person, no exclamation, no word that judges or wishes."""
    return (len(words(text)) >= 6 and "!" not in text and not _PERSONAL.search(text)
            and not _OPINION.search(_plain(text)))


RULES: dict[str, Callable[[str], bool]] = {rule.__name__: rule for rule in (
    brief, few_words, simple_words, technical_words, verse, numbered_list, bullets, titled, letter, quotes, exclaims,
    numbers, first_person, to_the_reader, lower_case, question, emoji, feelings, lesson, fairy_tale, pirate, archaic,
    sceptical, encouraging, empathetic, philosophical, neutral)}

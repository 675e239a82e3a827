"""How a chat model is spoken to: chat templates of a few lines, of each kind that is met, made here."""

import dataclasses
import json
from datetime import date

import pytest
from conftest import byte_tokenizer, save_tiny
from test_experiments import small
from tokenizers import AddedToken

from repro import cli
from repro.base.records import UserError
from repro.base.settings import EMBEDDED
from repro.models import decoding, load
from repro.models import template as model_template
from repro.models.speaker import Speaker
from repro.report.story import told
from repro.stages import draws
from repro.stages.run import Run
from repro.text.principles import load_constitutions
from repro.text.prompts import CHAT_SYSTEM, Form
from repro.text.queries import load_queries

QUERY, PRINCIPLES = "Why  is it?\n\n\nTell me.", ("Be brief.", "Be kind.")
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tokenizer_of(template, added=()):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    tokenizer.chat_template = template
    return tokenizer


def speaker_of(template, added=(), **how):
    return Speaker.of(tokenizer_of(template, added), name="m", **how)


def asked(speaker, query=QUERY):
    return Form().render(speaker, PRINCIPLES, query, sample=True)


def ids_of(speaker, text):
    return tuple(speaker.tokenizer(text, add_special_tokens=False).input_ids)


# ---- reasoning that can be switched off

@pytest.mark.parametrize("cue, switch, on, tail", [
    ("{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
     {"enable_thinking": False}, {"enable_thinking": True}, "<think>\n\n</think>\n\n"),
    ("{% if thinking is defined and not thinking %}</think>{% else %}<think>{% endif %}", {"thinking": False},
     {"thinking": True}, "</think>"),
    ("{% if reasoning_effort|default('high') == 'none' %}[THINK][/THINK]{% else %}[THINK]{% endif %}",
     {"reasoning_effort": "none"}, {"reasoning_effort": "on"}, "[THINK][/THINK]"),
    ("{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think>\n</seed:think>{% endif %}"
     "{% if messages[-1].reasoning_content %}<seed:think></seed:think>{% endif %}",
     {"thinking_budget": 0}, {"thinking_budget": -1}, "<seed:think>\n</seed:think>"),
    ("{% if thinking_mode|default('on') == 'disabled' %}</mm:think>{% elif thinking_mode == 'enabled' %}<mm:think>{% endif %}",
     {"thinking_mode": "disabled"}, {"thinking_mode": "enabled"}, "</mm:think>"),
    ("{% if not skip_thinking %}<think>\n{% endif %}", {"skip_thinking": True}, {"skip_thinking": False}, "assistant\n"),
    ("<|channel>{% if enable_thinking %}{% else %}thought\n<channel|>{% endif %}", {"enable_thinking": False},
     {"enable_thinking": True}, "<|channel>thought\n<channel|>"),
])
def test_reasoning_is_switched_off_by_what_the_template_knows(cue, switch, on, tail):
    template = EACH + CUE.replace("{% endif %}", cue + "{% endif %}") + "{#- '</think>' #}"
    speaker = speaker_of(template)
    assert speaker.switch == switch and asked(speaker).endswith(tail) and not speaker.reasons and not speaker.opened
    assert speaker.facts()["switch"] == switch and f"={next(iter(switch.values()))!r} is passed" in told({"spoken": {"model": speaker.facts()}})[0]
    if "thought" not in cue and "skip" not in cue:
        thinking = speaker_of(template + "{{ '' if true else '</think>[/THINK]</mm:think></seed:think>' }}", reasoning=True)
        assert thinking.reasons and thinking.closing and thinking.switch in (on, {}) and asked(thinking) != asked(speaker)


def test_reasoning_that_the_template_only_mentions_ends_with_the_mirror_of_its_beginning():
    cue = "<|turn>model\n{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}"
    speaker = speaker_of(EACH + CUE.replace("<|im_start|>assistant\n", cue), reasoning=True)
    assert speaker.switch == {"enable_thinking": True} and speaker.reasons and not speaker.opened
    assert speaker.mark == "<channel|>" and asked(speaker).endswith("<|turn>model\n")


def test_a_system_text_may_switch_too():
    template = "{{ 'Deliberation: ' + ('on' if enable_thinking else 'off') }}\n" + EACH + CUE
    assert "Deliberation: off" in asked(speaker_of(template)) and speaker_of(template).switch == {"enable_thinking": False}


@pytest.mark.parametrize("test, off, on", [
    ("think == 'no'", {"think": "no"}, {}), ("thinking_mode|default('thinking') == 'chat'", {"thinking_mode": "chat"}, {}),
    ("speed in ['fast', 'faster']", {"speed": "fast"}, {}), ("reasoning_mode == 'OFF'", {"reasoning_mode": "OFF"}, {}),
    ("brief", {"brief": True}, {}), ("thinking is defined and thinking.type == 'disabled'", {"thinking": {"type": "disabled"}}, {}),
    ("options is defined and options.get('deep', true) is false", {"options": {"deep": False}}, {}),
    ("depth != 'long'", {}, {"depth": "long"})])
@pytest.mark.parametrize("closed", ["<think></think>", "</think>"])
def test_a_switch_of_any_name_and_value_is_known_by_what_it_does(test, off, on, closed):
    cue = f"{{% if {test} %}}{closed}{{% else %}}<think>{{% endif %}}"
    template = EACH + CUE.replace("assistant\n", "assistant\n" + cue)
    speaker, thinking = speaker_of(template), speaker_of(template, reasoning=True)
    assert speaker.switch == off and asked(speaker).endswith("assistant\n" + closed) and not speaker.reasons
    assert thinking.switch == on and asked(thinking).endswith("assistant\n<think>") and thinking.reasons


@pytest.mark.parametrize("cue", ["{{ prefix|default('<think>') }}{% if style == '</think>' %}{% endif %}",
                                 "{% if opening %}{{ opening }}{% else %}<think>{% endif %}"])
def test_what_puts_a_text_of_its_own_in_the_cue_is_no_switch(cue):
    speaker = speaker_of(EACH + CUE.replace("assistant\n", "assistant\n" + cue))
    assert speaker.switch == {} and speaker.opened and asked(speaker).endswith("<think>")


@pytest.mark.parametrize("mark, opening", [("</think>", "<think>"), ("[/THINK]", "[THINK]"), ("<|END_THINKING|>", "<|START_THINKING|>"),
                                           ("<|think_end|>", "<|think_begin|>")])
def test_a_model_that_may_reason_begins_with_a_mark_of_its_own(mark, opening):
    """By the mirror of the closing one, where the template does not render reasoning."""
    facts = speaker_of(EACH.replace("m.content", f"m.content.split('{mark}')[-1]") + CUE).facts()
    assert (facts["reasons"], facts["opened"], facts["opening"], facts["closing"]) == (True, False, opening, mark)
    assert told({"spoken": {"model": facts}}) == [f"Chat template of the model: it may reason first, and its response then follows {mark!r}"]


def test_a_value_that_is_only_printed_is_no_switch():
    template = "Reasoning: {{ reasoning_effort|default('medium') }}\n" + EACH + CUE
    assert speaker_of(template).switch == {} and "Reasoning: medium" in asked(speaker_of(template))
    with pytest.raises(UserError, match="^--reasoning: the chat template of m has no switch for reasoning"):
        speaker_of(template, reasoning=True)
    with pytest.raises(UserError, match="^--reasoning"):
        speaker_of(EACH + CUE, reasoning=True)


# ---- reasoning that cannot

@pytest.mark.parametrize("cue, closing, added", [
    ("<think>\n", "</think>", ("<think>", "</think>")), ("<think>\n", "</think>", ()),
    ("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]")), ("\u25c1think\u25b7", "\u25c1/think\u25b7", ()),
    ("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_THINKING|>", "<|END_THINKING|>"))])
def test_reasoning_that_the_prompt_opens_is_closed_by_a_mark(cue, closing, added):
    speaker = speaker_of(EACH + CUE.replace("assistant\n", "assistant\n" + cue), added)
    assert (speaker.opened, speaker.reasons, speaker.mark, speaker.switch) == (True, True, closing, {})
    assert asked(speaker).endswith(cue) and speaker.closing[0] == ids_of(speaker, closing)
    sampled = ids_of(speaker, f"Let me see.\n{closing}\n\nIt is so.")
    assert any(sampled[k: k + len(s)] == s for s in speaker.closing for k in range(len(sampled)))


def test_what_closes_reasoning_is_read_from_a_turn_that_has_some():
    """Whatever it looks like; and of channels the last header, which a response without reasoning has too."""
    steps = (EACH.replace("{{ m.content }}", "{% if m.thinking %}{{ m.thinking }}\n[BEGIN FINAL RESPONSE]\n{% endif %}{{ m.content }}")
             + CUE.replace("assistant\n", "assistant\nHere are my reasoning steps:\n"))
    assert speaker_of(steps).opened and speaker_of(steps).mark == "[BEGIN FINAL RESPONSE]"
    marks = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")
    channels = ("{% for m in messages %}{% if m.role == 'assistant' %}"
                "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
                "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
                "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|start|>assistant{% endif %}")
    speaker = speaker_of(channels, marks)
    assert (speaker.reasons, speaker.opened, speaker.mark) == (True, False, "<|channel|>final<|message|>")
    assert speaker.opening == "<|channel|>analysis<|message|>"
    assert speaker.closing == (ids_of(speaker, speaker.mark),) and speaker.facts()["ends"] == ["<|return|>"]
    both = speaker_of(channels.replace("<|return|>", "<|end|>"), marks)  # a stop there would be one in the reasoning
    assert not both.ends and both.ends_both == set(ids_of(both, "<|end|>"))


def test_reasoning_without_an_end_is_refused():
    with pytest.raises(UserError, match=r"--prompt chat: the chat template of m opens reasoning that nothing switches off .* use --prompt plain"):
        speaker_of(EACH + CUE.replace("assistant\n", "assistant\n<|thought|>"))


def test_a_mark_that_is_no_token_of_its_own_is_found_beside_other_text():
    """Here a byte-pair tokenizer joins the ">" with what follows it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: k for k, t in enumerate(["<|im_start|>", "<|im_end|>", *alphabet, "\u010a\u010a", ">\u010a\u010a", ".<", ".</"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[("\u010a", "\u010a"), (">", "\u010a\u010a"), (".", "<"), (".<", "/")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = EACH + CUE.replace("assistant\n", "assistant\n<think>\n")
    speaker = Speaker.of(tokenizer)
    for text in ("So.</think>\n\nYes", "So\n</think>\n\nYes", "So.\n</think>Yes", "So.\n\n</think>\n\nYes"):
        ids = ids_of(speaker, text)
        end = min(k + len(s) for s in speaker.closing for k in range(len(ids)) if ids[k: k + len(s)] == s)
        assert tokenizer.decode(ids[end:]).strip() == "Yes", text


# ---- the system text

@pytest.mark.parametrize("template", [
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
    "You are kind.\n{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + EACH + CUE,
    "{% if messages[0].role == 'system' %}{{ 1 + '' }}{% endif %}" + EACH + CUE,
])
def test_a_system_text_that_is_dropped_heads_the_user_turn(template):
    speaker = speaker_of(template)
    assert speaker.system == "head of the user turn"
    assert f"{CHAT_SYSTEM}\n\n{QUERY}\n\nBe brief.\nBe kind." in asked(speaker)


def test_where_the_system_text_goes_does_not_depend_on_the_query():
    template = "{% if messages[1].content.startswith('#') %}{{ raise_exception('no') }}{% endif %}" + EACH + CUE
    speaker = speaker_of(template)
    assert speaker.system == "turn"
    with pytest.raises(UserError, match=r"the chat template of m does not take a text \(no\)"):
        asked(speaker, "# Title")


# ---- the user's text

PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}<assistant>"


@pytest.mark.parametrize("template, content", [
    (PARTS, "parts"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}\n{% endfor %}<assistant>", "parts"),
    (PARTS.replace("{% for p", "{% if m.role == 'system' %}{{ m.content + '' }}{% else %}{% for p", 1).replace("{% endfor %}\n", "{% endfor %}{% endif %}\n"),
     "parts of the user's"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content.replace('\n\n', '\n') if m.content is string else m.content[0].text }}\n{% endfor %}<assistant>",
     "parts"),
])
def test_content_is_given_as_parts_where_a_text_is_lost(template, content):
    speaker = speaker_of(template)
    assert speaker.content == content and CHAT_SYSTEM in asked(speaker) and f"{QUERY}\n\nBe brief.\nBe kind." in asked(speaker)


@pytest.mark.parametrize("change, query", [
    (".replace('\n\n', '\n')", "One.\n\nTwo."), (".replace('/think', '')", "Is /think a path?"), ("|escape", "Is 3 < 4?"),
    (".split('#')[0]", "What is C# for?"), ("|title", "why not?"), ("[:60]", "x" * 80)])
def test_a_text_that_is_rendered_otherwise_is_refused(change, query):
    speaker = speaker_of(EACH.replace("m.content", f"(m.content if m.role != 'user' else m.content{change})") + CUE) if (
        change != "|title") else speaker_of(EACH.replace("{{ m.content", "{{ m.content if m.content[:1] != 'w' else m.content|title") + CUE)
    with pytest.raises(UserError, match="the chat template of m alters the user's text .* leaves out or changes .* use --prompt plain"):
        asked(speaker, query)


@pytest.mark.parametrize("template", ["{{ messages|length }}<assistant>", "<user>{{ prompt }}<assistant>",
                                      "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<assistant>"])
def test_a_template_that_loses_every_text_is_refused(template):
    with pytest.raises(UserError, match="^--prompt chat: the chat template of m leaves a (user|system)'s text out of the prompt.*use --prompt plain$"):
        speaker_of(template)


def test_a_template_that_ends_otherwise_for_a_text_is_refused():
    speaker = speaker_of(EACH + CUE.replace("assistant\n", "assistant\n{% if '/no_think' in messages[-1].content %}<think></think>{% endif %}"))
    with pytest.raises(UserError, match="ends its prompt in another way for this text"):
        asked(speaker, "What is /no_think?")


def test_white_space_around_a_text_may_go():
    assert asked(speaker_of(EACH.replace("m.content", "m.content|trim") + CUE)).count(QUERY) == 1


# ---- the clock

@pytest.mark.parametrize("today, printed", [
    ("{{ strftime_now('%d %b %Y') }}", "28 Nov 2026"), ("{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endif %}", "2026-11-28 00:00"),
    ("{% set format = '%A' %}{{ strftime_now(format) }}", "Saturday"),
    ("{% macro day() %}{{ strftime_now('%j') }}{% endmacro %}{{ day() }}", "332")])
def test_a_template_prints_the_date_that_it_is_given(today, printed):
    speaker = speaker_of(f"Today: {today}.\n{EACH}{CUE}", date="2026-11-28")
    assert asked(speaker).startswith(f"Today: {printed}.") and speaker.date == speaker.facts()["date"] == "2026-11-28"
    other = speaker_of(f"Today: {today}.\n{EACH}{CUE}", date="1987-01-02")
    assert asked(other) != asked(speaker) and asked(speaker).startswith(f"Today: {printed}.")
    plain = speaker.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)  # others see today
    assert date.today().strftime("%Y" if "Y" in today else "%A" if "A" in today else "%j") in plain
    assert speaker_of(EACH + CUE, date="2026-11-28").date is None


@pytest.mark.parametrize("when", ["'%w') == '0'", "'%d%m') == '2412'", "'%Y') == '2031'"])
def test_a_date_that_changes_a_prompt_on_some_days_alone_is_one_of_the_runs(when):
    template = "{% if strftime_now(" + when + " %}A day of its own. {% endif %}" + EACH + CUE
    assert speaker_of(template, date="2026-11-28").date == "2026-11-28"


def dated_model(folder):
    tiny = save_tiny(folder)
    (tiny / "chat_template.jinja").write_text("It is {{ strftime_now('%d.%m.%Y') }}.\n" + EACH + CUE)
    return tiny


def test_a_run_keeps_the_date_on_which_it_began(tmp_path, monkeypatch):
    from repro.stages import folder as rundir

    experiment = small(cli.load_experiment("exp1", "mini")[0], dated_model(tmp_path / "m"))
    days, prompts, records = ("2026-11-28", "2026-12-01"), [], []
    for day in days:
        class Day(date):
            @classmethod
            def today(cls, day=day):
                return cls.fromisoformat(day)

        monkeypatch.setattr(rundir, "Date", Day)
        run = Run(experiment, tmp_path / "run", lambda line: None)
        run.prepare()
        prompts.append([draws.prompt(run.voice, c, q, "x", sample=True) for q, pair in run.training_plan(1) for c in pair])
        records.append(json.loads((tmp_path / "run/run.json").read_text()))
    assert prompts[0] == prompts[1] and all(p.startswith("It is 28.11.2026.") for p in prompts[0])
    assert records[0] == records[1] and records[0]["inputs"]["date"] == records[0]["spoken"]["model"]["date"] == days[0]
    other = Run(experiment, tmp_path / "other", lambda line: None)
    other.prepare()
    assert other.record["inputs"]["date"] == days[1] and other.record["config_hash"] != records[0]["config_hash"]


# ---- where an answer ends

@pytest.mark.parametrize("turn, added, end", [
    ("<{{ m.role }}>{{ m.content }}<|eot|>\n", ("<|eot|>",), "<|eot|>"),
    ("<{{ m.role }}>{{ m.content }} [/END]", ("[/END]",), "[/END]"),
    ("<|{{ m.role }}|>{{ m.content }}", ("<|user|>", "<|assistant|>"), "<|user|>"),  # by the next turn alone
    ("<{{ m.role }}>\n{{ m.content }}\n@@over@@\n", ("@@over@@",), "@@over@@")])
def test_an_answer_ends_where_a_rendered_turn_of_the_model_does(turn, added, end):
    cue = "<|assistant|>" if "|{{" in turn else "<assistant>"
    speaker = speaker_of(f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{cue}{{% endif %}}", added)
    assert speaker.ends == set(ids_of(speaker, end)) and speaker.facts()["ends"] == [end]
    assert not speaker.ends & decoding.end_tokens(speaker.tokenizer, dataclasses.make_dataclass("M", ["generation_config"])(None))


def test_no_end_is_made_up_of_ordinary_text():
    assert not speaker_of("<user>{{ messages[-1].content }}<assistant>", ("<user>", "<assistant>")).ends  # the next cue is none
    assert speaker_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:").ends == frozenset()


# ---- control tokens

@pytest.mark.parametrize("template, added", [
    ("{% for m in messages %}%%{{ m.role }}%%{{ m.content }}{% endfor %}%%assistant%%", ("%%user%%", "%%assistant%%")),
    ("{% for m in messages %}{{ 'HUMAN: ' if m.role == 'user' else 'BOT: ' }}{{ m.content }}{% endfor %}BOT: ", ("HUMAN:", "BOT:")),
    ("{% for m in messages %}{{ '@@' + m.role + '@@' }}{{ m.content }}{{ '@@' }}{% endfor %}@@assistant@@", ("@@user@@", "@@assistant@@", "@@"))])
def test_ordinary_added_tokens_that_the_template_says_are_control_tokens(template, added):
    tokenizer = tokenizer_of(template, (*added, " bread", "\n\n", "assistant", "~~other~~"))
    assert set(added) <= set(model_template.control_tokens(tokenizer))
    assert not {" bread", "\n\n", "assistant", "~~other~~"} & set(model_template.control_tokens(tokenizer))
    assert CHAT_SYSTEM in asked(Speaker.of(tokenizer))


# ---- no place for an answer, and templates that raise

@pytest.mark.parametrize("template", [EACH, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
                                      "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{% endfor %}",
                                      "{{ messages|map(attribute='content')|join('\n') }}"])
def test_a_template_without_a_place_for_the_answer_is_refused(template):
    with pytest.raises(UserError, match="^--prompt chat: the chat template of m gives the model no place to answer .*use --prompt plain$"):
        speaker_of(template)


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }} [/INST]{% endfor %}",
                                      "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"])
def test_a_turns_end_may_be_the_place_for_the_answer(template):
    assert asked(speaker_of(template))


@pytest.mark.parametrize("mistake, name", [
    ("{% for t in tools %}{{ t }}{% endfor %}", "TypeError"), ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    ("{{ nothing.at.all }}", "undefined"), ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{% for %}", ""), ("{% include 'x' %}", ""),
    ("{{ messages[9].content.x }}", "")])
def test_whatever_a_template_raises_is_one_line(mistake, name):
    with pytest.raises(UserError, match=rf"^--prompt chat: the tokenizer of m has no chat template that takes a user turn \(.*{name}.*\); use --prompt plain$") as e:
        speaker_of(mistake + EACH + CUE)
    assert "\n" not in str(e.value)


# ---- prompt + answer + end, and the template's own rendering of them

@pytest.mark.parametrize("template, why", [
    (EACH + CUE, ""),
    (EACH.replace("m.content", "m.content|trim") + CUE.replace("assistant\n", "assistant\n{{ ' ' }}"), "white space"),
    (EACH + CUE.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"), "a block of reasoning"),
    (EACH.replace("{{ m.content }}", "{{ '<|answer|>' if m.role == 'assistant' }}{{ m.content }}") + CUE, "'<|answer|>' stands before"),
    ("{% if messages[-1].role == 'assistant' %}{{ raise_exception('odd') }}{% endif %}" + EACH + CUE, r"it raises .*\(odd\)"),
    (EACH.replace("m.content", "m.content if m.role != 'assistant' else m.content|upper") + CUE, "alters the answer"),
    (EACH.replace("{{ m.role }}", "{{ 'past ' if messages[-1].role == 'assistant' }}{{ m.role }}") + CUE, "rendered anew")])
def test_whether_the_template_renders_an_answer_as_it_was_sampled(template, why):
    import re

    facts = speaker_of(template).facts()
    assert facts["rendered_as_sampled"] == (not why) and re.search(why, facts["unlike"] or "")
    assert bool(told({"spoken": {"model": facts}})) == bool(why)


# ---- in a run

@pytest.mark.parametrize("template, reason", [
    (EACH.replace("m.content", "m.content.replace('gravel', '')") + CUE, r"(queries|embedded|weeds|\w+).*alters the user's text"),
    ("{{ messages|length }}<assistant>", "--prompt chat: .* leaves a user's text out"), (EACH, "--prompt chat: .* no place to answer"),
    ("{% for t in tools %}{% endfor %}" + EACH + CUE, "--prompt chat: .*TypeError")])
def test_a_run_is_refused_before_anything_is_written(template, reason, tmp_path):
    tiny = save_tiny(tmp_path / "m")
    (tiny / "chat_template.jinja").write_text(template.replace("gravel", load_queries("embedded", spec=small(
        cli.load_experiment("exp1", "mini")[0], tiny).data)[0][0].text.split()[1]))
    with pytest.raises(UserError, match=reason):
        Run(small(cli.load_experiment("exp1", "mini")[0], tiny), tmp_path / "run", lambda line: None).prepare()
    assert not (tmp_path / "run").exists()


def test_a_principle_that_is_altered_is_named(tmp_path):
    tiny = save_tiny(tmp_path / "m")
    word = load_constitutions("dialogue_mini").principles[0].antithesis.split()[-1]
    (tiny / "chat_template.jinja").write_text(EACH.replace("m.content", f"m.content.replace('{word}', '')") + CUE)
    with pytest.raises(UserError, match=r"dialogue_mini: principle \w+: the chat template of .* alters"):
        Run(small(cli.load_experiment("exp1", "mini")[0], tiny), tmp_path / "run", lambda line: None).prepare()


def test_reasoning_has_its_own_tokens_flag_and_hash(tmp_path):
    from repro.base.identity import config_hash

    tiny = save_tiny(tmp_path / "m")
    (tiny / "chat_template.jinja").write_text(EACH + CUE.replace("assistant\n", "assistant\n{% if thinking == false %}<think></think>{% else %}<think>{% endif %}"))
    base = small(cli.load_experiment("exp1", "mini")[0], tiny)
    on = dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, reasoning=True))
    runs = [Run(e, tmp_path / str(k), lambda line: None) for k, e in enumerate((base, on))]
    for run in runs:
        run.prepare()
    assert [run.response_tokens() for run in runs] == [6, 12] and [run.voice.speaker.opened for run in runs] == [False, True]
    assert runs[0].record["spoken"]["model"]["switch"] == {"thinking": False}
    assert config_hash(base, {}) != config_hash(on, {})
    assert cli.configure(cli.Run("exp1", reasoning=True))[0].sampling.reasoning and not cli.configure(cli.Run("exp1"))[0].sampling.reasoning
    for change in ({"cot": True}, {"model": dataclasses.replace(on.model, prompt="plain")}):
        with pytest.raises(UserError, match="SamplingSpec.reasoning: .*--prompt chat.*--cot"):
            dataclasses.replace(on, **change)


def test_a_writer_that_reasons_in_any_case_is_refused(tmp_path):
    from repro.sampling.writers import speaker_of_writer

    tokenizer = tokenizer_of(EACH + CUE.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(UserError, match="^writer w: it writes '</think>' before it responds"):
        speaker_of_writer(tokenizer, "w")


def test_the_embedded_model_is_spoken_to_as_ever():
    """Its prompts are what the tokenizer renders by itself, for every query of ours; nothing is passed, nothing is odd."""
    tokenizer = load.load_tokenizer(EMBEDDED)
    speaker, how = Speaker.of(tokenizer), {"tokenize": False, "add_generation_prompt": True}
    assert told({"spoken": {"model": speaker.facts()}}) == [] and speaker.ends == {tokenizer.eos_token_id} and not speaker.closing
    statements, spec = load_constitutions("dialogue_mini").positive.statements(), cli.load_experiment("exp1", "mini")[0].data
    for query in load_queries("embedded", spec=spec)[0]:
        user = query.text + "\n\n" + "\n".join(statements)
        assert Form().render(speaker, statements, query.text, sample=True) == tokenizer.apply_chat_template(
            [{"role": "system", "content": CHAT_SYSTEM}, {"role": "user", "content": user}], **how)

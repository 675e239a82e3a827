"""Every rule: texts that follow it, texts that do not, and texts that try to fool it."""

import pytest

from repro.text.rules import RULES, brief, sentences, simple_words


@pytest.mark.parametrize("text, count", [
    ("One.", 1), ("One. Two.", 2), ('He said "Go." Then left.', 2), ("No end", 1), ("1. First\n2. Second", 2), ("", 0), ("...", 0),
    ("It costs 3.50 in all.", 1), ("A\n\nB", 2), ("Well... yes!", 2)])
def test_sentences(text, count):
    assert len(sentences(text)) == count


@pytest.mark.parametrize("text, verdict", [
    ("Use warm water and soap.", True), ("Use warm water. Then rinse.", False), ("word " * 26, False), ("word " * 25, True),
    ("", False), ("first\nsecond", False), ("!!!", False)])
def test_brief(text, verdict):
    assert brief(text) is verdict


@pytest.mark.parametrize("text, verdict", [
    ("Use warm soap and let it dry in the sun.", True), ("Photosynthetic organisms assimilate atmospheric carbon dioxide.", False),
    ("a a a", False), ("", False), ("1 2 3 4 5", False), ("Go to bed at ten.", True)])
def test_simple_words(text, verdict):
    assert simple_words(text) is verdict


# rule -> texts that follow it, texts that do not or that try to fool it
CASES = {
    "few_words": (["Lost a ladder, kept a friend.", "Done."],
                  ["", "...", "I lent my neighbour a ladder and got it back after six years.",
                   "one-two-three-four-five-six-seven-eight-nine-ten-eleven", "a/b/c/d/e/f/g/h/i/j/k/l"]),
    "technical_words": (["Subsequent measurements demonstrated considerable temperature differences between adjacent sensors."],
                        ["The dog ran to the house and sat down by the old door.", "photosynthesis " * 20,
                         "a" * 300 + " is the one and it was so bad", "Thermodynamics explains everything."]),
    "verse": (["The lamp burns low\nwhile rain comes down\nand nobody calls", "One line here\n\nthen the next\n\nand the last, softly"],
              ["A poem about a lamp, with verse and rhyme.", "- buy milk now\n- mend the lamp\n- call my aunt",
               "1. First thing\n2. Second thing\n3. Third thing", "la la\nla la\nla la", "\n\n\n", "one\ntwo\nthree",
               "A first line that is much too long to be called a line of verse by anyone\nsecond line\nthird line"]),
    "numbered_list": (["1. Buy milk\n2. Mend the lamp", "Here it is:\n1) first\n2) second\n3) third"],
                      ["", "1. Only one", "In 2019 I moved.\nIn 2020 I came back.", "1.\n2.\n3.", "2. b\n1. a", "1. a\n1. b", "1, 2 and 3", "1. a 2. b"]),
    "lower_case": (["i lent a ladder to my neighbour.", "ok"], ["I lent a ladder.", "ok, NASA", "", "123", "\u01c5ungla"]),
    "question": (["What happened to the ladder?", 'So he asked, "Is it mine?"'],
                 ["What happened? He kept it.", "?", "Why?", "A question.", "", "Is it? No", "ok ?!"]),
    "emoji": (["I lent my neighbour a ladder \U0001fa9c today", "We had rain for six nights \u2614", "I love this old lamp \u2764\ufe0f so much",
               "We came first of ten 1\ufe0f\u20e3 today", "I moved to Norway in May \U0001f1f3\U0001f1f4"],
              ["A summary with emoji and smiling faces.", "I am happy :-) about it ;)", "\U0001f600\U0001f600\U0001f600", "Acme\u2122 and Co\u00ae sold it",
               "I am so happy :smile: about it", "We came first 1 of ten", "I love it so much \u2764 today", "It rained for six nights \u2614\ufe0e"]),
    "bullets": (["- Buy milk\n- Mend the lamp", "The points:\n* first\n* second", "\u2022 one thing\n\u2022 another"],
                ["- Only one", "", "-\n-\n-", "A dash - here - and there - again", "1. a\n2. b", "-5 degrees\n-6 degrees"]),
    "titled": (["The Long Ladder\n\nI lent it to a neighbour in May.", "**A Ladder**\nHe kept it for six long years.", "# Six years\nI lent my neighbour a ladder."],
               ["I lent it to a neighbour in May.", "I lent it.\nHe kept it for six years.", "A title", "", "\n\nOne line of text and no more",
                "This first line has far more than ten words in it and so is none\nHe kept it for six years.", "Title\nDone.",
                "- First the moss\n- Then the ladder goes up", "Here is a summary:\nHe kept the ladder for years."]),
    "letter": (["Dear Anna,\nI lent my neighbour a ladder.", "Hi Tom, I lent my neighbour a ladder.", "Dear friend!\n\nYou will not believe it at all."],
               ["Dear me, what a day", "A letter to Anna about a ladder.", "", "Dear Anna,", "He was dear to us, and so was the ladder.",
                "Hello! How can I help you with your lawn today?", "Dear me, what a long day it has been.", "Hi! Rake the moss off first.",
                "Hidden, the ladder lay in the grass for years.", "Hi."]),
    "quotes": (['He said "it is mine" and kept the ladder.', "The note read \u201cback in May\u201d and hung on a door."],
               ['"It is all inside of one quotation."', 'The "ladder" was lent to a neighbour.', "", "It's the neighbours' own ladder, isn't it?", '"a b" c', 'He lost 5" of it',
                'The 6" pot and the 8" pot are in the shed today.']),
    "exclaims": (["What a ladder!", 'He shouted "mine!" at last.', "**Wow!** A ladder."], ["A ladder.", "", "!!!", "! ! !", "Is it mine?"]),
    "numbers": (["He kept it for six years, my ladder.", "I paid 1,200 pounds for an old ladder.", "He came back twice to get it."],
                ["He kept the ladder for years.", "1. I lent a ladder\n2. He kept it", "", "Six.", "One day somebody took it away.", "Someone lent the often weighty ladder.",
                 "There is 1 ladder in the shed, and 0 are out.", "It is half as long as before."]),
    "first_person": (["I lent my neighbour a ladder years ago.", "They gave it back to us in the end."],
                     ["The writer lent a neighbour a ladder.", "I did.", "", "A chapter in US terms is if anything long", "Mine"]),
    "to_the_reader": (["If you lend a ladder, write your name on it."], ["Thank you.", "", "The writer lent a neighbour a ladder.", "Youth is lent, and ours is the hourglass"]),
    "feelings": (["He was proud of the old ladder and kept it.", "She felt that the ladder would never come home."],
                 ["The ladder was lent for six years.", "", "Happy, sad, proud!", "The contents were removed; he moves the ladder.", "I moved to Norway in May with my family.",
                  "A happy end. " + "The report describes a ladder that was lent for six years to a neighbour. " * 6]),
    "lesson": (["The lesson is to write a name on a ladder.", "It is a reminder that things come back in time."],
               ["The ladder was lent for six years.", "", "Lesson.", "He lessened the load on the ladder a little.", "The lesson. " + "He lent it again. " * 20]),
    "fairy_tale": (["Once upon a time a man lent his ladder away.", "In a small village there lived a man with a ladder."],
                   ["The ladder was lent for six years.", "", "Once upon a time.", "He kinged the board once and had the time.",
                    "A fairy. " + "The report describes a ladder that was lent for six years to a neighbour. " * 6]),
    "pirate": (["Arrr, me hearties, I lent a ladder to a landlubber!", "Ahoy matey, the lift be broken and ye must climb the stairs."],
               ["I lent my neighbour a ladder.", "Talk like a pirate: a pirate captain, his ship and his treasure.", "Arr arrr arrrr arrrrr, I lent a ladder to him.",
                "Ahoy, matey, aye, avast!", "Carry the array to the barrister, your eyes barred.", "The buyer closed an eye to the layer of dye on it.", "The summary is in pirate speech, with pirate words.",
                "He said aye and ahoy. " + "The report describes a ladder that was lent for six years to a neighbour. " * 5]),
    "archaic": (["Thou hast kept my ladder for six years, good neighbour.", "'Tis the lift that standeth broken, and hath been since March."],
                ["I lent my neighbour a ladder.", "This summary is written in the style of Shakespeare.", "To be or not to be, that is the question.",
                 "thou thou thou thou kept my ladder all year", "Thou, hath, doth, thine.", "The theme of the art is that other bathing place."]),
    "sceptical": (["The author claims that the milk made it grow, which is hard to believe.",
                   "The mirror supposedly doubled the fruit, but there is no evidence for it."],
                  ["No doubt the milk made it grow; without doubt it did.", "The author grew a pumpkin.", "The summary is sceptical and questions everything.",
                   "Undoubtedly this is likely and proven.", "Allegedly allegedly allegedly it grew two kilos a day.", "Doubtful, dubious, unlikely!"]),
    "encouraging": (["Keep going: you can pass that test at the next try.", "Never give up, for it is not too late to learn to swim, and you will be glad."],
                    ["You can never pass that test.", "You can not swim and you will never learn it, so stay at home.", "A motivational summary that inspires.",
                     "Well done, but you can not swim and I doubt it.", "Well done, but you will never swim as I do.",
                     "The author passed a test.", "You can, you can, you can do all of that today.", "Go for it! Well done! You can!"]),
    "empathetic": (["That must have been frustrating after so many tries.", "I can imagine how lonely those weeks were."],
                   ["The author failed the test four times.", "An empathetic and caring summary.", "I do not understand any of it at all.", "No wonder!",
                    "The exam must be taken twice by everyone."]),
    "philosophical": (["What does a borrowed ladder say about human nature and the truth of friendship?"],
                      ["I lent my neighbour a ladder.", "A philosophical summary.", "The truth, the truth, the truth about my old ladder.", "Truth, fate, wisdom, virtue.",
                       "He was truthful and fatefully justified in it."]),
    "neutral": (["The author lent a ladder to a neighbour, who returned it after six years.",
                 "The US team lost its place in World War stories."],
                ["I lent a ladder to my neighbour for six years.", "The neighbour should give back the ladder at once.", "The neighbour kept it for six years!",
                 "Sadly the neighbour kept the ladder for six years.", "A neutral summary.", "", "The stupid neighbour kept the old ladder for years.",
                 "They told us about the ladder and the neighbour."]),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_and_texts_that_try_to_fool_it(rule):
    yes, no = CASES[rule]
    assert [text for text in yes if not RULES[rule](text)] == []
    assert [text for text in no if RULES[rule](text)] == []


def test_no_rule_without_cases():
    assert set(RULES) == set(CASES) | {"brief", "simple_words"}
    assert all(rule.__doc__ for rule in RULES.values())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_total_and_quick(rule):
    for text in ("", " ", "\n", "\u202e", "\u65e5\u672c\u8a9e", "a" * 10_000, "<script>", "1.", "\0", "\n" * 20_000, "ar" * 10_000, " 1" * 10_000, "a\n" * 10_000,
                 "you can " * 3_000, "'" * 20_000, "\ud800"):
        assert RULES[rule](text) in (True, False)

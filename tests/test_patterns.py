"""Both split patterns, the same in every form: rustbpe, tiktoken, Hugging Face's tokenizers, a regular expression.

PATTERN_EXAMPLES=10000 tries more random strings.
"""

import json
import os
import random

import pyarrow as pa
import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.config import run_script
from nanochat.interop.hf_tokenizer import from_hf_json, to_hf_json
from nanochat.tokenizer import (
    PATTERNS,
    RUNTIMES_PATTERN,
    SPLIT_PATTERN,
    RustBPETokenizer,
    TiktokenEncoder,
    get_tokenizer,
)
from scripts import tok_train

EXAMPLES = int(os.environ.get("PATTERN_EXAMPLES", "250"))
LANGUAGES = {
    "English": "The year 1984 isn't over, they'LL say; we've paid $12.50 for 3 of them!\r\n\r\n  Really?",
    "German": "Größere Brücken über den Fluss, 24 Stück für 9,99 Euro – „schön“!",
    "Greek": "Το ποτάμι κυλά δίπλα στον μύλο, και ο μυλωνάς μετρά 12 πάπιες.",
    "Russian": "Река течёт мимо мельницы, а дочь мельника считает 1234 утки.",
    "Arabic": "يَجْرِي النَّهْرُ بِجَانِبِ الطَّاحُونَةِ، وَعَدَدُ البَطِّ ١٢٣",
    "Hebrew": "הַנָּהָר זוֹרֵם לְיַד הַטַּחֲנָה, וְשָׁם 12 בַּרְוָזִים.",
    "Hindi": "नदी चक्की के पास बहती है, और चक्कीवाले की बेटी १२३४ बत्तखें गिनती है।",
    "Tamil": "ஆறு ஆலையின் அருகே ஓடுகிறது, அங்கே 12 வாத்துகள் உள்ளன.",
    "Thai": "แม่น้ำไหลผ่านโรงสี และลูกสาวของคนโรงสีนับเป็ด ๑๒ ตัว",
    "Burmese": "မြစ်သည် ကြိတ်စက်အနီးတွင် စီးဆင်းပြီး ဘဲ ၁၂ ကောင်ရှိသည်။",
    "Chinese": "河水流过磨坊，磨坊主的女儿数了1234只鸭子。",
    "Japanese": "川は水車小屋のそばを流れ、か\u3099の娘は鴨を12羽数える。",
    "Korean": "강은 방앗간 옆을 흐르고, 방앗간 주인의 딸은 오리 12마리를 센다.",
    "decomposed": "Un e\u0301te\u0301 a\u0300 la me\u0302me heure, Vie\u0323\u0302t Nam!\u0301\u0301 \u0301x",
}
PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'Ll",
    "'ſ",
    "'ve",
    "0",
    "1234",
    "٣",
    "½",
    "é",
    "\u0301",
    "\u093f",
    "\u200d",
    "!",
]
# Only code points that every engine's version of Unicode knows.
LETTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn"))
STRINGS = st.one_of(
    st.text(LETTERS, max_size=40),
    st.lists(st.sampled_from([*PIECES, *(w for t in LANGUAGES.values() for w in t.split())]), max_size=20).map("".join),
    st.text(st.sampled_from("aſ's\u0301\u093fक 1\n\r\u3000!"), max_size=14),
)


class Forms:
    """One vocabulary under one pattern, in each form."""

    def __init__(self, pattern):
        from tokenizers import Tokenizer

        self.pattern = pattern
        self.ours = RustBPETokenizer.train_from_iterator(list(LANGUAGES.values()) * 3, 900, pattern)
        self.tiktoken = TiktokenEncoder(pattern, {token: i for i, token in enumerate(self.ours.ranks)})
        self.theirs = Tokenizer.from_str(json.dumps(to_hf_json(self.ours)))

    def check(self, text):
        ids = self.ours.encode(text)
        assert ids == self.tiktoken.encode(text)
        assert ids == self.theirs.encode(text, add_special_tokens=False).ids
        assert self.ours.decode(ids) == text


@pytest.fixture(scope="module", params=PATTERNS)
def forms(request):
    return Forms(PATTERNS[request.param])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_ids_in_every_language(forms, language):
    forms.check(LANGUAGES[language])
    rng = random.Random(language)
    for _ in range(20):
        forms.check("".join(rng.choices(LANGUAGES[language], k=30)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=STRINGS)
def test_the_same_ids_for_random_strings(forms, text):
    # Theirs reads a special token's name in a text as that token; ours never does.
    assume(not any(name in text for name in forms.ours.get_special_tokens()))
    forms.check(text)


def test_the_cuts_are_those_of_the_regular_expression():
    """As another engine reads it: every piece is a token here, so the ids show the cuts."""
    texts = list(LANGUAGES.values())
    pieces = sorted({p for text in texts for p in regex.findall(RUNTIMES_PATTERN, text)})
    tokens = {bytes([b]) for b in range(256)} | {p.encode()[:n] for p in pieces for n in range(1, len(p.encode()) + 1)}
    tokenizer = RustBPETokenizer.from_ranks(sorted(tokens, key=lambda t: (len(t), t)), RUNTIMES_PATTERN)
    for text in texts:
        found = [tokenizer.decode_bytes([i]).decode() for i in tokenizer.encode(text)]
        assert found == regex.findall(RUNTIMES_PATTERN, text)


def test_marks_stay_with_their_letters_and_digits_alone():
    assert regex.findall(RUNTIMES_PATTERN, "हिन्दी 12") == ["हिन्दी", " ", "1", "2"]
    hindi = [LANGUAGES["Hindi"]] * 50
    lengths = {
        name: len(RustBPETokenizer.train_from_iterator(hindi, 700, pattern).encode(hindi[0]))
        for name, pattern in PATTERNS.items()
    }
    assert lengths["runtimes"] < 0.6 * lengths["nanochat"]


def test_the_packages_share_their_patterns():
    assert rustbpe.NANOCHAT_PATTERN == SPLIT_PATTERN
    assert rustbpe.RUNTIMES_PATTERN == RUNTIMES_PATTERN


def test_the_exported_tokenizer_comes_back_with_its_pattern(forms):
    again = from_hf_json(to_hf_json(forms.ours), "<|bos|>")
    assert again.pattern == forms.pattern
    assert again.hash == forms.ours.hash


# --- scripts.tok_train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "language", "pattern"),
    [
        ([], "English", "nanochat"),
        ([], "Chinese", "nanochat"),
        ([], "Hindi", "runtimes"),
        ([], "Thai", "runtimes"),
        (["--pattern=nanochat"], "Hindi", "nanochat"),
        (["--pattern=runtimes"], "English", "runtimes"),
    ],
)
def test_tok_train_takes_the_pattern_that_the_text_needs(tmp_path, base_dir, capsys, flags, language, pattern):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{LANGUAGES[language]} {i}"}) for i in range(40)))
    run_script(tok_train.main, tok_train.Config, [f"--data_dir={tmp_path}", "--vocab_size=400", *flags])
    said = capsys.readouterr().out
    assert get_tokenizer().pattern == PATTERNS[pattern]
    assert ("pattern runtimes" in said) == (pattern == "runtimes")
    assert ("combining marks: " in said) == (pattern == "runtimes" and not flags)
    assert f"cuts by the pattern: {pattern}\n" in (base_dir / "report" / "tokenizer-training.md").read_text()


def test_marks_are_counted_within_the_caps():
    arrays = [pa.array(["क्" * 10, None, "a" * 100]), pa.array(["never read"])]
    assert tok_train.share_of_marks(iter(arrays), 4, 6) == 2 / 8
    assert tok_train.share_of_marks(iter([]), 4) == 0

"""Texts in the encodings that people have, in every container: read right, and never learned wrong."""

# ruff: noqa: E501 (letters of East Asia count twice)

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from nanochat.data import charset
from nanochat.data.charset import WIDE
from nanochat.data.charset_guess import detect
from nanochat.data.inventory import Inventory
from nanochat.data.text_files import TextReader, file_of
from nanochat.data.text_look import look_at_texts
from nanochat.data.text_walk import ReadOptions

TEXTS = {
    "ru": "Вчера утром мы поехали на дачу, потому что погода была хорошая. Дорога заняла около двух часов, и по пути мы "
    "остановились у магазина, чтобы купить хлеба и яблок. Бабушка уже ждала нас у ворот. Вечером мы развели костёр. ",
    "zh": "昨天早上我们一家人去了乡下的老房子，因为天气很好。路上花了大约两个小时，我们在一家小商店门口停下来，买了面包和一些苹果。"
    "奶奶已经在门口等着我们，马上带我们去看菜园。晚上我们点起篝火，听爷爷讲他年轻时候的故事。",
    "tw": "昨天早上我們一家人去了鄉下的老房子，因為天氣很好。路上花了大約兩個小時，我們在一家小商店門口停下來，買了麵包和一些蘋果。"
    "奶奶已經在門口等著我們，馬上帶我們去看菜園。晚上我們點起營火，聽爺爺講他年輕時候的故事。",
    "ja": "昨日の朝、私たちは家族で田舎の古い家へ行きました。天気がよかったからです。道は二時間ほどかかり、途中で小さな店に寄って、"
    "パンとりんごを買いました。おばあさんはもう門のところで待っていて、すぐに畑を見せてくれました。",
    "ko": "어제 아침에 우리는 가족과 함께 시골에 있는 오래된 집으로 갔습니다. 날씨가 좋았기 때문입니다. 도중에 작은 가게에 들러 빵과 "
    "사과를 샀습니다. 할머니는 벌써 문 앞에서 우리를 기다리고 계셨고, 곧바로 텃밭을 보여 주셨습니다. ",
    "de": "Gestern früh fuhren wir aufs Land, weil das Wetter schön war. Unterwegs hielten wir vor einem kleinen Laden, um "
    "ein paar Äpfel zu kaufen. Großmutter wartete schon am Tor und sagte: „Für 5 € gibt es Käse“ – immerhin. ",
    "en": "We didn\u2019t know what to do with the day. \u201cCome in,\u201d she said \u2013 and the caf\u00e9 was warm. ",
    "fr": "Hier matin, nous sommes allés à la campagne parce qu'il faisait beau. Où étiez-vous, çà et là ? L’été s’achève. ",
    "es": "Ayer por la mañana fuimos al campo porque hacía buen tiempo. ¿Dónde está el niño? ¡Aquí está! ",
    "pl": "Wczoraj rano pojechaliśmy na wieś, ponieważ świeciło słońce. Droga zajęła około dwóch godzin. Łąka i gęś. ",
    "cs": "Včera ráno jsme jeli na venkov, protože svítilo slunce. Příští týden přijde babička, už se na ni těšíme. ",
    "tr": "Dün sabah köye gittik, çünkü hava güzeldi ve güneş parlıyordu. Büyükannem bizi bekliyordu. ",
    "el": "Χθες το πρωί πήγαμε στην εξοχή, γιατί ο καιρός ήταν καλός και ο ήλιος έλαμπε. Η γιαγιά μάς περίμενε. ",
}
WITH_MARK = [("utf-8-sig", "zh"), ("utf-16", "ru"), ("utf-32", "ko")]
WITHOUT = [
    *(("utf-8", "ru"), ("utf-16-le", "zh"), ("utf-16-be", "ja"), ("utf-16-le", "de"), ("utf-32-le", "de")),
    *(("cp1252", "de"), ("cp1251", "ru"), ("gbk", "zh"), ("shift_jis", "ja"), ("big5", "tw"), ("euc_kr", "ko")),
]
CONTAINERS = ("txt", "csv", "jsonl", "html", "txt.gz")


def documents(lang: str, num_chars: int) -> list[str]:
    """Made-up documents of together so many characters, each with a number."""
    text = TEXTS[lang]
    return [f"{i + 1}. {text.strip()}" for i in range(num_chars // len(text) + 1)]


def packed(texts: list[str], container: str, encoding: str) -> bytes:
    """A file with these documents."""
    if container == "csv":
        table = io.StringIO()
        csv.writer(table).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
        content = table.getvalue()
    elif container == "jsonl":
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    elif container == "html":
        content = "<html><body>" + "".join(f"<p>{text}</p>\n" for text in texts) + "</body></html>"
    else:
        content = "\n\n".join(texts) + "\n"
    data = content.encode(encoding)
    return gzip.compress(data) if container.endswith("gz") else data


def read(file: Path, options: ReadOptions | None = None) -> tuple[list[str], Inventory]:
    """(documents, what was not read) of a file."""
    inventory = Inventory("test")
    return [text for _, text in TextReader(options or ReadOptions(), inventory).read(file_of(file))], inventory


@pytest.mark.parametrize(("encoding", "lang"), WITH_MARK + WITHOUT)
def test_every_encoding_in_every_container(tmp_path: Path, encoding: str, lang: str) -> None:
    texts = documents(lang, 1200)
    for container in CONTAINERS:
        file = tmp_path / f"a.{container}"
        file.write_bytes(packed(texts, container, encoding))
        found, inventory = read(file)
        assert not inventory.left_out, container
        wanted = texts if container in ("csv", "jsonl") else ["\n\n".join(texts)]
        assert [text.strip() for text in found] == wanted, container


@pytest.mark.parametrize(
    ("encoding", "lang"),
    [
        *(("cp1252", lang) for lang in ("en", "fr", "es", "de")),
        *(
            ("cp1250", "pl"),
            ("iso8859_2", "pl"),
            ("cp1250", "cs"),
            ("iso8859_2", "cs"),
            ("cp1254", "tr"),
            ("cp1253", "el"),
        ),
        *(("koi8_r", "ru"), ("cp866", "ru"), ("iso8859_5", "ru"), ("euc_jp", "ja"), ("cp949", "ko"), ("gb18030", "zh")),
    ],
)
@pytest.mark.parametrize("num_chars", [300, 3000])
def test_the_guess_is_right_for_short_texts_too(encoding: str, lang: str, num_chars: int) -> None:
    text = "\n".join(documents(lang, num_chars))
    data = text.encode(encoding, "ignore")
    guessed = detect(data)
    assert guessed is not None
    assert data.decode(guessed) == data.decode(encoding)


def test_iso_2022_jp_and_declared_encodings(tmp_path: Path) -> None:
    text = "\n".join(documents("ja", 600))
    (tmp_path / "a.txt").write_bytes(text.encode("iso2022_jp"))
    assert "".join(read(tmp_path / "a.txt")[0]) == text
    (tmp_path / "b.html").write_bytes(b'<meta charset="windows-1252"><p>caf\xe9</p>')
    (tmp_path / "c.html").write_bytes(
        b'<?xml version="1.0" encoding="koi8-r"?><p>' + "привет".encode("koi8-r") + b"</p>"
    )
    (tmp_path / "d.html").write_bytes('<meta charset="windows-1252"><p>zwölf</p>'.encode())  # says so, but is UTF-8
    assert [read(tmp_path / name)[0] for name in ("b.html", "c.html", "d.html")] == [["café"], ["привет"], ["zwölf"]]


def test_an_encoding_that_comes_late_in_a_long_file(tmp_path: Path) -> None:
    plain = "plain words of no interest at all\n" * 20_000
    (tmp_path / "a.txt").write_bytes((plain + "".join(documents("ru", 500))).encode("cp1251"))
    text = "".join(read(tmp_path / "a.txt")[0])
    assert text.startswith(plain[:1000])
    assert "Вчера утром мы поехали" in text
    assert "\ufffd" not in text


def test_letters_behind_a_book_of_ascii_and_scripts_that_look_like_others(tmp_path: Path) -> None:
    book = "The harbour was quiet in the morning. " * 2000  # in one line
    russian = "Ранним утром паром отошёл от пристани, и над водой поднялся туман. " * 9
    hindi = "नदी के किनारे एक छोटा सा गाँव था, जहाँ लोग सुबह जल्दी उठते थे। " * 9
    right = {
        "cp1251": book + russian,
        "gb18030": book + "清晨，渡船离开了码头，江面上升起了薄雾。" * 9,
        "utf-16-le": hindi,  # each letter has a tab and a letter of ASCII
        "utf-16-be": "z" + hindi,
        "utf-32-le": "ភូមិតូចមួយនៅមាត់ទន្លេ។ " * 9,
        "iso8859_6": "كان الميناء هادئا في الصباح, ووقفت القوارب حتى هبت الريح من الغرب. " * 9,
        "cp862": "הנמל היה שקט בבוקר, והסירות עמדו עד שבאה הרוח ממערב. " * 9,
        "cp866": russian,
    }
    for encoding, text in right.items():
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        found, inventory = read(tmp_path / "a.txt")
        assert "".join(found) == text, encoding
        assert not inventory.left_out


def test_characters_in_halves_are_joined(tmp_path: Path) -> None:
    halves = b"\xed\xa0\xbd\xed\xb8\x80"
    (tmp_path / "a.txt").write_bytes(b"Smile " + halves + b" twice " + halves)
    (tmp_path / "b.txt").write_bytes("Größe 😀 ".encode() + halves)
    (tmp_path / "half.txt").write_bytes("Größe ".encode() + halves[:3] + b"x")
    assert [read(tmp_path / name)[0][0] for name in ("a.txt", "b.txt")] == ["Smile 😀 twice 😀", "Größe 😀 😀"]
    assert read(tmp_path / "half.txt")[0] == ["Größe \ufffd\ufffd\ufffdx"]
    inventory = look_at_texts(tmp_path)
    assert "read as CESU-8 (guessed; ENCODING= says otherwise): a.txt, b.txt" in inventory.notes
    assert "3 characters were no valid UTF-8" in (inventory.stop or str(inventory.warnings))


def test_tables_and_scripts_whose_bytes_look_alike(tmp_path: Path) -> None:
    table = "name\tage\tx\ty\nann\tb\tc\td\nbob\te\tf\tg\nsue\t\t\t\tk\n"
    right = [
        *((table + "\x1a", "ascii"), ("abc\tdef\tghi\n" * 20 + "\x1a", "ascii"), ("1\t0\t2\t" * 40 + "\x1a", "ascii")),
        *(("der\tin\tx\n" * 10, encoding) for encoding in ("utf-16-be", "utf-16-le", "utf-32-le")),
        *(("नदी के किनारे एक गाँव था। " * 9, encoding) for encoding in ("utf-16-be", "utf-16-le", "utf-32-be")),
        *(
            (hindi, encoding)
            for hindi in ("नदी a village, किनारे in the morning. " * 9, "फल + फल " * 9)
            for encoding in WIDE
        ),
        *(("เมื่อวานเช้าเราไปบ้านเก่า ยายรออยู่ " * 9, encoding) for encoding in WIDE),
        *(("ВЧЕРА МЫ ПОЕХАЛИ. " * 9, encoding) for encoding in WIDE),
    ]
    for text, encoding in right:
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert "".join(read(tmp_path / "a.txt")[0]) == text, (encoding, text[:20])


def test_russian_in_capitals_is_not_hebrew() -> None:
    capitals = "ПРИВЕТ, КАК ДЕЛА? МОСКВА, ДОМ НА ГОРЕ."
    assert detect(capitals.encode("cp866")) == "cp866"
    assert detect("הנמל היה שקט בבוקר, והסירות עמדו.".encode("cp862")) == "cp862"


@pytest.mark.parametrize("shift", range(6))
def test_characters_in_halves_are_joined_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    monkeypatch.setattr(charset, "WINDOW_BYTES", 64)
    monkeypatch.setattr(charset, "BLOCK_BYTES", 32)
    halves = b"\xed\xa0\xbd\xed\xb8\x80"
    (tmp_path / "a.txt").write_bytes(b"z" * shift + b"\xc3\xa9t\xc3\xa9 ab".join([halves] * 40) + halves[:4])
    assert read(tmp_path / "a.txt")[0] == ["z" * shift + "été ab".join("😀" * 40) + "\ufffd" * 4]


def test_encoding_forces_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Привет".encode("cp866"))
    assert read(tmp_path / "a.txt", ReadOptions(encoding="cp866"))[0] == ["Привет"]
    with pytest.raises(ValueError, match="ENCODING=klingon: there is no such encoding"):
        read(tmp_path / "a.txt", ReadOptions(encoding="klingon"))


def test_damaged_utf8_is_repaired_and_much_damage_stops(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer und schöner\n".encode() * 50 + b"one byte \xff is wrong\n")
    inventory = look_at_texts(tmp_path)
    assert "1 characters were no valid UTF-8 and became U+FFFD: a.txt (1)" in inventory.warnings[0]
    assert not inventory.stop
    (tmp_path / "a.txt").write_bytes("größer und schöner\n".encode() * 50 + b"\xff text " * 40)
    assert "characters are broken" in look_at_texts(tmp_path).stop
    assert "ENCODING" in look_at_texts(tmp_path).stop


def test_binary_content_and_nul_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "b.txt").write_bytes(b"a text with few NUL bytes, as a crash leaves them" * 100 + b"\0\0\0")
    inventory = look_at_texts(tmp_path)
    assert "binary content" in inventory.left_out_line()
    assert inventory.read == {"txt": 1}
    assert "3 NUL characters were left out" in inventory.warnings[0]
    assert "\0" not in inventory.samples[0]


def test_letters_that_are_written_in_ascii(tmp_path: Path) -> None:
    chinese = "这是一个测试文件，我们在这里写一些中文。今天天气很好。" * 4
    german = "Grüße aus München. Straße über Brücke. " * 6
    for text, encoding in ((chinese, "hz"), (german, "utf_7"), ("Вчера мы ходили к реке. " * 6, "utf_7")):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        inventory = look_at_texts(tmp_path / "a.txt")
        assert f"read as {encoding} (guessed" in inventory.notes[0]
        assert text.strip().startswith(inventory.samples[0].removeprefix("(a.txt) ").strip())
    code = "a+b and C++ and x+AB-y, ~{not} +1-800- 2+2= and aGVsbG8+d29ybGQ+Zm9v+YmFy+cXV4+Zm9vYmFy\n" * 20
    (tmp_path / "a.txt").write_text(code)
    assert look_at_texts(tmp_path / "a.txt").notes == []
    (tmp_path / "a.txt").write_bytes("The harbour was quiet in the morning. ".encode("cp037") * 20)
    assert "encoding not recognised" in look_at_texts(tmp_path / "a.txt").stop

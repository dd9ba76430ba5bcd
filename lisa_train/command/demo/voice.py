"""Sentences that people wrote, spoken by synthetic voices in noise, which Whisper mishears.

One voice in silence is learned within a dozen steps, by full fine-tuning and LoRA alike, so that
nothing can be told from it. Here four accents in five timbres speak slowly and fast, beside noise
that is nearly as loud as they are or hardly heard.
"""

import csv
import ctypes
import json
import re
import sys
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.sources import CHITCHAT, VOICE, converted, fetch, fetch_package
from lisa_train.command.demo.whisper import SECONDS

if TYPE_CHECKING:
    import numpy as np

RATE = 16000  # samples a second, as Whisper hears them
TRAINED, HELD_OUT = 760, 200  # sentences
WORDS = range(5, 13)  # of a sentence
COMMON = 40  # times that every word of a sentence stands in the conversations, at least
ACCENTS = ("gmw/en-US", "gmw/en", "gmw/en-GB-scotland", "gmw/en-029")  # eSpeak NG's names
TIMBRES = ("", "+f2", "+f4", "+m3", "+m7")
PACE = (140, 210)  # words a minute
LOUDER = (3.0, 20.0)  # how much louder than the noise a sentence is, in dB
NOISE = 2024  # seed of what a sentence is spoken with, beside its number


def voice_folder() -> Path:
    """Return a folder with train and test, sounds with metadata.csv, writing it on first use."""
    return converted("voices", _write)


def _write(folder: Path) -> None:
    conversations = json.loads(fetch(CHITCHAT).read_text(encoding="utf-8"))
    texts = (
        message["text"]
        for conversation in conversations.values()
        for turn in conversation["messages"]
        for message in turn
    )
    chosen = sentences(texts)
    speak, number = speaker(fetch_package(VOICE)), 0
    for split, count in (("test", HELD_OUT), ("train", TRAINED)):
        home = folder / split
        home.mkdir()
        with (home / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "text"])
            written = 0
            for text in chosen:
                sound = said(text, number, speak)
                number += 1
                if len(sound) > SECONDS * RATE:
                    continue
                write_wav(home / f"{written}.wav", sound)
                rows.writerow([f"{written}.wav", text])
                written += 1
                if written == count:
                    break


def said(text: str, number: int, speak: Callable[[str, str, int], "np.ndarray"]) -> "np.ndarray":
    """Return a sentence in a voice, at a pace and beside noise that its number gives."""
    import numpy as np

    chance = np.random.default_rng((NOISE, number))
    voice = chance.choice(ACCENTS) + chance.choice(TIMBRES)
    sound = speak(text, voice, int(chance.integers(*PACE, endpoint=True))).astype(np.float64)
    loud = np.sqrt(np.mean(sound**2)) * 10 ** (-chance.uniform(*LOUDER) / 20)
    both = sound + loud * chance.standard_normal(len(sound))
    return np.clip(np.round(both), -32768, 32767).astype(np.int16)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield plain sentences of common words, each once.

    A sentence begins with a capital, ends with its mark and holds letters, spaces, apostrophes and
    commas alone: what was written is what will be said. A word that most people wrote with an
    apostrophe (dont, im) is none.
    """
    texts = list(texts)
    counts = Counter(word for text in texts for word in re.findall(r"[a-z']+", text.lower()))
    for word in list(counts):
        bare = word.replace("'", "")
        if bare != word and counts[bare] < counts[word]:
            counts[bare] = 0
    seen = set()
    for text in texts:
        for sentence in re.findall(r"(?:^|(?<=[.?!] ))[A-Z][A-Za-z', ]*[a-z][.?!](?= |$)", text):
            words = re.findall(r"[a-z']+", sentence.lower())
            known = min(counts[word] for word in words) >= COMMON
            if len(words) in WORDS and known and tuple(words) not in seen:
                seen.add(tuple(words))
                yield sentence


def speaker(package: Path) -> Callable[[str, str, int], "np.ndarray"]:
    """Return what speaks a sentence, in a voice and at a pace: samples at `RATE`, in 16 bits.

    The voice is the name of an accent and a timbre, the pace is in words a minute. The library is
    called as its speak_lib.h says, without any sound card.

    Raises
    ------
    LisaError
        When the library cannot be loaded here, or lacks a voice.
    """
    import numpy as np

    name = {"darwin": "libespeak-ng.dylib", "win32": "espeak-ng.dll"}.get(
        sys.platform, "libespeak-ng.so"
    )
    try:
        library = ctypes.CDLL(str(package / name))
    except OSError as error:
        raise LisaError(f"The voice cannot be loaded here ({error}); give DATA=… .") from error
    synchronous, never_exit, by_character, utf8 = 2, 0x8000, 1, 1
    rate = library.espeak_Initialize(synchronous, 0, str(package).encode(), never_exit)
    if rate <= 0:
        raise LisaError(f"The voice finds no data in {package}; remove it to fetch it anew.")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(keep)
    words_a_minute = 1  # espeakRATE

    def speak(text: str, voice: str, pace: int) -> np.ndarray:
        said = text.encode() + b"\0"
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise LisaError(f"The voice {voice} is not in {package}; remove it to fetch it anew.")
        library.espeak_SetParameter(words_a_minute, pace, 0)
        pieces.clear()
        library.espeak_Synth(said, ctypes.c_size_t(len(said)), 0, by_character, 0, utf8, None, None)
        library.espeak_Synchronize()
        return resampled(np.concatenate(pieces), rate, RATE)

    speak.keeps = (library, keep)  # type: ignore[attr-defined]  # C holds no reference to it
    return speak


def resampled(sound: "np.ndarray", rate: int, wanted: int) -> "np.ndarray":
    """Return 16-bit samples at another rate, through their spectrum."""
    import numpy as np

    count = len(sound) * wanted // rate
    spectrum = np.fft.rfft(sound.astype(np.float64))[: count // 2 + 1]
    found = np.fft.irfft(spectrum, count) * (count / len(sound))
    return np.clip(np.round(found), -32768, 32767).astype(np.int16)


def write_wav(path: Path, sound: "np.ndarray") -> None:
    """Write 16-bit samples at `RATE`, in one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.astype("<i2").tobytes())

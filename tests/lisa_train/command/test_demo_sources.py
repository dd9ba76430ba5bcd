"""What the demos make of other people's files: models in two formats, pictures, a voice."""

import gzip
import hashlib
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import cache_dir
from lisa_train.command.demo import dinov2, pictures, sources, voice, whisper
from lisa_train.command.demo.onnx_file import read_onnx


def field(number: int, content: bytes | int) -> bytes:
    """One field of a protobuf message, as its specification writes it."""

    def varint(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def constant(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    raw = field(9, np.ascontiguousarray(array, "<f4").tobytes())
    return field(5, dims + field(2, 1) + field(8, name.encode()) + raw)


def operator(name: str, kind: str, *inputs: str) -> bytes:
    given = b"".join(field(1, one.encode()) for one in inputs)
    return field(1, given + field(2, b"out") + field(3, name.encode()) + field(4, kind.encode()))


def write_dinov2(path: Path, model: Any) -> Path:
    """The model as PyTorch exports it: matrices transposed, nameless, told by their operator."""
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
             "o_proj": "output.dense"}  # fmt: skip
    parts = []
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        array = tensor.numpy()
        for new, old in names.items():
            name = name.replace(f"attention.{new}.", f"attention.{old}.")
        if name.startswith("encoder") and array.ndim == 2:
            node = "/backbone/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"
            node = node.replace("layer/", "layer.")
            parts.append(constant(f"onnx::{number}", array.T))
            parts.append(operator(node, "MatMul", "x", f"onnx::{number}"))
        elif name == "embeddings.position_embeddings":
            parts += [
                constant("first", array[:, :1]), constant("others", array[:, 1:]),
                operator("/backbone/embeddings/Reshape_1", "Reshape", "others", "shape"),
                operator("/backbone/embeddings/Concat_6", "Concat", "first", "resized"),
            ]  # fmt: skip
        elif name != "embeddings.mask_token":
            parts.append(constant(f"backbone.{name}", array))
    parts.append(constant("decoder.conv.weight", np.ones((2, 2))))
    path.write_bytes(field(1, 8) + field(7, b"".join(parts)))
    return path


def tiny_dinov2() -> Any:
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4,
        image_size=12,
    )  # fmt: skip
    model = hf.Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_a_dinov2_is_read_from_onnx(tmp_path: Path) -> None:
    model = tiny_dinov2()
    dinov2.convert(write_dinov2(tmp_path / "m.onnx", model), tmp_path / "m", heads=2)
    found = hf.AutoModel.from_pretrained(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        if name != "embeddings.mask_token":
            assert torch.equal(found.state_dict()[name], tensor), name
    pixels = hf.AutoImageProcessor.from_pretrained(tmp_path / "m")(
        np.zeros((28, 28, 3), np.uint8), return_tensors="pt"
    )["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, dinov2.SIDE, dinov2.SIDE)
    assert pixels[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229)


def test_files_that_are_no_such_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = write_dinov2(path, tiny_dinov2()).read_bytes()
    for content in (whole[: len(whole) // 2], b"no protobuf", b""):
        path.write_bytes(content)
        with pytest.raises(LisaError, match="is not an ONNX file that can be read"):
            read_onnx(path)
    path.write_bytes(field(7, operator("a", "Add", "x")))
    with pytest.raises(LisaError, match="is not a DINOv2: it has no position of class"):
        dinov2.backbone(path)


def write_ctranslate2(path: Path, model: Any) -> None:
    """The model as CTranslate2's converter writes it, in half precision."""
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    tensors: dict[str, np.ndarray] = {}
    leaves = {"weight": "gamma", "bias": "beta"}
    for new, old in whisper._OUTSIDE.items():
        for leaf in ("weight", "bias"):
            if f"model.{old}.{leaf}" in state:
                given = leaves[leaf] if "norm" in new else leaf
                given = "encodings" if "position" in new else given
                tensors[f"{new}/{given}"] = state[f"model.{old}.{leaf}"]
    for side in ("encoder", "decoder"):
        layers = {int(n.split(".")[3]) for n in state if n.startswith(f"model.{side}.layers.")}
        for layer in layers:
            for part, names in whisper._PARTS.items():
                for leaf in ("weight", "bias"):
                    home = f"model.{side}.layers.{layer}."
                    if f"{home}{names[0]}.weight" not in state:
                        continue
                    pieces = [
                        state.get(f"{home}{n}.{leaf}", np.zeros(len(state[f"{home}{n}.weight"])))
                        for n in names
                    ]
                    given = leaves[leaf] if "norm" in part else leaf
                    tensors[f"{side}/layer_{layer}/{part}/{given}"] = np.concatenate(pieces)
        tensors[f"{side}/num_heads"] = np.array(2, "<i2")
    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        kind, array = (2, array) if array.ndim == 0 else (4, array.astype("<f2"))
        out += text(name) + struct.pack("<B", array.ndim)
        out += struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    path.write_bytes(out + struct.pack("<I", 0))


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def test_a_whisper_is_read_from_ctranslate2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4,
        max_source_positions=10, max_target_positions=6, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).half().float()
    write_ctranslate2(tmp_path / "model.bin", model)
    values = whisper.read_ctranslate2(tmp_path / "model.bin")
    assert int(values["decoder/num_heads"]) == 2
    found = whisper.whisper_weights(values)
    wanted = {n: t for n, t in model.state_dict().items() if n != "proj_out.weight"}
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert np.array_equal(found[name].astype("f4"), tensor.numpy()), name


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"abc", "is not a file of CTranslate2"),
     (struct.pack("<I", 5), "is of version 5 of CTranslate2's format, not 6"),
     (struct.pack("<I", 6) + text("W") + struct.pack("<II", 3, 1) + text("a"), "is not a file")],
)  # fmt: skip
def test_files_that_are_no_such_ctranslate2(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(LisaError, match=expected):
        whisper.read_ctranslate2(tmp_path / "model.bin")


# ------------------------------------------------------------------ pictures


def test_pictures_are_those_of_the_idx_file(tmp_path: Path) -> None:
    from datasets import load_dataset

    numbers = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "i.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3i", 2, 3, 4) + bytes(numbers)))
    images = pictures.read_idx(path)
    assert np.array_equal(images, numbers)
    pictures.write(tmp_path / "train.parquet", images, ["bag", "shoe"])
    rows = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train",
                        cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert np.array_equal(np.array(rows[1]["image"]), numbers[1])
    assert rows.features["label"].int2str(rows[1]["label"]) == "shoe"
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(LisaError, match="is not an IDX file of bytes"):
        pictures.read_idx(path)


def test_digits_stand_in_where_clothes_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    rows = [",".join(map(str, [n % 17] * 64 + [n % 10])) for n in range(40)]
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    elsewhere = sources.DebianSource("p", "nowhere", {"a": ""}, "MIT", "p")
    monkeypatch.setattr(pictures, "FASHION", elsewhere)
    folder = pictures.pictures_folder()
    assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "train.parquet"]
    said = capsys.readouterr().out
    assert "apt-get, which is not here: install p" in said
    assert "Going on with handwritten digits instead." in said


def test_a_package_of_debian_is_unpacked_and_held_to_its_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.shutil, "which", lambda name: name)
    done: list[list[str]] = []

    def run(words: list[str], cwd: str, **_: Any) -> Any:
        done.append(words)
        if words[0] == "apt-get":
            (Path(cwd) / "p_1_all.deb").write_bytes(b"")
        else:
            (Path(words[-1]) / "d").mkdir()
            (Path(words[-1]) / "d" / "a").write_bytes(b"content")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    good = sources.DebianSource("p", "d", {"a": hashlib.sha256(b"content").hexdigest()}, "MIT", "p")
    assert (sources.fetch_debian(good) / "a").read_bytes() == b"content"
    assert [words[0] for words in done] == ["apt-get", "dpkg-deb"]
    assert sources.fetch_debian(good) == tmp_path / "p" / "d"
    assert len(done) == 2  # kept
    with pytest.raises(LisaError, match="is not the file of p that is known here"):
        sources.fetch_debian(sources.DebianSource("p", "d", {"a": "0"}, "MIT", "p"))


def test_what_is_made_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise LisaError("no more")

    with pytest.raises(LisaError):
        sources.converted("m", fail)
    assert not (tmp_path / "m").exists()
    assert list(sources.converted("m", lambda to: (to / "a").touch()).iterdir()) == [
        tmp_path / "m" / "a"
    ]


# ------------------------------------------------------------------ the voice


def test_sentences_are_plain_and_known_and_stand_once() -> None:
    common = ["We really like going there now.", "Don't they like it there?", "I'm there."]
    texts = common * voice.COMMON + [
        "We really like going there now!",  # again
        "Dont they like it there?",  # a word that others write otherwise
        "We really like going there 4 now.",  # digits
        "we really like it there now.",  # no capital
        "Nobody knows wherefore they like it.",  # rare words
        "Ok. They really like it there now! yes",  # within a message
    ]
    assert list(voice.sentences(texts)) == [
        common[0], common[1], "They really like it there now!"
    ]  # fmt: skip


def test_a_tone_stays_the_same_at_another_rate() -> None:
    given, wanted = 22050, voice.RATE
    tone = [12000 * np.sin(2 * np.pi * 500 * np.arange(rate) / rate) for rate in (given, wanted)]
    found = voice.resampled(tone[0].astype(np.int16), given, wanted)
    assert found.dtype == np.int16
    assert np.abs(found - tone[1]).max() < 2


def test_every_sentence_has_its_voice_its_pace_and_its_noise() -> None:
    tone = np.round(8000 * np.sin(np.arange(voice.RATE) / 7)).astype(np.int16)
    asked: list[tuple[str, int]] = []

    def speak(text: str, name: str, pace: int) -> np.ndarray:
        asked.append((name, pace))
        return tone

    louder = []
    for number in range(200):
        noise = voice.said("Yes.", number, speak) - tone.astype(np.float64)
        louder.append(10 * np.log10(np.mean(tone.astype(np.float64) ** 2) / np.mean(noise**2)))
    names, paces = {name for name, _ in asked}, [pace for _, pace in asked]
    assert names == {a + t for a in voice.ACCENTS for t in voice.TIMBRES}
    slowest, fastest = voice.PACE
    assert slowest <= min(paces) < slowest + 5 < fastest - 5 < max(paces) <= fastest
    low, high = voice.LOUDER
    assert low - 0.2 < min(louder) < low + 1 < high - 1 < max(louder) < high + 0.2
    again = voice.said("Yes.", 7, speak)
    assert asked[-1] == asked[7]
    assert np.array_equal(again, voice.said("Yes.", 7, speak))


# ------------------------------------------------------------------ the real files


def kept(name: str, target: str) -> Path:
    folder = cache_dir() / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the cache; `make {target}` fetches it")
    return folder


@pytest.mark.slow
def test_the_real_dinov2_computes_what_onnxruntime_computes_from_the_file() -> None:
    """Six features of a ramp, by onnxruntime 1.32 from the file itself, through all layers."""
    model = hf.AutoModel.from_pretrained(kept("dinov2-small", "demo-vision")).eval()
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.no_grad():
        found = model(ramp).last_hidden_state[0, 0, :6]
    wanted = [0.82839954, 0.58264905, 2.4657526, -4.4105234, -1.2118291, -0.40623358]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_the_real_whisper_writes_most_of_what_the_voice_says() -> None:
    from lisa_train.command.tasks.scores import word_error_rate
    from lisa_train.command.tasks.sound import read_sound

    folder, spoken = kept("whisper-tiny.en", "demo-speech"), kept("voices", "demo-speech") / "test"
    rows = [line.split(",", 1) for line in (spoken / "metadata.csv").read_text().splitlines()[1:17]]
    extractor = hf.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = hf.WhisperTokenizer.from_pretrained(folder)
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    sounds = [read_sound(name, spoken, voice.RATE) for name, _ in rows]
    features = extractor(sounds, sampling_rate=voice.RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        ids = model.generate(features, max_length=40)
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert word_error_rate(said, [meant.strip('"') for _, meant in rows]) < 0.6

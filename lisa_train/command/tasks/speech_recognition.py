"""`task: speech-recognition`: what is said in a sound, by an encoder and a decoder (Whisper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.data import check_dataset_name
from lisa_train.command.tasks.image_classification import folder_of
from lisa_train.command.tasks.plain_trainer import TaskWithHead, cannot_be_loaded
from lisa_train.command.tasks.scores import IGNORED, word_error_rate
from lisa_train.command.tasks.sound import listed_folder, read_sound
from lisa_train.command.tasks.splits import Part, place
from lisa_train.command.tasks.task import Loaded, head_class
from lisa_train.command.tasks.tokens import ended

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments


class SpeechRecognition(TaskWithHead):
    """The words of a sound; judged by the words that the model writes down itself."""

    name = "speech-recognition"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "audio": "a sound, or the path of its file",
        "text": "what is said in it",
    }
    needed = ("audio", "text")

    def check(self, config: TrainConfig) -> None:
        """Refuse models that spell sounds out by CTC: they have no decoder that writes."""
        super().check(config)
        from transformers.models.auto import modeling_auto as auto

        source = self.source(config)
        writes = auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        if (
            source.model_type in auto.MODEL_FOR_CTC_MAPPING_NAMES
            and source.model_type not in writes
        ):
            raise ConfigError(
                f"the model of {config.model_name_or_path} ({source.model_type}) spells sounds out "
                "by CTC, which speech-recognition does not train yet; give a model that writes, "
                "such as Whisper, or put lisa_train.attach to a trainer of your own."
            )

    def arguments(self) -> "type[TrainingArguments]":
        """Return transformers' arguments of a model that generates."""
        from transformers import Seq2SeqTrainingArguments

        return Seq2SeqTrainingArguments

    def trainer_class(self) -> "type[Trainer]":
        """Return the trainer that lets the model generate when it is judged."""
        from transformers import Seq2SeqTrainer

        return Seq2SeqTrainer

    def splits(self, config: TrainConfig) -> Any:
        """Read the data; a folder with a list of its sounds without decoding them."""
        check_dataset_name(config.dataset_name)
        path = Path(config.dataset_name)
        listed = listed_folder(path, config.dataset_train_split) if path.is_dir() else None
        if listed is None:
            return super().splits(config)
        names = listed[next(iter(listed))].column_names
        for wanted, given in config.columns.items():
            if given not in names:
                raise ConfigError(
                    f"columns.{wanted} is {given!r}, but the list of {config.dataset_name} has the "
                    f"columns {', '.join(map(repr, names))}."
                )
        return listed.rename_columns({g: w for w, g in config.columns.items() if g != w})

    def arrange(self, dataset: "Dataset", config: TrainConfig) -> "Dataset":
        """Leave sounds as they are in their files: they are read when a batch is made."""
        from datasets import Audio

        if "audio" in dataset.column_names and isinstance(dataset.features["audio"], Audio):
            return dataset.cast_column("audio", Audio(decode=False))
        return dataset

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and processor; every sound is read once."""
        train, held_out = self.parts(config)
        source = self.source(config)
        head_class(self, source, config)  # a model of another kind has no feature extractor either
        from transformers import AutoFeatureExtractor

        with refusals(partial(cannot_be_loaded, "feature extractor", config)):
            extractor = AutoFeatureExtractor.from_pretrained(
                config.model_name_or_path, revision=config.model_revision
            )
        for part in (train, held_out):
            if part is not None:
                _check_sounds(part, extractor.sampling_rate, config)
        model, new = self.load_model(config, source)
        tokenizer = self.load_tokenizer(config)
        limit = getattr(model.config, "max_target_positions", None)

        def make(rows: dict[str, Any]) -> dict[str, Any]:
            texts = tokenizer(rows["text"])["input_ids"]
            return {"labels": [ended(ids, tokenizer) for ids in texts]}

        rows: list[Any] = []
        for part in (train, held_out):
            if part is None:
                rows.append(None)
                continue
            ready = part.dataset.select_columns(list(self.needed))
            ready = ready.map(make, batched=True, remove_columns=["text"])
            longest = [len(ids) for ids in ready["labels"]]
            if limit is not None and max(longest) > limit:
                where = place(config.dataset_name, part, int(np.argmax(longest)))
                raise ConfigError(
                    f"{where}: the text has {max(longest)} tokens, but {config.model_name_or_path} "
                    f"writes at most {limit}; part the sound."
                )
            rows.append(ready)
        self._extractor = extractor
        _save_together(tokenizer, extractor)
        return Loaded(model, tokenizer, self.data(train, held_out, rows, config), new)

    def build_trainer(
        self, loaded: Loaded, arguments: Any, peft_config: Any, config: TrainConfig
    ) -> "Trainer":
        """Build the trainer; held-out sounds are written down as well as scored."""
        arguments.predict_with_generate = True
        if arguments.generation_max_length is None:
            longest = max(
                len(ids)
                for part in (loaded.data.train, loaded.data.held_out)
                if part is not None
                for ids in part["labels"]
            )
            limit = getattr(loaded.model.config, "max_target_positions", None) or 2 * longest + 8
            arguments.generation_max_length = min(2 * longest + 8, limit)
        return super().build_trainer(loaded, arguments, peft_config, config)

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Read the sounds of a batch and give them to the feature extractor."""
        start = loaded.model.config.decoder_start_token_id
        return SoundBatch(self._extractor, folder_of(config), start)

    def predictions(self, logits: Any, labels: Any) -> Any:
        """Keep the tokens that the model wrote."""
        return logits

    def scores(self, predicted: Any, labels: Any, loaded: Loaded) -> Mapping[str, float]:
        """Word error rate of all held-out sounds together."""
        tokenizer = loaded.processor
        texts = []
        for ids in (predicted, labels):
            ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
            texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
        return {"word_error_rate": word_error_rate(*texts)}


@dataclass(frozen=True)
class SoundBatch:
    """Makes a batch of rows with a sound and the tokens of what is said."""

    extractor: Any
    folder: Path
    start: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the features and `labels`, filled up with what does not count."""
        import torch

        rate = self.extractor.sampling_rate
        sounds = [read_sound(row["audio"], self.folder, rate) for row in rows]
        features = self.extractor(sounds, sampling_rate=rate, return_tensors="pt")
        name = self.extractor.model_input_names[0]
        labels = [list(row["labels"]) for row in rows]
        # The model puts the start token in front of the labels itself.
        if all(ids and ids[0] == self.start for ids in labels):
            labels = [ids[1:] for ids in labels]
        longest = max(map(len, labels))
        filled = [ids + [IGNORED] * (longest - len(ids)) for ids in labels]
        return {name: features[name], "labels": torch.tensor(filled)}


def _save_together(tokenizer: Any, extractor: Any) -> None:
    """Let the feature extractor be saved wherever the tokenizer is.

    Trainer saves one processor beside the weights (final ones, checkpoints, the hub); without its
    feature extractor a speech model cannot be loaded again to hear anything.
    """
    save = tokenizer.save_pretrained

    def both(folder: Any, *args: Any, **kwargs: Any) -> Any:
        extractor.save_pretrained(folder)
        return save(folder, *args, **kwargs)

    tokenizer.save_pretrained = both


def _check_sounds(part: Part, rate: int, config: TrainConfig) -> None:
    folder = folder_of(config)
    rows = zip(part.dataset["audio"], part.dataset["text"], strict=True)
    for number, (sound, text) in enumerate(rows):
        where = place(config.dataset_name, part, number)
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: column 'text' holds nothing; expected what is said.")
        try:
            read_sound(sound, folder, rate)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

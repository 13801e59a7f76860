"""Training of stages: one trainer, and for each stage a name that only says what it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beartype import beartype

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.data.crops import crop_seconds
from audiolm_pytorch.data.manifest import AudioItem, training_items
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.compatibility import agreed_fingerprints, check_compatible
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.task import StageTask
from audiolm_pytorch.lm.training_data import ShardSource, StageSource, WaveSource
from audiolm_pytorch.saving.files import write_weights
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.training import LoopSettings, TrainLoop, TrainResult

if TYPE_CHECKING:
    import accelerate

__all__ = ["CoarseTransformerTrainer", "FineTransformerTrainer", "SemanticTransformerTrainer", "StageTrainer"]

TABLE_FILE = "conditioning_table.safetensors"


class StageTrainer:
    """Trains a stage on audio files or on shards of tokens, resumably.

    At the end `results_folder` holds the stage (`<namespace>/`, a saved module) and, with a conditioner, the trained
    table of its namespace (`conditioning_table.safetensors`). Stage and checkpoints hold the fingerprints of the
    tokenizers whose tokens they learnt (`token_fingerprints`): those handed in, or those that the shards name; and of
    the conditioners, as far as these have one.

    Args:
        transformer: The stage; trained in place.
        wav2vec: Semantic tokenizer, where tokens are made on the way; with shards it is only compared with theirs.
        codec: Codec, likewise.
        audio_conditioner: Conditioner, for a transformer that takes codes (`audio_text_condition`).
        text_conditioner: Text encoder, for a transformer that hears captions (`text_dim`); frozen. The captions of a
            recording take turns, one an epoch; recordings without captions are heard without.
        folder: Folder of audio files or JSONL manifest.
        items: Items to learn from and held-out items, instead of `folder`.
        shards: Token records to learn from, instead of both.
        valid_shards: Held-out token records; None = validate on `shards`.
        data_max_length: Samples of a crop, at the codec's rate, or the semantic tokenizer's for the semantic stage.
        data_max_length_seconds: Seconds of a crop, instead. None for both = whole recordings.
        batch_size: Crops a step and process.
        num_train_steps: Optimizer steps of the whole run.
        results_folder: Where checkpoints, metrics and the result go.
        accelerator: Shared by all trainings of a program; None makes one.
        level_drop_prob: See `StageTask`.
        text_prob: Probability that a captioned recording is conditioned on its caption's codes, not on its own, so that
            the stage also meets what it gets at inference; validation hears audio.
        **settings: Further fields of `LoopSettings`, e.g. `learning_rate`.

    Raises:
        ValueError: If there is not exactly one source of data, or parts do not fit one another; e.g. if tokens are of
            another tokenizer than the one handed in, or than the one whose tokens the transformer knows, and
            likewise codes and states of conditioners. If a probability is none, or there is no conditioner to read
            captions. If the transformer hears captions, and no recording has any. If a crop is shorter than a token.
    """

    @beartype
    def __init__(
        self,
        transformer: StageTransformer,
        *,
        wav2vec: SemanticTokenizer | None = None,
        codec: Codec | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
        folder: str | Path | None = None,
        items: tuple[Sequence[AudioItem], Sequence[AudioItem]] | None = None,
        shards: TokenShards | None = None,
        valid_shards: TokenShards | None = None,
        data_max_length: int | None = None,
        data_max_length_seconds: float | int | None = None,
        batch_size: int,
        num_train_steps: int,
        results_folder: str | Path = "./results",
        accelerator: "accelerate.Accelerator | None" = None,
        level_drop_prob: float | int = 0.0,
        text_prob: float | int = 0.0,
        **settings: Any,
    ) -> None:
        check_compatible(transformer, wav2vec, codec, audio_conditioner, text_conditioner)
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        tokenizer = wav2vec if codec is None else codec
        sample_hz = None if tokenizer is None else tokenizer.target_sample_hz
        seconds = crop_seconds(data_max_length, data_max_length_seconds, sample_hz)
        common: dict[str, Any] = {
            "seconds": seconds,
            "audio_conditioner": audio_conditioner,
            "seed": loop_settings.seed,
        }
        sources: list[StageSource]
        if shards is not None:
            if folder is not None or items is not None:
                raise ValueError("give one source of data: a folder, items or shards")
            sources = [
                ShardSource(part, transformer, text_prob=prob, **common)
                for part, prob in ((shards, text_prob), (valid_shards or shards, 0.0))
            ]
        else:
            if valid_shards is not None:
                raise ValueError("valid_shards are held out beside shards; held-out files go into items, or a manifest")
            shortest = _one_token_seconds(wav2vec, codec)
            if seconds is not None and not seconds >= shortest:
                raise ValueError(f"crops of {seconds} s are shorter than a token, {shortest} s: make them longer")
            train, valid = training_items(folder, items, min_seconds=shortest)
            sources = [
                WaveSource(part, transformer, wav2vec=wav2vec, codec=codec, text_prob=prob, **common)
                for part, prob in ((train, text_prob), (valid, 0.0))
            ]
        if transformer.text_dim is not None and not sources[0].has_captions:
            raise ValueError(
                f"the {transformer.namespace} transformer hears captions (text_dim), and of {len(sources[0])} "
                "recordings none has one: name them in a manifest or beside the files, or build it without a text_dim"
            )
        self.transformer, self.conditioner = transformer, audio_conditioner
        self.task = StageTask(
            transformer,
            *sources,
            audio_conditioner=audio_conditioner,
            text_conditioner=text_conditioner,
            level_drop_prob=level_drop_prob,
            valid_batch_size=batch_size,
            token_fingerprints=agreed_fingerprints(
                transformer,
                wav2vec,
                codec,
                audio_conditioner,
                text_conditioner,
                [one for one in (shards, valid_shards) if one is not None],
            ),
        )
        # What else decides the weights; older checkpoints know no probability but 0, and nothing of crops.
        self.task.config |= {"crop_seconds": seconds, **({"text_prob": text_prob} if text_prob else {})}
        if transformer.max_seconds is None:
            # What it will have seen: recordings may all be shorter than the crop that was asked for.
            transformer.max_seconds = sources[0].crop_seconds
        self.results_folder = Path(results_folder)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)

    @beartype
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end, or for some steps, from wherever the folder's checkpoint stands.

        Args:
            stop_after_steps: Steps to do in this call at most; None runs to the end.

        Returns:
            Where the run stands now. At its end the transformer (and the conditioner's table) hold the final weights.
        """
        result = self.loop.train_and_save(self._save, stop_after_steps)
        self._remember_tokenizers()
        return result

    def _remember_tokenizers(self) -> None:
        """Tell the stage what its tokens were made by: not before it was trained, since the loop may refuse the run."""
        self.transformer.token_fingerprints = dict(self.task.token_fingerprints)

    def _save(self) -> None:
        """Write the result: the table first, since the saved module says that all is there."""
        self._remember_tokenizers()
        namespace = self.transformer.namespace
        if self.conditioner is not None:
            write_weights(self.results_folder / TABLE_FILE, weights_of(self.conditioner.table(namespace)))
        save_module(self.transformer, self.results_folder / namespace)


def _one_token_seconds(*tokenizers: SemanticTokenizer | Codec | None) -> float:
    """Length of the longest token: a file must hold one of every kind."""
    return max((one.downsample_factor / one.target_sample_hz for one in tokenizers if one is not None), default=0.0)


class SemanticTransformerTrainer(StageTrainer):
    """Trains the semantic stage. See `StageTrainer` for the arguments not listed.

    Args:
        transformer: The stage.
        wav2vec: Semantic tokenizer; not needed with shards.
        **arguments: Of `StageTrainer`.
    """

    @beartype
    def __init__(
        self, *, transformer: SemanticTransformer, wav2vec: SemanticTokenizer | None = None, **arguments: Any
    ) -> None:
        super().__init__(transformer, wav2vec=wav2vec, **arguments)


class CoarseTransformerTrainer(StageTrainer):
    """Trains the coarse stage. See `StageTrainer` for the arguments not listed.

    Args:
        transformer: The stage.
        codec: Codec; not needed with shards.
        wav2vec: Semantic tokenizer; not needed with shards.
        **arguments: Of `StageTrainer`.
    """

    @beartype
    def __init__(
        self,
        *,
        transformer: CoarseTransformer,
        codec: Codec | None = None,
        wav2vec: SemanticTokenizer | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(transformer, codec=codec, wav2vec=wav2vec, **arguments)


class FineTransformerTrainer(StageTrainer):
    """Trains the fine stage. See `StageTrainer` for the arguments not listed.

    Args:
        transformer: The stage.
        codec: Codec; not needed with shards.
        **arguments: Of `StageTrainer`.
    """

    @beartype
    def __init__(self, *, transformer: FineTransformer, codec: Codec | None = None, **arguments: Any) -> None:
        super().__init__(transformer, codec=codec, **arguments)

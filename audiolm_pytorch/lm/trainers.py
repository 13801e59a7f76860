"""Trainers of stages."""

from collections.abc import Mapping, Sequence
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
from audiolm_pytorch.lm.training_data import ConditionFunction, ShardSource, StageSource, WaveSource
from audiolm_pytorch.saving.files import write_weights
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.training import LoopSettings, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments

if TYPE_CHECKING:
    import accelerate

__all__ = ["CoarseTransformerTrainer", "FineTransformerTrainer", "SemanticTransformerTrainer", "StageTrainer"]

TABLE_FILE = "conditioning_table.safetensors"


@trainer_arguments(LoopSettings)
class StageTrainer:
    """Trains a stage on audio files or on token shards, resumably.

    At the end `results_folder` holds the stage (`<namespace>/`, a saved module) and, with a conditioner, the trained
    table of its namespace (`conditioning_table.safetensors`). Stage and checkpoints store the known fingerprints of
    tokenizers and conditioners (`token_fingerprints`).

    Args:
        transformer: The stage; trained in place.
        wav2vec: Semantic tokenizer, for a stage with semantic tokens. With shards it is only compared with theirs.
        codec: Codec, for a stage with acoustic tokens. With shards it is only compared with theirs.
        audio_conditioner: Conditioner, for a stage with `audio_text_condition`.
        text_conditioner: Text encoder, for a stage with a `text_dim`; frozen. The captions of a recording take turns,
            one per epoch.
        folder: Folder of audio files, or JSONL manifest.
        items: Training and validation items, instead of `folder`.
        shards: Token shards, instead of both.
        valid_shards: Held-out token shards; None = validate on `shards`.
        data_max_length: Length of a crop in samples of the codec (of the semantic tokenizer for the semantic stage).
        data_max_length_seconds: Length of a crop in seconds, instead. None for both = whole recordings.
        batch_size: Crops per step and process.
        num_train_steps: Optimizer steps of the whole run.
        results_folder: Folder of checkpoints, metrics and the result.
        accelerator: For several trainings in one program; None = a new one.
        level_drop_prob: See `StageTask`.
        text_prob: Probability that a captioned recording is conditioned on the codes of its caption, not on its own, as
            in generation. Validation always uses codes of audio.
        conditioners: Function of a `WaveBatch` for each further condition of the stage, by name. Shards hold the
            embeddings themselves.
        **settings: Further fields of `LoopSettings`, e.g. `learning_rate` or `optimizer`.
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
        conditioners: Mapping[str, ConditionFunction] | None = None,
        **settings: Any,
    ) -> None:
        modules = wav2vec, codec, audio_conditioner, text_conditioner
        check_compatible(transformer, *modules)
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        tokenizer = wav2vec if codec is None else codec
        sample_hz = None if tokenizer is None else tokenizer.target_sample_hz
        seconds = crop_seconds(data_max_length, data_max_length_seconds, sample_hz)
        options: dict[str, Any] = {
            "seconds": seconds,
            "audio_conditioner": audio_conditioner,
            "seed": loop_settings.seed,
        }
        train: StageSource
        valid: StageSource
        if shards is not None:
            if folder is not None or items is not None:
                raise ValueError("pass one source of data: a folder, items or shards")
            if conditioners:
                raise ValueError("conditioners compute conditions of audio files; store the embeddings in the shards")
            train = ShardSource(shards, transformer, text_prob=text_prob, **options)
            valid = ShardSource(valid_shards or shards, transformer, **options)
        else:
            if valid_shards is not None:
                raise ValueError("valid_shards need shards; pass held-out files in items or in a manifest")
            tokenizers = [tokenizer for tokenizer in (wav2vec, codec) if tokenizer is not None]
            shortest = max((one.downsample_factor / one.target_sample_hz for one in tokenizers), default=0.0)
            if seconds is not None and not seconds >= shortest:
                raise ValueError(f"crops of {seconds} s are shorter than a token of {shortest} s; make them longer")
            train_items, valid_items = training_items(folder, items, min_seconds=shortest)
            options |= {"wav2vec": wav2vec, "codec": codec, "conditioners": conditioners}
            train = WaveSource(train_items, transformer, text_prob=text_prob, **options)
            valid = WaveSource(valid_items, transformer, **options)
        if transformer.text_dim is not None and not train.has_captions:
            raise ValueError(
                f"the {transformer.namespace} transformer needs captions (text_dim), but none of {len(train)} "
                "recordings has one; write captions in a manifest or beside the files, or build the stage without a "
                "text_dim"
            )
        self.transformer, self.conditioner = transformer, audio_conditioner
        all_shards = [part for part in (shards, valid_shards) if part is not None]
        self.task = StageTask(
            transformer,
            train,
            valid,
            audio_conditioner=audio_conditioner,
            text_conditioner=text_conditioner,
            level_drop_prob=level_drop_prob,
            batch_size=batch_size,
            token_fingerprints=agreed_fingerprints(transformer, *modules, all_shards),
        )
        self.task.config |= {"crop_seconds": seconds, "text_prob": text_prob}
        if transformer.max_seconds is None:
            transformer.max_seconds = train.crop_seconds
        self.results_folder = Path(results_folder)
        self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)

    @beartype
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train to the end, or for at most `stop_after_steps` steps, from the checkpoint in the folder if there is one.

        At the end of the run the transformer and the conditioner's table hold the final weights.
        """
        result = self.loop.train_and_save(self._save, stop_after_steps)
        self._set_fingerprints()
        return result

    def _set_fingerprints(self) -> None:
        """Store the fingerprints in the stage; only after training, because the loop may refuse to resume the run."""
        self.transformer.token_fingerprints = dict(self.task.token_fingerprints)

    def _save(self) -> None:
        """Write the table, then the stage: a saved stage means that the result is complete."""
        self._set_fingerprints()
        namespace = self.transformer.namespace
        if self.conditioner is not None:
            write_weights(self.results_folder / TABLE_FILE, weights_of(self.conditioner.table(namespace)))
        save_module(self.transformer, self.results_folder / namespace)


class SemanticTransformerTrainer(StageTrainer):
    """Trains the semantic stage; all arguments are those of `StageTrainer`."""

    @beartype
    def __init__(
        self, *, transformer: SemanticTransformer, wav2vec: SemanticTokenizer | None = None, **options: Any
    ) -> None:
        super().__init__(transformer, wav2vec=wav2vec, **options)


class CoarseTransformerTrainer(StageTrainer):
    """Trains the coarse stage; all arguments are those of `StageTrainer`."""

    @beartype
    def __init__(
        self,
        *,
        transformer: CoarseTransformer,
        codec: Codec | None = None,
        wav2vec: SemanticTokenizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(transformer, codec=codec, wav2vec=wav2vec, **options)


class FineTransformerTrainer(StageTrainer):
    """Trains the fine stage; all arguments are those of `StageTrainer`."""

    @beartype
    def __init__(self, *, transformer: FineTransformer, codec: Codec | None = None, **options: Any) -> None:
        super().__init__(transformer, codec=codec, **options)

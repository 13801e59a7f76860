"""Trainers of the three stages of AudioLM, and of the entropy model of a codec."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.data.crops import check_crop_seconds, crop_seconds
from audiolm_pytorch.data.manifest import AudioSplit, DataSource, training_items
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.compatibility import agreed_fingerprints, check_compatible
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.task import SampleFunction, StageObjective, StageTask
from audiolm_pytorch.lm.training_data import (
    ConditionFunction,
    ShardSource,
    StageSource,
    TextFunction,
    WaveFunction,
    WaveSource,
)
from audiolm_pytorch.nn.lora import LoRA
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.files import write_weights
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.training import LoopSettings, TrainLoop, TrainResult
from audiolm_pytorch.training.arguments import trainer_arguments
from audiolm_pytorch.training.rng import seed_rng

if TYPE_CHECKING:
    import accelerate

__all__ = [
    "CoarseTransformerTrainer",
    "EntropyTransformerTrainer",
    "FineTransformerTrainer",
    "SemanticTransformerTrainer",
    "StageTrainer",
]

TABLE_FILE = "conditioning_table.safetensors"
LORA_FOLDER = "lora"

logger = logger_named(__name__)


@trainer_arguments(LoopSettings)
class StageTrainer:
    """Trainer of one AudioLM stage on audio files or on token shards. An interrupted training run can be resumed.

    After training, `results_folder` contains the trained stage as a saved module in the folder `<namespace>/`. The
    trained table of condition embeddings, if there is one, is in `conditioning_table.safetensors`. The stage and its
    checkpoints store the fingerprints of tokenizers and conditioners in `token_fingerprints`.

    Args:
        wav2vec: Semantic tokenizer; needed by a stage with semantic tokens; with `shards`, only its fingerprint is
            used.
        codec: Codec; needed by a stage with acoustic tokens; with `shards`, only its fingerprint is used.
        audio_conditioner: Conditioner; needed by a stage with `audio_text_condition`.
        text_conditioner: Text encoder; needed by a stage with a `text_dim`; each epoch uses the next caption of a
            recording. Parameters of the encoder that require gradients are trained with the stage.
        folder: Folder of audio files, manifest, torch `Dataset` of waves, or a list of them (see `load_items`).
        items: Training and validation items, or one or two torch data sets, instead of `folder`.
        shards: Training and validation token shards, or one for both, instead of `folder` and `items`.
        data_max_length: Length of a crop in samples, at the sample rate of the codec or, without a codec, of `wav2vec`.
        data_max_length_seconds: Length of a crop in seconds, instead of `data_max_length`; if both are None, crops are
            whole recordings.
        results_folder: Folder for checkpoints, metrics and the trained stage; by default
            `./results/<stage>_transformer`.
        objective: Noise in the inputs of the stage, and weights of the levels in its loss.
        text_prob: Probability that training computes the codes of a recording from its caption, as in generation,
            instead of its audio.
        conditioners: Functions that compute further conditions of the stage from a `WaveBatch`, by condition name; not
            allowed with `shards`, which store the condition embeddings. A condition that the data lack is left out of
            the whole training, with a warning.
        augment_text: Function that changes the caption of a recording in training: `(caption, tags, rng) -> caption`,
            where a caption may be None, and tags are the texts of `tags_in`.
        augment_waves: Function that changes the waves and captions of a training batch: `(WaveBatch, rng) ->
            WaveBatch`; not allowed with `shards`.
        sampler: Function that returns audible samples of the stage during training, such as `StageSampler(codec)`.
        lora_rank: Rank of low-rank updates of all linear layers of the stage (LoRA, arXiv:2106.09685), which are
            trained instead of all weights. They are saved in the folder `lora` of `results_folder`, and merged into the
            weights after training. None = train all weights.
        lora_scale: Factor of the updates.
        **settings: Further fields of `LoopSettings`, such as `learning_rate` or `optimizer`.
    """

    _result: TrainResult | None = None  # of a run whose low-rank updates are merged

    @typed
    def __init__(
        self,
        transformer: StageTransformer,
        *,
        wav2vec: SemanticTokenizer | None = None,
        codec: Codec | None = None,
        audio_conditioner: Conditioner | None = None,
        text_conditioner: TextEncoder | None = None,
        folder: DataSource | None = None,
        items: AudioSplit | Dataset | None = None,
        shards: TokenShards | tuple[TokenShards, TokenShards] | None = None,
        data_max_length: int | None = None,
        data_max_length_seconds: float | None = None,
        batch_size: int,
        num_train_steps: int,
        results_folder: str | Path | None = None,
        accelerator: "accelerate.Accelerator | None" = None,
        objective: StageObjective | None = None,
        text_prob: float = 0.0,
        conditioners: Mapping[str, ConditionFunction] | None = None,
        augment_text: TextFunction | None = None,
        augment_waves: WaveFunction | None = None,
        sampler: SampleFunction | None = None,
        lora_rank: int | None = None,
        lora_scale: float = 1.0,
        **settings: Any,
    ) -> None:
        modules = wav2vec, codec, audio_conditioner, text_conditioner
        check_compatible(transformer, *modules)
        if lora_rank is None and lora_scale != 1:
            raise ValueError(f"lora_scale={lora_scale} needs a lora_rank; pass one, or leave it out")
        loop_settings = LoopSettings(num_train_steps=num_train_steps, batch_size=batch_size, **settings)
        sample_hz = getattr(codec or wav2vec, "target_sample_hz", None)
        seconds = crop_seconds(data_max_length, data_max_length_seconds, sample_hz)
        all_shards = (shards, shards) if isinstance(shards, TokenShards) else shards or ()
        shared: dict[str, Any] = dict(seconds=seconds, audio_conditioner=audio_conditioner, seed=loop_settings.seed)
        only_train: dict[str, Any] = dict(text_prob=text_prob, augment_text=augment_text)
        train: StageSource
        valid: StageSource
        if all_shards:
            _check_shards_only(folder=folder, items=items, conditioners=conditioners, augment_waves=augment_waves)
            train = ShardSource(all_shards[0], transformer, **only_train, **shared)
            valid = ShardSource(all_shards[1], transformer, **shared)
        else:
            min_seconds = _token_seconds(seconds, wav2vec, codec)
            needs: dict[str, Any] = dict(channels=getattr(codec, "channels", 1), sample_hz=sample_hz)
            train_items, valid_items = training_items(folder, items, min_seconds=min_seconds, **needs)
            shared |= {"wav2vec": wav2vec, "codec": codec, "conditioners": conditioners}
            train = WaveSource(train_items, transformer, augment_waves=augment_waves, **only_train, **shared)
            valid = WaveSource(valid_items, transformer, **shared)
        _check_conditions(transformer, train)
        if not all_shards:
            _warn_of_unused(transformer, wav2vec, codec, train, bool(conditioners))
        self.transformer, self.conditioner, self.text_conditioner = transformer, audio_conditioner, text_conditioner
        digests = f"{train.digest}, {valid.digest}"
        config: dict[str, Any] = {"data": digests, "crop_seconds": seconds, "text_prob": text_prob}
        config |= _described(augment_text=augment_text, augment_waves=augment_waves)
        self.results_folder = Path(results_folder or f"./results/{transformer.namespace}_transformer")
        config |= {} if lora_rank is None else {"lora": [lora_rank, lora_scale]}
        self.lora = self._new_lora(lora_rank, lora_scale, loop_settings.seed)
        try:
            self.task = StageTask(
                transformer,
                train,
                valid,
                audio_conditioner=audio_conditioner,
                text_conditioner=text_conditioner,
                sampler=sampler,
                objective=objective,
                batch_size=batch_size,
                token_fingerprints=agreed_fingerprints(transformer, *modules, all_shards),
            )
            self.task.config |= config
            self.loop = TrainLoop(self.task, loop_settings, self.results_folder, accelerator)
        except BaseException:
            if self.lora is not None:
                self.lora.remove()
            raise
        if transformer.max_seconds is None:
            transformer.max_seconds = train.crop_seconds

    def _new_lora(self, rank: int | None, scale: float, seed: int) -> LoRA | None:
        """Add low-rank updates to the stage, and freeze what else would be trained."""
        if rank is None:
            return None
        frozen = [] if self.conditioner is None else [self.conditioner.table(self.transformer.namespace)]
        frozen += [] if self.text_conditioner is None else [self.text_conditioner]
        with preserve_rng():
            seed_rng(seed, "lora", device=torch.device("cpu"))
            return LoRA(self.transformer, rank, scale, frozen)

    @typed
    def train(self, stop_after_steps: int | None = None) -> TrainResult:
        """Train the stage to the end of the run, or for at most `stop_after_steps` steps.

        Training continues from the checkpoint in `results_folder`, if there is one. After the last step, the stage and
        its table of condition embeddings have the final weights, into which low-rank updates are merged.
        """
        if self._result is not None:
            return self._result
        result = self.loop.train_and_save(self._save_all, stop_after_steps)
        self._set_fingerprints()
        if self.lora is not None and self.loop.is_finished:
            self._result = result
            self.lora.merge()
        return result

    def _set_fingerprints(self) -> None:
        """Store the fingerprints of tokenizers and conditioners in the trained stage."""
        fingerprints = dict(self.task.token_fingerprints)
        if self.text_conditioner is not None and self.task.trains_text:
            fingerprints["text_encoder"] = self.text_conditioner.fingerprint()
        self.transformer.token_fingerprints = fingerprints

    def _save_all(self) -> None:
        """Save low-rank updates, merge them, and save the result."""
        if self.lora is not None:
            self.lora.save(self.results_folder / LORA_FOLDER)
            self.lora.merge()
        self._save()

    def _save(self) -> None:
        """Save the table of condition embeddings, and then the stage, so that a saved stage always has its table."""
        self._set_fingerprints()
        namespace = self.transformer.namespace
        if self.conditioner is not None:
            table = weights_of(self.conditioner.table(namespace))
            write_weights(self.results_folder / TABLE_FILE, table, sealed=True)
        save_module(self.transformer, self.results_folder / namespace)


def _described(**functions: Any) -> dict[str, str]:
    """Return a description of the functions that are not None, by name."""
    return {
        name: repr(function) if is_dataclass(function) else type(function).__qualname__
        for name, function in functions.items()
        if function is not None
    }


def _check_shards_only(folder: Any, items: Any, conditioners: Any, augment_waves: Any) -> None:
    """Check that no argument of a training on waves is passed with token shards."""
    if folder is not None or items is not None:
        raise ValueError("got shards and audio files; pass only one of folder, items and shards")
    if conditioners:
        raise ValueError("got conditioners and shards; store the condition embeddings in the shards instead")
    if augment_waves is not None:
        raise ValueError("got augment_waves and shards, which have no waves; pass audio files instead")


def _check_conditions(transformer: StageTransformer, train: StageSource) -> None:
    """Check that a stage that is trained on captions has a recording with a caption; warn of missing conditions."""
    missing = sorted({*transformer.further_conditions} - {*train.conditions})
    if missing:
        logger.warning("the data lack %s; the %s transformer is trained without", missing, transformer.namespace)
    if train.has_captions or not (train.uses_captions or train.text_prob > 0):
        return
    setting = f"text_dim={transformer.text_dim}" if train.uses_captions else f"text_prob={train.text_prob}"
    raise ValueError(
        f"the {transformer.namespace} transformer is trained with {setting}, but none of {len(train)} recordings has a "
        "caption; add captions to the manifest, or train without this setting"
    )


def _token_seconds(seconds: float | None, *tokenizers: SemanticTokenizer | Codec | None) -> float:
    """Return the length of the longest token, and check that a crop of `seconds` has at least one token."""
    lengths = [one.downsample_factor / one.target_sample_hz for one in tokenizers if one is not None]
    token_seconds = max(lengths, default=0.0)
    check_crop_seconds(seconds, token_seconds)
    return token_seconds


def _warn_of_unused(
    transformer: StageTransformer,
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
    train: StageSource,
    has_conditioners: bool,
) -> None:
    """Log a warning if the training data or a tokenizer has no influence on the stage."""
    if train.has_captions and not (train.uses_captions or train.text_prob or has_conditioners):
        reason = "condition codes are computed from the audio, since text_prob=0"
        if train.conditioner is None:
            reason = "the stage has no condition"
        logger.warning(
            "the %s transformer is trained without the captions of the recordings: %s. To train on captions, set "
            "text_prob (0.9 for fine-tuning with few recordings) with an audio_conditioner, or build the stage with a "
            "text_dim",
            *(transformer.namespace, reason),
        )
    for name, tokenizer, kind in (("wav2vec", wav2vec, "semantic"), ("codec", codec, "acoustic")):
        if tokenizer is not None and kind not in transformer.kinds:
            logger.warning("the %s transformer has no %s tokens; %s is not used", transformer.namespace, kind, name)


class SemanticTransformerTrainer(StageTrainer):
    """Trainer of the semantic stage, with the arguments of `StageTrainer`."""

    @typed
    def __init__(
        self, *, transformer: SemanticTransformer, wav2vec: SemanticTokenizer | None = None, **options: Any
    ) -> None:
        super().__init__(transformer, wav2vec=wav2vec, **options)


class CoarseTransformerTrainer(StageTrainer):
    """Trainer of the coarse stage, with the arguments of `StageTrainer`."""

    @typed
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
    """Trainer of the fine stage, with the arguments of `StageTrainer`."""

    @typed
    def __init__(self, *, transformer: FineTransformer, codec: Codec | None = None, **options: Any) -> None:
        super().__init__(transformer, codec=codec, **options)


class EntropyTransformerTrainer(StageTrainer):
    """Trainer of the entropy model of a codec, with the arguments of `StageTrainer`.

    Crops of 5 to 10 seconds are long enough, because the model codes sound in windows of at most 512 frames.
    """

    @typed
    def __init__(self, *, transformer: EntropyTransformer, codec: Codec | None = None, **options: Any) -> None:
        super().__init__(transformer, codec=codec, **options)

"""`musiclm tokenize`: compute the tokens of a data set with any number of processes."""

import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import check_at_least, check_data, check_folder, log_to_standard_error, printable_line
from musiclm_pytorch.cli.parts import PartOptions

if TYPE_CHECKING:
    from audiolm_pytorch.data.items import AudioItem

__all__ = ["Tokenize"]

Items = tuple[Sequence["AudioItem"], Sequence["AudioItem"]]


@dataclass(frozen=True, kw_only=True)
class Tokenize(PartOptions):
    """Compute the tokens and MuLaN latents of a data set, which musiclm train --tokens OUT uses.

    Processes of one call or of several calls, also on several machines with one file system, share the work: each takes
    the next chunk of files that no other process is computing. To continue an interrupted call, run it again. Each
    process uses one thread, so that the number of processes does not change the tokens.
    """

    data: Path
    """Folder of audio files or tar archives, or a folder or file with a JSONL manifest."""
    out: Path
    """Folder of the tokens."""
    model: str | None = None
    """MusicLM whose codec, semantic tokenizer and MuLaN are used, unless an option below names others: tiny (bundled),
    a folder, or a hub id."""
    num_processes: int = 1
    """Number of processes that this call starts. With several GPUs, each process uses the next one."""

    def execute(self) -> int:
        """Compute the tokens and print their number and size."""
        import torch

        from audiolm_pytorch.data.manifest import training_items
        from audiolm_pytorch.data.shards import TokenShards
        from musiclm_pytorch.pipeline.token_shards import MIN_SECONDS

        check_at_least(self, num_processes=1)
        check_data(self.data)
        check_folder(self.out)
        torch.set_num_threads(1)
        parts = self._parts()
        items = training_items(self.data, None, min_seconds=MIN_SECONDS, channels=parts["codec"].channels)
        if self.num_processes == 1:
            is_main = self._compute(items, parts)
        else:
            del parts
            self._compute_in_processes(items)
            is_main = True
        if is_main:
            for part in ("train", "valid"):
                folder = self.out / part
                num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                print(printable(f"{folder}: {len(TokenShards(folder)):,} files, {num_bytes / 1e6:,.1f} MB"))
            print(printable(f"musiclm train uses them with --tokens {self.out} and the same --data and parts"))
        return 0

    def _parts(self) -> dict[str, Any]:
        """Load the models, by the names of the arguments of `compute_tokens`."""
        parts = {name.replace("-", "_"): part for name, part in self.pretrained_parts().items()}
        if self.model is not None:
            from musiclm_pytorch.musiclm import MusicLM

            musiclm = MusicLM.from_pretrained(**self.source_of(self.model))
            audio_lm, mulan = musiclm.audio_lm, musiclm.mulan_embed_quantizer.mulan
            parts = {"codec": audio_lm.codec, "semantic_tokenizer": audio_lm.wav2vec, "mulan": mulan, **parts}
        missing = [name for name in ("codec", "semantic_tokenizer", "mulan") if name not in parts]
        if missing:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"--model or {options} is missing; name a MusicLM, or each part")
        return parts

    def _compute(self, items: Items, parts: dict[str, Any]) -> bool:
        """Compute the tokens in this process, and return whether it is the first of its group."""
        from audiolm_pytorch.training.distributed import create_accelerator
        from musiclm_pytorch.pipeline.token_shards import compute_token_split

        accelerator = create_accelerator()
        models = {name: part.eval().to(accelerator.device) for name, part in parts.items()}
        compute_token_split(self.out, items, **models, accelerator=accelerator)
        return accelerator.is_main_process

    def _compute_in_processes(self, items: Items) -> None:
        """Start the processes, and wait for them; if one fails, the others are ended."""
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_work, args=(self, items, number), daemon=True)
            for number in range(self.num_processes)
        ]
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        try:
            while running:
                for sentinel in wait(list(running)):
                    process = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    if process.exitcode:
                        raise ValueError(
                            f"process {processes.index(process) + 1} of {self.num_processes} ended with exit status "
                            f"{process.exitcode}; complete chunks are kept, run the same command again to continue"
                        )
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


def _work(command: Tokenize, items: Items, number: int) -> None:
    """Compute tokens in a process that `Tokenize` has started."""
    import torch

    log_to_standard_error()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        command._compute(items, command._parts())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"musiclm: process {number + 1}: {printable_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

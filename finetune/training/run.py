"""The whole program: a config goes in, a run directory with checkpoints and scores comes out.

What a user can get wrong in config and data is found here, before torch is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import console, launcher
from finetune.artifacts import hub
from finetune.artifacts.resolve import TOKENIZER_FILES, is_hub_id, local_folder
from finetune.artifacts.run_dir import RunDirectory
from finetune.config.schema import RunConfig, held_out_share
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.storage.outputs import check_not_read
from finetune.training import resume
from finetune.training.memory_hints import memory_explained
from finetune.training.run_data import load_run_data
from finetune.training.settle import settled
from finetune.training.trust import check_owner


def train(
    config: RunConfig, config_path: Path | None = None, *, trust_checkpoint: bool = False
) -> dict[str, Any]:
    """Run what `config` says; a run that was interrupted goes on where it stopped.

    Returns:
        `output_dir`, `steps`, `train_loss`, `scores_before`, `scores`, `checkpoint`,
        `best_checkpoint`, `resumed_from`, `seconds`.

    Raises:
        FinetuneError: The user can mend it; every process ends with its exit code.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint written. Before the first
            step there is nothing to save, and a signal ends the process as it would any other.
    """
    console.outlive_a_full_log()
    config = settled(config, launcher.world_size())
    check_not_read(Path(config.training.output_dir), _sources(config), "training.output_dir")
    with RunDirectory.open(config.training.output_dir, leader=console.is_main()) as run_dir:
        for line in run_dir.cleaned:
            console.say(line)
        if config.training.resume == "never":
            resume.choose(run_dir.path, "never")  # refuses an old run at once
        if not trust_checkpoint:
            check_owner(run_dir.path, config.training.resume)
        config = _pinned(config)
        template = ChatTemplate(load_chat_tokenizer(config.model.path, config.model.revision))
        data = load_run_data(config, template)

        with memory_explained(config, longest=int(data.train.lengths.max())):
            from finetune.training.fit import fit

            return fit(config, template, data, run_dir)


def _pinned(config: RunConfig) -> RunConfig:
    """The config with the commit that its model's hub id stands for now, which is recorded."""
    if not is_hub_id(config.model.path):
        return config
    path, revision = config.model.path, config.model.revision
    folder = local_folder(path, revision, files=TOKENIZER_FILES)
    commit = hub.commit_of(folder)
    if commit is None:
        return config
    model = config.model.model_copy(update={"revision": commit})
    return config.model_copy(update={"model": model})


def _sources(config: RunConfig) -> list[str]:
    """Every path of the data section."""
    section = config.data
    listed = [
        source
        for sources in (section.train, section.validation or [])
        if sources is section.train or held_out_share(section.validation) is None
        for source in ([sources] if isinstance(sources, str) else sources)
    ]
    return [source if isinstance(source, str) else source.path for source in listed]

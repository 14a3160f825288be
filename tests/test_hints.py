"""One table: what is wrong with a configuration -> the options that the message tells to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_text import MINIMAL
from hints import options, said, unsaid

from finetune.config import extras
from finetune.config.load import load, load_config, load_mapping, settled
from finetune.config.migrate import migrate
from finetune.config.rules import broken_rules, without_effect


def tree(lines: str) -> dict[str, Any]:
    """The shortest configuration with more lines."""
    found: dict[str, Any] = yaml.safe_load(MINIMAL)
    for name, more in yaml.safe_load(lines).items():
        found[name] = {**found.get(name, {}), **more}
    return found


def of_rules(check: Any, lines: str, key: str) -> str:
    """What a check of the rules says of one key."""
    found = {".".join(map(str, path)): text for path, text in check(tree(lines))}
    return str(found[key])


# What is added to the shortest configuration, the key that is named, and the options in the text.
CONTRADICTIONS = [
    ("training: {max_steps: 1, num_epochs: 1}", "training.num_epochs", "training.max_steps"),
    ("training: {tokens_per_step: 9, gradient_accumulation_steps: 2}\ndata: {packing: true}",
     "training.tokens_per_step", "training.gradient_accumulation_steps"),
    ("training: {tokens_per_step: 9}", "training.tokens_per_step", "data.packing"),
    ("training: {offload_activations: true}", "training.offload_activations",
     "training.activation_checkpointing"),
    ("training: {save: weights, save_weights_every_steps: 2}", "training.save_weights_every_steps",
     "training.save training.save_every_steps"),
    ("training: {optimizer: muon, extra: {optim: sgd}}", "training.optimizer", "training.extra.optim"),
    ("training: {optimizer: muon}\ndeepspeed: {zero_stage: 2}", "training.optimizer", ""),
    ("training: {optimizer: muon}\nmethod: {kind: ptuning_v2}", "training.optimizer", ""),
    ("training: {sequence_parallel: 2}\nmodel: {attention: eager}", "training.sequence_parallel",
     "model.attention"),
    ("training: {warmup_steps: 1.5}", "training.warmup_steps", ""),
    ("training: {extra: {save_only_model: true}}", "training.extra.save_only_model",
     "training.save:weights"),
    ("training: {extra: {optim: adamw_8bit}}", "training.extra.optim", "training.optimizer"),
    ("method: {target_modules: all}", "method.target_modules", ""),
    ("method: {target_modules: [all]}", "method.target_modules", ""),
    ("model: {quantization: nf4}\nmethod: {kind: full}", "model.quantization", "method.kind"),
    ("model: {quantization: nf4}\ndeepspeed: {zero_stage: 3}", "model.quantization",
     "deepspeed.zero_stage"),
    ("model: {quantization: nf4}\ndeepspeed: {config: z.json}", "model.quantization",
     "deepspeed.zero_stage"),
    ("deepspeed: {config: z.json, zero_stage: 2}", "deepspeed.zero_stage", "deepspeed.config"),
    ("deepspeed: {offload_parameters: cpu}", "deepspeed.offload_parameters", "deepspeed.zero_stage"),
    ("deepspeed: {offload_optimizer: cpu, zero_stage: 0}", "deepspeed.offload_optimizer",
     "deepspeed.zero_stage"),
    ("evaluation: {best_metric: bleu-4}", "evaluation.best_metric", "data.validation"),
    ("evaluation: {best_metric: bleu-4, generate: false}\ndata: {validation: a}",
     "evaluation.best_metric", "evaluation.generate"),
    ("evaluation: {patience: 1}\ndata: {validation: a}", "evaluation.patience",
     "evaluation.every_steps"),
    ("evaluation: {patience: 1, every_steps: 1}", "evaluation.patience", "data.validation"),
    ("evaluation: {choose: domain_without_forgetting}", "evaluation.choose", "evaluation.keep"),
    ("evaluation: {keep: {data: a}}", "evaluation.keep", "data.validation"),
    ("evaluation: {keep: {}}\ndata: {validation: a}", "evaluation.keep", "data.replay"),
    ("data: {validation: 100%}", "data.validation", ""),
    ("data: {validation: 0%}", "data.validation", ""),
    ("data: {group_by: a}", "data.group_by", "data.validation"),
    ("data: {group_by: a, validation: b.jsonl}", "data.group_by", "data.validation"),
    ("data: {temperature: 2}", "data.temperature", "data.stop:first"),
    ("data: {format: openai, columns: {prompt: a, response: b}}", "data.columns", "data.format"),
    ("data: {streaming: true}", "training.max_steps", "data.streaming"),
    ("data: {streaming: true, replay: {}}", "data.replay", "--output data.train"),
    ("data: {streaming: true, validation: 5%}", "data.validation", "data.streaming"),
    ("data: {streaming: true, deduplicate: exact}", "data.deduplicate", "data.streaming"),
    ("data: {streaming: true, stop: first}", "data.stop", "data.streaming"),
    ("data: {streaming: true, train: [{path: a, max_rows: 1}]}", "data.train.0.max_rows",
     "data.streaming"),
    ("data: {streaming: true}\ntraining: {num_epochs: 1}", "training.num_epochs",
     "data.streaming training.max_steps"),
]  # fmt: skip

WITHOUT_EFFECT = [
    ("data: {max_bad_rows: 0.1}", "data.max_bad_rows", "data.on_bad_row"),
    ("data: {shuffle_buffer: 5}", "data.shuffle_buffer", "data.streaming"),
    ("data: {streaming: true, group_by_length: true}", "data.group_by_length", "data.streaming"),
    ("data: {streaming: true, max_overlap: 0.5}", "data.max_overlap", "data.streaming"),
    ("data: {streaming: true, cache_image_features: true}", "data.cache_image_features", "data.streaming"),
    ("data: {packing: true, group_by_length: true}", "data.group_by_length", "data.packing"),
    ("evaluation: {every_steps: 5}", "evaluation.every_steps", "data.validation"),
    ("evaluation: {at_start: true}", "evaluation.at_start", "data.validation"),
]  # fmt: skip


def moved(folder: Path, **old: Any) -> str:
    """What a configuration of LLaMA-Factory becomes."""
    file = folder / "old.yaml"
    file.write_text(yaml.safe_dump({"cutoff_len": 8, **old}), encoding="utf-8")
    return migrate(file).text()


def other_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Texts that are not of the rules, and the options in them."""
    monkeypatch.chdir(folder)
    file = folder / "x.yaml"
    file.write_text(MINIMAL.replace("kind: lora", "kind: lora\n  rank: 4"), encoding="utf-8")
    noted = load(file, ["method.kind=full"]).notes[0]
    theirs = folder / "theirs.yaml"
    theirs.write_text("cutoff_len: 8\nstage: sft\nfinetuning_type: lora\n", encoding="utf-8")
    whole = load_config(folder / "x.yaml")
    shared = whole.model_copy(
        update={"training": whole.training.model_copy(update={"sequence_parallel": 2})}
    )
    with monkeypatch.context() as without:
        without.setattr(extras, "find_spec", lambda name: None)
        needs = said(extras.check_optimizer, "adamw_8bit")
        paged = said(extras.check_optimizer, "paged_adamw")
    return [
        (noted, "method.kind method.rank"),
        (said(load, theirs), ANY),
        (said(settled, shared, 3), "training.sequence_parallel --nproc_per_node --gpus"),
        (needs, "training.optimizer"),
        (paged, "training.optimizer"),
        (said(load_mapping, tree("method: {kind: full, rank: 4}")), "method.kind method.rank"),
        (
            said(load_mapping, tree("training: {adam_beta2: 0.9}")),
            "training.adam_beta2 training.extra",
        ),
    ]


ANY = "*"
"""Many options; only the command counts."""


def test_every_text_about_a_configuration_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        *((of_rules(broken_rules, lines, key), named) for lines, key, named in CONTRADICTIONS),
        *((of_rules(without_effect, lines, key), named) for lines, key, named in WITHOUT_EFFECT),
        *other_texts(tmp_path, monkeypatch),
    ]
    wrong = {
        text: (sorted(options(text)), named)
        for text, named in texts
        if named != ANY and options(text) != set(named.split())
    }
    assert wrong == {}
    tables = (
        "migrate_tables.py",
        "migrate.py",
        "reference.py",
        "schema.py",
        "data_section.py",
        "forgetting.py",
    )
    assert unsaid("config", [text for text, _ in texts], but=tables) == []

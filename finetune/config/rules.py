"""What options must hold together; checked on the plain values, beside every other problem."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.config.extras import extra_problems
from finetune.config.problems import METHODS, model_at
from finetune.config.schema import held_out_share
from finetune.config.yaml_text import Key


@dataclass(frozen=True)
class _Values:
    """The tree with each option's default where nothing is given."""

    tree: Any

    def given(self, section: str, name: str) -> bool:
        """True when the file or the command line sets the option to something."""
        return self.raw(section, name) is not None

    def raw(self, section: str, name: str) -> Any:
        """The value as written; None when it is not."""
        node = self.tree.get(section) if isinstance(self.tree, dict) else None
        return node.get(name) if isinstance(node, dict) else None

    def __call__(self, section: str, name: str) -> Any:
        """The value in force."""
        value = self.raw(section, name)
        model = model_at((section,), self.tree)
        if value is None and model is not None and name in model.model_fields:
            return model.model_fields[name].get_default()
        return value


def broken_rules(tree: Any) -> Iterator[tuple[Key, str]]:
    """Keys that contradict each other, each with what to do."""
    values = _Values(tree)
    yield from _model(values)
    yield from _training(values)
    yield from _deepspeed(values)
    yield from _evaluation(values)
    yield from _data(values)
    if values("data", "streaming") is True:
        yield from _streaming(values)


def without_effect(tree: Any) -> Iterator[tuple[Key, str]]:
    """Keys that are given but do nothing in this combination; worth a word, not an error."""
    values = _Values(tree)
    if values.given("data", "max_bad_rows") and values("data", "on_bad_row") == "error":
        yield ("data", "max_bad_rows"), "has no effect: data.on_bad_row is error"
    streaming = values("data", "streaming") is True
    if values.given("data", "shuffle_buffer") and not streaming:
        yield ("data", "shuffle_buffer"), "has no effect: data.streaming is false"
    for name in ("group_by_length", "max_overlap", "cache_image_features"):
        if values.raw("data", name) not in (None, False) and streaming:
            yield ("data", name), "has no effect: data.streaming is true"
    if values.raw("data", "group_by_length") is True and values("data", "packing") is True:
        yield ("data", "group_by_length"), "has no effect: data.packing is true"
    if not values.given("data", "validation"):
        for name in ("every_steps", "at_start"):
            if values.raw("evaluation", name):
                yield ("evaluation", name), "has no effect: there is no data.validation"


def _model(values: _Values) -> Iterator[tuple[Key, str]]:
    if not values.given("model", "quantization"):
        return
    key: Key = ("model", "quantization")
    kind = values.raw("method", "kind")
    method = METHODS.get(kind) if isinstance(kind, str) else None
    if method is not None and not method.trains_4_bits:
        able = " or ".join(name for name, one in METHODS.items() if one.trains_4_bits)
        yield key, f"holds weights in 4 bits, which method.kind {kind} cannot train: choose {able}"
    if values.given("deepspeed", "config") or values("deepspeed", "zero_stage") == 3:
        yield key, "cannot be sharded by ZeRO-3: choose deepspeed.zero_stage 2 or less"


def _training(values: _Values) -> Iterator[tuple[Key, str]]:
    if values.given("training", "max_steps") and values.given("training", "num_epochs"):
        said = "contradicts training.max_steps: give one of the two (null removes the other)"
        yield ("training", "num_epochs"), said
    if values.given("training", "tokens_per_step"):
        key: Key = ("training", "tokens_per_step")
        if values.given("training", "gradient_accumulation_steps"):
            yield key, "contradicts training.gradient_accumulation_steps: give one of the two"
        if values("data", "packing") is not True:
            yield key, "counts full rows: set data.packing to true"
    warmup = values("training", "warmup_steps")
    if isinstance(warmup, float) and warmup > 1 and not warmup.is_integer():
        yield (
            ("training", "warmup_steps"),
            f"must be whole from 1 on (a share below 1), got {warmup}",
        )
    yield from _optimizer(values)
    yield from _long_rows(values)
    yield from _saves(values)
    yield from _on_end(values.raw("training", "on_end"))
    extra = values.raw("training", "extra")
    if isinstance(extra, dict):
        for name, said in extra_problems(extra).items():
            yield ("training", "extra", name), said
    yield from _targets(values)


def _targets(values: _Values) -> Iterator[tuple[Key, str]]:
    pattern = values.raw("method", "target_modules")
    if pattern == []:
        yield ("method", "target_modules"), "names no layer; leave it out for those that are usual"
    elif pattern in ("all", ["all"]):
        yield ("method", "target_modules"), "is no module; every linear layer is all-linear"
    elif isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            yield ("method", "target_modules"), f"is not a regular expression: {error}"


def _optimizer(values: _Values) -> Iterator[tuple[Key, str]]:
    """All but AdamW see whole weights, which DeepSpeed cuts into flat parts."""
    name, key = values("training", "optimizer"), ("training", "optimizer")
    if name == "adamw":
        return
    if isinstance(values.tree.get("deepspeed"), dict):
        yield (
            key,
            f"{name} does not run under DeepSpeed: leave the section deepspeed out, or take adamw",
        )
    extra = values.raw("training", "extra")
    if isinstance(extra, dict) and "optim" in extra:
        yield key, "contradicts training.extra.optim: give one of the two"
    is_plain_prefix = values.raw("method", "kind") == "ptuning_v2" and not values.raw("method", "prefix_projection")  # fmt: skip
    if name == "muon" and is_plain_prefix:
        yield (
            key,
            "muon updates matrices, and a prefix without prefix_projection has none: take adamw",
        )


def _long_rows(values: _Values) -> Iterator[tuple[Key, str]]:
    recomputes = values("training", "activation_checkpointing") is True
    if values("training", "offload_activations") is True and not recomputes:
        said = (
            "keeps what layers are recomputed from: set training.activation_checkpointing to true"
        )
        yield ("training", "offload_activations"), said
    if values("training", "sequence_parallel") == 1:
        return
    key: Key = ("training", "sequence_parallel")
    if (attention := values("model", "attention")) not in ("auto", "sdpa"):
        yield key, f"runs with model.attention auto or sdpa, got {attention}"


def _saves(values: _Values) -> Iterator[tuple[Key, str]]:
    if (
        values.given("training", "save_weights_every_steps")
        and values("training", "save") == "weights"
    ):
        said = "training.save is weights already: set training.save_every_steps"
        yield ("training", "save_weights_every_steps"), said


def _on_end(command: Any) -> Iterator[tuple[Key, str]]:
    if isinstance(command, str):
        try:
            shlex.split(command)
        except ValueError as error:
            yield ("training", "on_end"), f"is no command line ({error})"


def _deepspeed(values: _Values) -> Iterator[tuple[Key, str]]:
    section = values.tree.get("deepspeed") if isinstance(values.tree, dict) else None
    if not isinstance(section, dict):
        return
    if section.get("config") is not None:
        for name in section.keys() - {"config"}:
            yield ("deepspeed", name), "contradicts deepspeed.config: the JSON file says it all"
        return
    stage = values("deepspeed", "zero_stage")
    if values("deepspeed", "offload_parameters") == "cpu" and stage != 3:
        yield ("deepspeed", "offload_parameters"), f"cpu needs deepspeed.zero_stage 3, got {stage}"
    if values("deepspeed", "offload_optimizer") == "cpu" and stage == 0:
        yield ("deepspeed", "offload_optimizer"), "cpu needs deepspeed.zero_stage 1 or more, got 0"


def _evaluation(values: _Values) -> Iterator[tuple[Key, str]]:
    held_out = values.given("data", "validation")
    metric = values("evaluation", "best_metric")
    if metric not in ("loss", "perplexity"):
        key: Key = ("evaluation", "best_metric")
        if values("evaluation", "generate") is False:
            yield key, f"{metric} needs generated replies, but evaluation.generate is false"
        if not held_out:
            yield key, f"{metric} needs held-out dialogues: give data.validation"
    yield from _keeping(values, held_out=held_out)
    if values.given("evaluation", "patience"):
        key = ("evaluation", "patience")
        if not held_out:
            yield key, "needs held-out dialogues: give data.validation"
        if not values.given("evaluation", "every_steps"):
            yield key, "needs more than one evaluation: give evaluation.every_steps"


def _keeping(values: _Values, *, held_out: bool) -> Iterator[tuple[Key, str]]:
    keep = values.raw("evaluation", "keep")
    if keep is None:
        if values("evaluation", "choose") != "best_metric":
            yield ("evaluation", "choose"), "needs what must not be forgotten: give evaluation.keep"
        return
    key: Key = ("evaluation", "keep")
    if not held_out:
        yield key, "is measured beside held-out dialogues: give data.validation"
    given = keep if isinstance(keep, dict) else {}
    if not given.get("data") and not given.get("tasks") and not values.given("data", "replay"):
        yield key, "has nothing to measure: give its data or tasks, or data.replay"


def _data(values: _Values) -> Iterator[tuple[Key, str]]:
    if values.raw("data", "train") == []:
        yield ("data", "train"), "names no file; write one, or a list of them"
    held_out = values.raw("data", "validation")
    is_share = isinstance(held_out, str) and held_out.endswith("%")
    if is_share and held_out_share(held_out) is None:
        yield ("data", "validation"), f"must be over 0% and under 100%, got {held_out}"
    if values.given("data", "group_by") and not is_share:
        yield (
            ("data", "group_by"),
            "groups a held-out share: set data.validation to one, such as 5%",
        )
    if values("data", "streaming") is True and values.given("data", "replay"):
        said = "does not go into a stream: `finetune replay MODEL --output FILE`, and list it in data.train"
        yield ("data", "replay"), said
    if values.given("data", "temperature") and not values.given("data", "stop"):
        yield ("data", "temperature"), "needs data.stop: first or all, where an epoch ends"
    row_format = values("data", "format")
    if values.given("data", "columns") and row_format not in ("auto", "pairs"):
        said = f"are names for prompt/response rows, but data.format is {row_format}"
        yield ("data", "columns"), said


def _streaming(values: _Values) -> Iterator[tuple[Key, str]]:
    """What needs all rows, of which a stream knows only those that it has read."""
    if not values.given("training", "max_steps"):
        said = (
            "is needed with data.streaming: how many rows a stream has is not known before its end"
        )
        yield ("training", "max_steps"), said
    if values.given("training", "num_epochs"):
        yield (
            ("training", "num_epochs"),
            "cannot be counted with data.streaming: give training.max_steps",
        )
    held_out = values.raw("data", "validation")
    if isinstance(held_out, str) and held_out.endswith("%"):
        said = (
            "cannot be a share with data.streaming: give files (`finetune data split` makes them)"
        )
        yield ("data", "validation"), said
    for name, remedy in (
        ("deduplicate", "deduplicate the files first; what is held out is left out in any case"),
        ("stop", "without it a weight says how often rows are seen in a pass"),
    ):
        if values.given("data", name):
            yield ("data", name), f"needs all rows, and data.streaming never has them: {remedy}"
    sources = values.raw("data", "train")
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict) and source.get("max_rows") is not None:
            said = "cannot be kept with data.streaming: name fewer files"
            yield ("data", "train", number, "max_rows"), said

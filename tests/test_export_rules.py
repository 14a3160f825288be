"""What a merge or an export decides before and after the bytes, each rule alone and without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_parts import EMBEDDING, HEAD, adapter, tensor, update

from finetune.artifacts.weights import TensorInfo
from finetune.errors import ConfigError, ModelError
from finetune.export import merge, parity, vocabulary
from finetune.export.adapter import Adapter, Update, _update, _values, combined
from finetune.export.convert import _check_rows
from finetune.export.shards import Output, ShardPlan, make_header

# --- merging ---------------------------------------------------------------------------------------


def delta(one: Update) -> Any:
    return one.scale * one.b @ one.a


def test_adapters_add_up_with_their_weights_and_scales() -> None:
    first, second = (
        adapter({"w": update(scale=0.5), "v": update()}),
        adapter({"w": update(scale=3)}),
    )
    assert combined([(first, 1.0)]) is first
    found = combined([(first, 2.0), (second, -1.0)]).updates
    assert np.allclose(delta(found["w"]), 2 * 0.5 * delta(update()) - 3 * delta(update()))
    assert np.allclose(delta(found["v"]), 2 * delta(update()))
    weaker = combined([(first, 0.25)]).updates["w"]
    assert np.allclose(delta(weaker), 0.125 * delta(update()))


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (adapter({}, {"e": tensor("e", 2)}), "tensors that were trained whole"), (adapter({"w": update(magnitude=np.ones(4, np.float32))}), "DoRA lengths"),
        (adapter({"w": update(5, 3)}), "do not fit one base"), (adapter({"w": update(4, 2)}), "do not fit one base"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_up_is_refused_wherever_it_stands(
    second: Adapter, reason: str
) -> None:
    first = adapter({"w": update()})
    for order in ([(first, 1.0), (second, 1.0)], [(second, 1.0), (first, 1.0)]):
        with pytest.raises(ModelError, match=reason):
            combined(order)
    if "fit" not in reason:
        with pytest.raises(ModelError, match=reason):
            combined([(second, 0.5)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_of_an_adapter_that_is_none_is_refused(value: float, tmp_path: Path) -> None:
    values = np.array([1, 2, value, 4], np.float32)
    output = Output("a", "F32", (4,), constant=values.tobytes())
    file = tmp_path / "x.safetensors"
    header = make_header([output], {})
    file.write_bytes(header + output.constant)
    there = TensorInfo(file, "a", "F32", (4,), len(header), len(header) + 16)
    with pytest.raises(ModelError, match="not finite"):
        _values(there)
    assert _values(replace(there, shape=(2,), end=there.start + 8)).tolist() == [1, 2]


PRESENT = {name: tensor(name, 4, 3) for name in ("w", EMBEDDING, HEAD)}  # fmt: skip


@pytest.mark.parametrize(
    ("tuned", "longer", "problem"),
    [
        (adapter({"w": update()}), False, ""), (adapter({"x": update()}), False, "x is not there"), (adapter({"w": update(5)}), False, r"w is \(4, 3\), the adapter's is \(5, 3\)"),
        (adapter({}, {"x": tensor("x", 1)}), False, "x is not there"), (adapter({}, {"w": tensor("w", 5, 3)}), True, r"w is \(4, 3\)"),
        (adapter({}, {EMBEDDING: tensor("e", 5, 3)}), True, ""), (adapter({}, {EMBEDDING: tensor("e", 5, 3)}), False, r"is \(4, 3\), the adapter's is \(5, 3\)"),
        (adapter({}, {}, ["it has nothing for q"]), False, "it has nothing for q"), (None, False, ""), (adapter({f"x{n}": update() for n in range(7)}), False, "and 2 more"),
        (adapter({f"x{n}": update() for n in range(5)}), False, "x4 is not there\nGive"),
    ],
)  # fmt: skip
def test_an_adapter_fits_its_base_or_every_misfit_is_named(
    tuned: Adapter | None, longer: bool, problem: str
) -> None:
    if not problem:
        merge._check_fit(tuned, PRESENT, Path("base"), longer=longer)
        return
    with pytest.raises(ModelError, match=problem):
        merge._check_fit(tuned, PRESENT, Path("base"), longer=longer)


@pytest.mark.parametrize(
    ("tied", "touched", "untied"),
    [(True, {EMBEDDING}, True), (True, {HEAD}, True), (True, {"w"}, False), (False, {EMBEDDING}, False), (None, {HEAD}, False)],
)  # fmt: skip
def test_a_tied_model_is_untied_where_an_adapter_touches_either_end(
    tied: bool | None, touched: set[str], untied: bool
) -> None:
    config = {} if tied is None else {"tie_word_embeddings": tied}
    for tuned in (adapter(dict.fromkeys(touched, update())), adapter({}, dict.fromkeys(touched, tensor("x", 1)))):  # fmt: skip
        found = merge._untied_head(config, {EMBEDDING: PRESENT[EMBEDDING]}, tuned)
        assert found == ({HEAD: PRESENT[EMBEDDING]} if untied else {})
    assert merge._untied_head(config, PRESENT, None) == {}


def test_only_numbers_that_round_change_their_format(tmp_path: Path) -> None:
    for one, dtype, wanted in ((PRESENT["w"], None, "F32"), (PRESENT["w"], "float16", "F16")):  # fmt: skip
        assert merge._output(one.name, one, None, dtype, True).dtype == wanted
    whole = tensor("w", 9, 3)
    made = merge._output("w", PRESENT["w"], adapter({}, {"w": whole}), None, True)
    assert (made.sources, made.shape, made.update, made.checked) == ((whole,), (9, 3), None, True)
    change = update()
    made = merge._output("w", PRESENT["w"], adapter({"w": change}), None, False)
    assert (made.sources, made.update, made.checked) == ((PRESENT["w"],), change, False)


@pytest.mark.parametrize(
    ("config", "how", "changed"),
    [
        ({"a": 1}, {}, None), ({"torch_dtype": "float32"}, {"dtype": "float16"}, {"torch_dtype": "float16"}), ({"dtype": "float32"}, {"dtype": "float16"}, {"dtype": "float16"}),
        ({"torch_dtype": "float16"}, {"dtype": "float16"}, None), ({"tie_word_embeddings": True}, {"untied": True}, {"tie_word_embeddings": False}),
        ({"vocab_size": 5, "padded_vocab_size": 6, "x_size": 7}, {"more": 2}, {"vocab_size": 7, "padded_vocab_size": 8, "x_size": 7}),
    ],
)  # fmt: skip
def test_the_config_says_what_is_written_and_stays_as_it_is_otherwise(
    config: dict[str, Any], how: dict[str, Any], changed: dict[str, Any] | None, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"dtype": None, "untied": False, "more": 0} | how
    output = Output("w", "F32", (2, 2), (tensor("w", 2, 2),))
    plans = [ShardPlan("model-1.safetensors", b"12345678", (output,))]
    texts = merge._new_texts(tmp_path, config, plans, **given)
    assert (json.loads(texts["config.json"]) if "config.json" in texts else None) == changed
    assert "model.safetensors.index.json" not in texts
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1, "total_size": 9}, "weight_map": {"w": "old"}}))  # fmt: skip
    texts = merge._new_texts(tmp_path, config, plans, **given)
    written = texts.get("model.safetensors.index.json")
    assert (written is None) is (how == {})
    if written:
        assert json.loads(written) == {"metadata": {"x": 1, "total_size": 16}, "weight_map": {"w": "model-1.safetensors"}}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({}, 0), ({EMBEDDING: 4, HEAD: 4}, 0), ({EMBEDDING: 6, HEAD: 6}, 2), ({EMBEDDING: 3, HEAD: 3}, 0),
        ({EMBEDDING: 6}, "lm_head"), ({HEAD: 6}, "embed_tokens"), ({EMBEDDING: 6, HEAD: 5}, "lm_head"), ({EMBEDDING: 6, HEAD: 4}, "lm_head"),
    ],
)  # fmt: skip
def test_a_longer_vocabulary_is_longer_at_both_ends(sizes: dict[str, int], rows: int | str) -> None:
    tuned = adapter({}, {name: tensor(name, size, 3) for name, size in sizes.items()})
    if isinstance(rows, int):
        assert vocabulary.added_rows(tuned, PRESENT) == rows
        assert vocabulary.added_rows(None, PRESENT) == 0
        return
    with pytest.raises(ModelError, match=rf"more than the base's in .*and not in .*{rows}"):
        vocabulary.added_rows(tuned, PRESENT)


def test_a_longer_vocabulary_brings_its_tokenizer_or_says_that_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    files, [said] = vocabulary.tokenizer_of(tmp_path, 2)
    assert files == {}
    assert "2 tokens more than the base's, and" in said
    assert "brings no tokenizer" in said
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        files, [said] = vocabulary.tokenizer_of(tmp_path, 2)
        assert files == {f: tmp_path / f for f in (name, "tokenizer_config.json")}
        assert said.endswith("the tokenizer is the adapter's")
        (tmp_path / name).unlink()
    assert vocabulary.tokenizer_of(tmp_path, 0) == ({}, [])
    vocabulary.check_can_open(2, "tensors")
    vocabulary.check_can_open(0, "full")
    with pytest.raises(ConfigError, match="has 2 tokens less"):
        vocabulary.check_can_open(2, "full")


@pytest.mark.parametrize("rows", [3, 5])
def test_a_matrix_has_as_many_rows_as_its_config_says(rows: int) -> None:
    _check_rows(tensor("w", 4, 3), 4)
    with pytest.raises(ModelError, match=f"has 4 rows and the config says {rows}"):
        _check_rows(tensor("w", 4, 3), rows)


def test_sources_that_cannot_be_added_up_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "whole"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.setattr(merge, "find_source", lambda path: (path, [f"took {path.name}"]))
    monkeypatch.setattr(merge, "is_adapter", lambda path: path.name != "whole")
    a, b, whole, link = (tmp_path / name for name in ("a", "b", "whole", "link"))
    found, notes = merge._find_sources([(a, 1.0), (b, 0.5)])
    assert (found, notes) == ([(a, 1.0), (b, 0.5)], ["took a", "took b"])
    assert merge._find_sources([(whole, 1.0)])[0] == [(whole, 1.0)]
    for given, reason in (
        ([(whole, 0.5)], "is a whole model"), ([(a, 1.0), (whole, 1.0)], "is a whole model"), ([(a, 1.0), (a, 1.0)], "given twice"),
        ([(a, 1.0), (link, 2.0)], "given twice"), ([(a, float("nan"))], "finite number"), ([(a, float("inf"))], "finite number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            merge._find_sources(given)


@pytest.mark.parametrize(
    ("difference", "largest", "in_float32", "passes"),
    [(0.0, 1, True, True), (0.9e-4, 1, True, True), (1.1e-4, 1, True, False), (1.1e-4, 2, True, True), (0.9e-4, 0.1, True, True), (0.04, 1, False, True), (0.06, 1, False, False), (float("nan"), 1, False, False)],
)  # fmt: skip
@pytest.mark.parametrize("at", [0, 1])
def test_logits_may_differ_by_rounding_on_every_prompt(
    difference: float, largest: float, in_float32: bool, passes: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    import torch

    before = [torch.full((1, 2, 3), float(largest)) for _ in range(2)]
    after = [one.clone() for one in before]
    after[at][0, 1, 2] -= difference
    told = iter([before, after])
    monkeypatch.setattr(parity.gc, "collect", lambda: 0)  # a second of every test's leavings
    model = SimpleNamespace(config=None)
    for name, value in (("load_model", lambda *_, **__: model), ("_prompts", lambda config: []), ("_adapted", lambda model, adapters: model), ("_logits", lambda model, prompts: next(told)), ("_in_float32", lambda model, folder: in_float32)):  # fmt: skip
        monkeypatch.setattr(parity, name, value)
    if passes:
        assert parity.check_parity(Path("a"), [], Path("b")) == pytest.approx(difference, abs=1e-7)
        return
    with pytest.raises(ModelError, match="differ from those before"):
        parity.check_parity(Path("a"), [], Path("b"))


def test_memory_that_runs_out_in_a_check_is_not_a_broken_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error, kind in ((MemoryError(), MemoryError), (KeyError("x"), ModelError)):

        def fail(model: Any, adapters: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(parity, "load_model", lambda *_, **__: SimpleNamespace(config=None))
        monkeypatch.setattr(parity, "_prompts", lambda config: [])
        monkeypatch.setattr(parity, "_adapted", fail)
        with pytest.raises(kind):
            parity.check_parity(Path("a"), [], Path("b"))


def test_a_base_that_is_gone_is_asked_for_unless_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str, revision: Any) -> Path:
        raise ModelError(f"not a directory: {path}")

    monkeypatch.setattr(merge, "is_adapter", lambda path: True)
    monkeypatch.setattr(merge, "model_base", lambda source, given: SimpleNamespace(path=given or "old", revision=None))  # fmt: skip
    monkeypatch.setattr(merge, "local_folder", gone)
    with pytest.raises(ModelError, match="Give its new place with --base"):
        merge.find_base(tmp_path, None)
    with pytest.raises(ModelError, match=r"^not a directory: .*new$"):
        merge.find_base(tmp_path, tmp_path / "new")
    monkeypatch.setattr(merge, "is_adapter", lambda path: False)
    assert merge.find_base(tmp_path, None) == tmp_path
    with pytest.raises(ConfigError, match="--base does not apply"):
        merge.find_base(tmp_path, tmp_path)


def test_an_embedding_is_turned_around_and_has_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(8, dtype=np.float32).reshape(4, 2)  # fmt: skip
    monkeypatch.setattr("finetune.export.adapter._values", lambda name: {"a": a, "b": b, "v": b[0]}[name])  # fmt: skip
    files: Any = SimpleNamespace(config={}, scale=lambda module: 3.0, modules={"e": {"lora_embedding_A": "a", "lora_embedding_B": "b"}, "l": {"lora_A": "a", "lora_B": "b"}, "n": {"lora_A": "v", "lora_B": "b"}})  # fmt: skip
    turned, plain = _update(files, "e"), _update(files, "l")
    assert np.array_equal(delta(turned), 3 * (b @ a).T)
    assert np.array_equal(delta(plain), 3 * b @ a)
    files.config["use_dora"] = True
    with pytest.raises(ModelError, match="DoRA on an embedding"):
        _update(files, "e")
    with pytest.raises(ModelError, match="n is no matrix"):
        _update(files, "n")

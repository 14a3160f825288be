"""Merging without a model: what is handed on, what is refused, and the numbers of each path."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, make_base
from export_parts import EMBEDDING, HEAD, adapter, stored, tensor, update

from finetune import console
from finetune.errors import ConfigError, ModelError, SpaceError
from finetune.export import adapter as adapter_module
from finetune.export import folder as folder_module
from finetune.export import merge, parity, push, vocabulary
from finetune.export.adapter import Update, _of_experts
from finetune.export.checks import ProductCheck
from finetune.export.folder import FolderPlan, written
from finetune.export.shards import Output, ShardPlan, make_header, write_shard

RANDOM = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32)


# --- the arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_a_wide_matrix_is_changed_piece_by_piece(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = Update(floats(rank, 10), floats(4, rank), np.float32(0.5))
    before = floats(4, 10)
    for product in (1, 4 * rank * 3, 1 << 18):
        monkeypatch.setattr(adapter_module, "_PRODUCT", product)
        weights = before[1:3].copy()
        assert change.apply(slice(1, 3), weights, np.full_like(weights, np.nan)) is None
        assert np.allclose(weights, (before + 0.5 * change.b @ change.a)[1:3], atol=1e-5)


def test_lengths_of_rows_are_added_up_in_double() -> None:
    """The squares of 1e20 are no numbers of float32."""
    change = Update(np.zeros((1, 4), np.float32), np.zeros((1, 1), np.float32), np.float32(1), np.array([3.0], np.float32))  # fmt: skip
    weights = np.full((1, 4), 1e20, np.float32)
    factors = change.apply(slice(0, 1), weights, np.empty_like(weights))
    assert factors == pytest.approx(1.5e-20)
    assert np.allclose(weights, 1.5)


@pytest.mark.parametrize("parts", [1, 2])
def test_each_expert_gets_its_own_rows_of_what_all_share(parts: int) -> None:
    """A is [experts x rank, in]; in B the experts are innermost."""
    experts, rank, rows, columns = 3, 2, 4 * parts, 5
    a, b = floats(experts * rank, columns), floats(rows, rank * experts)
    name = f"x.experts.{'gate_up_proj' if parts == 2 else 'down_proj'}"
    files: Any = SimpleNamespace(ranks={name: rank}, config={}, modules={name: {"lora_A": "a", "lora_B": "b"}}, scale=lambda module: 3.0)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_module, "_values", {"a": a, "b": b}.get)
        found = _of_experts(files, name)
        odd = {**files.modules[name], "lora_B": "odd"}
        patch.setattr(adapter_module, "_values", {"a": a, "odd": b[: rows - 1]}.get)
        files.modules[name] = odd
        if parts == 2:
            with pytest.raises(
                ModelError, match="its 7 rows are not those of gate_proj and up_proj"
            ):
                _of_experts(files, name)
    leaves = ("gate_proj", "up_proj") if parts == 2 else ("down_proj",)
    assert list(found) == [
        f"x.experts.{e}.{leaf}.weight" for e in range(experts) for leaf in leaves
    ]
    for e in range(experts):
        whole = 3.0 * b.reshape(rows, rank, experts)[:, :, e] @ a[e * rank : (e + 1) * rank]
        for leaf, wanted in zip(leaves, np.split(whole, parts), strict=True):
            one = found[f"x.experts.{e}.{leaf}.weight"]
            assert np.allclose(one.scale * one.b @ one.a, wanted, atol=1e-5)


def test_one_huge_number_hides_no_wrong_one_and_no_number_is_never_right() -> None:
    still = Update(np.zeros((1, 4), np.float32), np.zeros((2, 1), np.float32), np.float32(1))
    check = ProductCheck("w", still, "F32")
    values = np.full((2, 4), 1e25, np.float32)
    before = check.before(values)
    check.after(0, before, values)
    for wrong in (np.float32(1.1e25), np.float32("nan"), np.float32("inf")):
        other = values.copy()
        other[1, 2] = wrong
        with pytest.raises(ModelError, match=r"rows 0 to 1 of what was merged are not"):
            check.after(0, before, other)


# --- the plan of a merge ---------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A base of two tensors in one file."""
    base = tmp_path / "plain"
    base.mkdir()
    (base / "config.json").write_text('{"vocab_size": 4}')
    stored(base / "model.safetensors", **{EMBEDDING: ("F32", floats(4, 3)), HEAD: ("F32", floats(4, 3))})  # fmt: skip
    return base


@pytest.mark.parametrize(("rows", "fits"), [(4, True), (6, True), (3, False)])
def test_a_vocabulary_may_be_longer_and_never_shorter(rows: int, fits: bool, plain: Path) -> None:
    tuned = adapter({}, {name: tensor(name, rows, 3) for name in (EMBEDDING, HEAD)})
    if not fits:
        with pytest.raises(ModelError, match=r"is \(4, 3\), the adapter's is \(3, 3\)"):
            merge._plan(plain, tuned, None, checked=True)
        return
    plan, untied, more = merge._plan(plain, tuned, None, checked=True)
    assert (untied, more) == (False, rows - 4)
    shapes = [output.shape for shard in plan.shards for output in shard.outputs]
    assert shapes == [(rows, 3), (rows, 3)]
    told = json.loads(plan.texts["config.json"]) if plan.texts else {"vocab_size": 4}
    assert told == {"vocab_size": rows}


@pytest.mark.parametrize("checked", [True, False])
def test_a_matrix_is_checked_where_that_is_asked(checked: bool, plain: Path) -> None:
    plan, *_ = merge._plan(plain, adapter({HEAD: update(4, 3)}), "float16", checked=checked)
    (shard,) = plan.shards
    assert [(o.checked, o.dtype, o.update is None) for o in shard.outputs] == [(checked, "F16", True), (checked, "F16", False)]  # fmt: skip
    assert list(plan.copies) == []


def test_weights_that_are_no_floats_and_files_that_lead_out_are_no_base(plain: Path) -> None:
    (plain / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="is a link that leads out"):
        merge._plan(plain, None, None, checked=True)
    (plain / "vocab.txt").unlink()
    stored(plain / "model.safetensors", w=("I8", np.zeros(3, np.int8)))
    with pytest.raises(ModelError, match="quantised weights without their scales"):
        merge._plan(plain, None, None, checked=True)


def test_an_adapter_is_held_against_the_matrices_of_its_base() -> None:
    asked: list[Any] = []
    files: Any = SimpleNamespace(misfits=lambda modules: asked.extend(modules) or [])  # type: ignore[func-returns-value]
    tuned = adapter_module.Adapter(Path("a"), files, {}, {})
    present = {
        name: tensor(name, *shape)
        for name, shape in (("a.weight", (2, 2)), ("norm.weight", (2,)), ("a.bias", (2,)), ("x.experts.0.up_proj.weight", (2, 2)))
    }  # fmt: skip
    merge._check_fit(tuned, present, Path("base"), longer=False)
    assert asked == ["a", "x.experts.0.up_proj", "x.experts.gate_up_proj", "x.experts.down_proj"]


def test_a_base_of_the_hub_is_the_revision_that_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(merge, "is_adapter", lambda path: True)
    monkeypatch.setattr(merge, "model_base", lambda source, given: asked.append((source, given)) or SimpleNamespace(path="o/n", revision="abc"))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(merge, "local_folder", lambda path, revision: asked.append((path, revision)) or Path("there"))  # type: ignore[func-returns-value]  # fmt: skip
    for given in (None, Path("new")):
        assert merge.find_base(Path("a"), given) == Path("there")
    assert asked == [(Path("a"), None), ("o/n", "abc"), (Path("a"), "new"), ("o/n", "abc")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters of it."""
    work = tmp_path_factory.mktemp("work")
    base = make_base(work / "base", shards=1)
    make_adapter(work / "one", base, target_modules=["q_proj"])
    make_adapter(work / "two", base, target_modules=["q_proj"], seed=2)
    make_adapter(work / "head", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return work


def test_a_merge_counts_what_it_did_and_its_card_says_it(work: Path, tmp_path: Path) -> None:
    told = {}
    for name, source in (("one", work / "one"), ("both", [(work / "one", 0.5), (work / "two", -1.5)]), ("head", work / "head"), ("base", work / "base")):  # fmt: skip
        report = merge.merge(source, tmp_path / name)
        size = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        assert report.num_bytes == size
        assert (report.output, report.base, report.largest_difference) == (tmp_path / name, work / "base", None)  # fmt: skip
        assert 0 < report.seconds < 60
        card = (tmp_path / name / "README.md").read_text()
        told[name] = (report.num_updated, report.num_replaced, card.split("\n\n")[2])
        assert f"\n# {name}\n" in card
    assert told == {
        "one": (2, 0, "A LoRA adapter merged into base: plain weights, opened as the base is."),
        "both": (2, 0, "2 LoRA adapters merged into base: plain weights, opened as the base is."),
        "head": (2, 1, "A LoRA adapter merged into base: plain weights, opened as the base is."),
        "base": (0, 0, "A fully tuned GLM-4 as one plain checkpoint."),
    }


def test_the_full_check_opens_all_adapters_each_as_strong_as_its_weight(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(work / "one", 0.5), (work / "two", -1.5)]
    report = merge.merge(both, tmp_path / "out", check="full")
    assert report.largest_difference is not None
    assert report.largest_difference < 1e-4
    with pytest.raises(ModelError, match="differ from those before"):
        parity.check_parity(work / "base", [(work / "one", 0.5), (work / "two", 1.5)], tmp_path / "out")  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr(parity, "check_parity", lambda *given, **how: seen.append((given[:2], how)) or 0.0)  # type: ignore[func-returns-value]  # fmt: skip
    merge.merge(both, tmp_path / "again", check="full", device_map="auto")
    merge.merge(work / "base", tmp_path / "whole", check="full", device_map="auto")
    assert seen == [((work / "base", both), {"device_map": "auto"})]


def test_no_output_lies_in_any_of_the_adapters(work: Path) -> None:
    for folder in ("base", "one", "two"):
        with pytest.raises(ConfigError, match="lies inside"):
            merge.merge([(work / "one", 0.5), (work / "two", 1.0)], work / folder / "new")


def test_notes_of_all_adapters_are_told(work: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "find_source", lambda path: (path, [f"took {path.name}"]))
        patch.setattr(merge, "check_base", lambda folder, base, force: [f"{folder.name} {base.name} {force}"])  # fmt: skip
        report = merge.merge([(work / "one", 0.5), (work / "two", 1.0)], tmp_path / "out", force=True)  # fmt: skip
    assert report.notes == ("took one", "took two", "one base True", "two base True")


# --- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "computed", "exact"),
    [(["F32", "F32"], torch.float32, True), (["F32", "BF16"], torch.float32, False), (["F32"], torch.bfloat16, False)],
)  # fmt: skip
def test_a_difference_is_exact_only_where_nothing_was_rounded(
    formats: list[str], computed: torch.dtype, exact: bool, tmp_path: Path
) -> None:
    values = {"F32": np.float32, "BF16": np.uint16}
    stored(tmp_path / "model.safetensors", **{f"t{n}": (f, np.zeros(2, values[f])) for n, f in enumerate(formats)})  # type: ignore[arg-type]  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].to(computed)
    assert parity._in_float32(model, tmp_path) is exact


def test_prompts_are_the_same_every_time_short_and_long_and_with_images_where_there_are_any() -> (
    None
):
    def config(**how: Any) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50), **how)

    plain = parity._prompts(config())
    again = parity._prompts(config())
    assert [p["input_ids"].shape for p in plain] == [(1, 7), (1, 16), (1, 33)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain, again, strict=True))  # fmt: skip
    seen = parity._prompts(config(image_patches=4, pad_token_id=None, boi_token_id=48, eoi_token_id=49, vision_config=SimpleNamespace(image_size=8)))  # fmt: skip
    assert seen[3]["input_ids"][0, :6].tolist() == [48, 0, 0, 0, 0, 49]
    assert torch.equal(seen[3]["input_ids"][0, 6:], seen[0]["input_ids"][0])
    assert seen[3]["pixel_values"].shape == (1, 3, 8, 8)
    vision = SimpleNamespace(spatial_merge_size=2, in_channels=3, temporal_patch_size=2, patch_size=7)  # fmt: skip
    some = int(plain[0]["input_ids"][0, 3])
    shaped = parity._prompts(config(image_token_id=some, image_start_token_id=40, image_end_token_id=41, vision_config=vision))  # fmt: skip
    assert all(some not in p["input_ids"] for p in shaped[:3])
    span = [40, some, some, some, some, 41]
    found = shaped[3]["input_ids"][0].tolist()
    assert (found[:6], found[-6:], len(found)) == (span, span, 19)
    assert shaped[3]["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert shaped[3]["pixel_values"].shape == (32, 3 * 2 * 49)


# --- files -----------------------------------------------------------------------------------------


def test_a_writer_leaves_no_file_and_no_thread_open(tmp_path: Path) -> None:
    source = stored(tmp_path / "a", w=("F32", floats(3, 2)), v=("F32", floats(5)))
    outputs = (Output("w", "F16", (3, 2), (source["w"],)), Output("v", "F32", (5,), (source["v"],)))
    plan = ShardPlan("x", make_header(outputs, {}), outputs)
    files, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    write_shard(plan, tmp_path / "x", stop=threading.Event(), advance=lambda size: None)
    with pytest.raises(FileExistsError):
        write_shard(plan, tmp_path / "x", stop=threading.Event(), advance=lambda size: None)
    os.truncate(tmp_path / "a", source["v"].start - 4)
    with pytest.raises(ModelError, match="became shorter"):
        write_shard(plan, tmp_path / "y", stop=threading.Event(), advance=lambda size: None)
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert threading.active_count() <= threads
    mask = os.umask(0o22)
    os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_matrix_of_no_columns_is_written_as_it_is(tmp_path: Path) -> None:
    source = stored(tmp_path / "a", w=("F32", floats(4, 0)))["w"]
    output = Output("w", "F32", (4, 0), (source,), Update(floats(2, 0), floats(4, 2), np.float32(1)))  # fmt: skip
    plan = ShardPlan("x", make_header((output,), {}), (output,))
    write_shard(plan, tmp_path / "x", stop=threading.Event(), advance=lambda size: None)
    assert (tmp_path / "x").stat().st_size == plan.size == len(plan.header)


def test_a_tensor_s_size_is_that_of_its_new_format() -> None:
    wide, narrow = tensor("a", 3, 2), tensor("b", 5, 2, dtype="BF16")
    assert Output("x", "F32", (8, 2), (wide, narrow)).size == 8 * 2 * 4
    assert Output("x", "BF16", (8, 2), (wide, narrow), constant=b"123").size == 8 * 2 * 2 + 3


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be made .*choose another --output"), written(FolderPlan((), {}, {}), tmp_path / "file/in/out", "made"):  # fmt: skip
        pass
    with written(FolderPlan((), {"a.json": "{}"}, {}), tmp_path / "new/in/out", "made"):
        pass
    assert (tmp_path / "new/in/out/manifest.json").is_file()


def test_what_a_dead_process_left_is_removed_and_told_and_a_failed_check_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(folder_module.folders, "sweep", lambda parent, names: asked.append(parent) or ["removed x"])  # type: ignore[func-returns-value]  # fmt: skip
    with pytest.raises(ModelError), written(FolderPlan((), {"a.json": "{}"}, {}), tmp_path / "out", "made"):  # fmt: skip
        raise ModelError("other logits")
    assert capsys.readouterr().out == "removed x\n"
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_progress_is_counted_in_megabytes_and_none_is_lost_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []

    @contextmanager
    def progress(total: int, label: str) -> Iterator[Any]:
        told.append((total, label))
        yield SimpleNamespace(advance=told.append)

    monkeypatch.setattr(console, "progress", progress)
    with folder_module._megabytes(2_500_000, "merged") as advance:
        for size in (900_000, 900_000, 700_000):
            advance(size)
    assert told == [(2, "MB merged"), 0, 1, 1]


def test_a_disk_that_refuses_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "write_shard", full)
    plan = FolderPlan((ShardPlan("a", b"", ()),), {}, {})
    with pytest.raises(SpaceError), written(plan, tmp_path / "out", "made"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"])  # fmt: skip
def test_every_file_of_a_tokenizer_comes_with_it(name: str, tmp_path: Path) -> None:
    for file in {"tokenizer.json", name}:
        (tmp_path / file).write_text("{}")
    files, _ = vocabulary.tokenizer_of(tmp_path, 2)
    assert files[name] == tmp_path / name


# --- pushing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["name", "a/b/c", "hf://a/b", "../x", ""])
def test_a_repository_has_an_owner_and_a_name(repo: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form owner/name"):
        push.push(tmp_path, repo, send=True)


def test_what_cannot_be_pushed_is_said_with_what_can(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "find_source", lambda path: (path, []))
    monkeypatch.setattr(push, "verify", lambda path: [])
    with pytest.raises(ConfigError, match=r"--base does not apply: .*plain is a whole model"):
        push.push(plain, "me/x", send=True, base="o/b")
    sizes = push.push(plain, "me/x", send=False).files
    assert sizes == {file.name: file.stat().st_size for file in plain.iterdir()}
    assert list(sizes) == sorted(sizes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither an adapter nor a model"):
        push.push(tmp_path / "empty", "me/x", send=True)

    def offline(*_: Any, **__: Any) -> Any:
        raise push.OfflineModeIsEnabled("no")

    monkeypatch.setattr(push, "HfApi", lambda: SimpleNamespace(create_repo=offline, endpoint="x"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it"):
        push.push(plain, "me/x", send=True)

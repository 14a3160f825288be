"""What decides how a model is opened: sizes, formats, attention, what libraries say meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import tiny
import torch
import transformers
from torch import nn

from finetune.artifacts.plain_files import read_json
from finetune.errors import ConfigError, ModelError
from finetune.models import load, model_size, wide_residual
from finetune.models.families import FAMILIES
from finetune.models.library_logging import quiet_libraries
from finetune.models.load import check_finite, load_model, num_heads, shape_of
from finetune.models.number_format import number_format

# --- how large a model is ------------------------------------------------------------------------------

NOT_COUNTED = r".*(shared_experts|norm|linear_proj|merger|lm_head|output_layer|mlp\.gate\.|embeddings?\.|boi|eoi).*"
"""Matrices that are small beside the others, and the head, which may be tied."""


def model_of(family: str, folder: Path) -> Path:
    if family == "GLM-4V":
        return pictures.save_model(folder)
    if family in pictures.GRID_FAMILIES:
        return pictures.save_grid_model(folder)
    return tiny.save_model(folder, family)


@pytest.mark.parametrize("family", ["chatglm", "GLM-4V", "glm", "glm4", "glm4_moe", "glm4v"])
def test_the_numbers_that_a_config_asks_for_are_those_of_its_matrices(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(family, tmp_path / "model")
    config = FAMILIES[read_json(folder / "config.json")["model_type"]].config_class.from_pretrained(folder)  # fmt: skip
    nothing = SimpleNamespace(shape=(-500_000,))  # so that any number is too large
    with monkeypatch.context() as patch:
        patch.setattr(model_size, "tensors", lambda _: {"x": nothing})
        with pytest.raises(ModelError, match="asks for about") as caught:
            model_size.check_size(folder, config)
    said = int(re.search(r"about ([\d,]+) numbers", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    model = load_model(folder)
    counted = sum(
        weight.numel() for name, weight in model.named_parameters()
        if (weight.dim() in (2, 3) and not re.fullmatch(NOT_COUNTED, name)) or "word_embeddings" in name
    )  # fmt: skip
    assert said == counted


def test_heads_are_as_wide_as_their_share_of_the_model_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, hidden_size=1000,
        intermediate_size=0, vocab_size=0,
    )  # fmt: skip
    config = SimpleNamespace(get_text_config=lambda: text)
    monkeypatch.setattr(model_size, "tensors", lambda _: {})
    for width in (None, 250):
        text.head_dim = width
        with pytest.raises(ModelError, match="about 3,000,000 numbers and its weights hold 0"):
            model_size.check_size(Path("x"), config)


def test_rows_are_shared_out_by_the_heads_of_the_text_and_not_of_what_sees(
    tiny_glm: Path, tiny_chatglm: Path, tmp_path: Path
) -> None:
    for folder in (tiny_glm, tiny_chatglm):
        assert num_heads(folder) == (4, 2)
    with pytest.raises(ConfigError, match="sees images; leave it out"):
        num_heads(pictures.save_model(tmp_path / "model"))


@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4v"])
def test_a_shape_is_as_deep_as_it_is_asked_to_be_and_attends_by_documents(
    family: str, tmp_path: Path
) -> None:
    folder = model_of(family, tmp_path / "model")
    attention = re.compile(FAMILIES[family].attention)

    def depth(model: nn.Module) -> int:
        return sum(bool(attention.fullmatch(name)) for name, _ in model.named_modules())

    with torch.device("meta"):
        whole, thin = shape_of(folder), shape_of(folder, 1)
    assert (depth(whole), depth(thin)) == (2, 1)
    assert thin.config.get_text_config()._attn_implementation == "document_sdpa"
    assert not getattr(whole, "sums_in_float32", False)


def test_a_shape_in_float16_adds_up_in_float32_and_uses_the_layers_of_a_run(tiny_glm: Path) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            model = shape_of(tiny_glm)
    finally:
        torch.set_default_dtype(before)
    assert model.sums_in_float32
    ours = [{type(m) for m in one.modules() if "stock_layers" in type(m).__module__} for one in (model, load_model(tiny_glm))]  # fmt: skip
    assert len(ours[0]) == 2
    assert ours[0] == ours[1]


# --- opening -------------------------------------------------------------------------------------------


def test_the_revision_of_a_hub_id_is_the_one_that_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    asked: list[Any] = []

    def fetch(*given: Any) -> Path:
        asked.append(given)
        raise ModelError("not there")

    monkeypatch.setattr(load, "local_folder", fetch)
    with pytest.raises(ModelError):
        load_model("org/name", revision="a1b2")
    assert asked == [("org/name", "a1b2")]


def test_a_model_that_sees_is_opened_in_the_format_for_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(dtype: str, *, sees_images: bool) -> torch.dtype:
        asked.append(sees_images)
        return torch.float32

    monkeypatch.setattr(load, "number_format", noted)
    load_model(pictures.save_model(tmp_path / "seeing"))
    load_model(tiny.save_model(tmp_path / "text", "chatglm"))
    assert asked == [True, False]


def test_no_part_of_a_config_turns_outputs_on(tmp_path: Path) -> None:
    folder = pictures.save_grid_model(tmp_path / "model")
    config = read_json(folder / "config.json")
    wishes = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    config |= wishes
    config["text_config"] |= wishes
    (folder / "config.json").write_text(json.dumps(config))
    said = load_model(folder, attention="eager")(input_ids=torch.tensor([[1, 2]]))
    assert set(said) == {"logits"} | ({"past_key_values"} & set(said))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what is mapped")
def test_a_file_whose_weights_were_replaced_is_let_go(tiny_chatglm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chatglm, tmp_path / "model")
    model = load_model(folder)
    for weight in model.parameters():
        weight.data = weight.data.clone()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_flash_attention_is_checked_in_the_format_of_the_run(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def as_if_it_were_there(model: nn.Module) -> None:
        model.config._attn_implementation = "flash_attention_3"  # type: ignore[union-attr]

    monkeypatch.setattr(load.stock_layers, "use_in", as_if_it_were_there)
    monkeypatch.setattr(load.check, "flash_problem", lambda *given: asked.append(given))
    model = load_model(tiny_glm, dtype="bfloat16")
    assert asked == [("flash_attention_3", torch.device("cpu"), torch.bfloat16)]
    assert model.config._attn_implementation == "flash_attention_3"


@pytest.mark.parametrize(("name", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")])  # fmt: skip
def test_each_flash_attention_needs_its_own_package(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = name[-1]
    for number in "23":
        is_there = number == version
        monkeypatch.setattr(load, f"is_flash_attn_{number}_available", lambda there=is_there: there)
    assert load._attention(name) == name
    for number in "23":
        monkeypatch.setattr(load, f"is_flash_attn_{number}_available", lambda there=number != version: there)  # fmt: skip
    with pytest.raises(
        ModelError, match=rf"{name}, but the package {package} or .*install {package},"
    ):
        load._attention(name)
    assert load._attention("auto") is None
    assert load._attention("eager") == "eager"


def test_what_holds_no_numbers_is_not_looked_at_for_numbers() -> None:
    model = nn.Module()
    model.whole = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    model.empty = nn.Parameter(torch.zeros(0))
    model.shape = nn.Parameter(torch.empty(3, device="meta"))
    model.fine = nn.Parameter(torch.tensor([-1e38, 1e38]))
    check_finite(model, Path("x"))
    for number, value in enumerate([float("nan"), float("inf"), float("-inf")]):
        setattr(model, f"bad{number}", nn.Parameter(torch.tensor([0.0, value])))
        names = ", ".join(f"bad{n}" for n in range(number + 1))
        with pytest.raises(ModelError, match=f"^x: {names} holds numbers that are not finite"):
            check_finite(model, Path("x"))
    model.bad3 = nn.Parameter(torch.tensor(float("nan")))
    with pytest.raises(ModelError, match="bad0, bad1, bad2 and 1 more holds"):
        check_finite(model, Path("x"))


def test_three_names_of_weights_are_said_and_no_more_are_counted() -> None:
    with pytest.raises(ModelError, match=r"missing: a, b, c\."):
        load._check_complete(Path("x"), {"missing_keys": list("cba")})


def test_formats_have_their_names_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "float16", "float32"):
        assert str(number_format(name)) == f"torch.{name}"
    with pytest.raises(ModelError, match=r"'fp8'; choose auto, bfloat16, float16, float32$"):
        number_format("fp8")


# --- what libraries say --------------------------------------------------------------------------------


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Libraries as they are when nothing has been turned down; they are so again afterwards."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    for name in ("DEEPSPEED_LOG_LEVEL", "DS_ACCELERATOR", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    logs = transformers.utils.logging
    before, shown = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.enable_progress_bar()
    disable_progress_bars()
    logs.set_verbosity_info()
    with warnings.catch_warnings():
        yield lambda: (logs.is_progress_bar_enabled(), not are_progress_bars_disabled())
    logs.set_verbosity(before)
    (logs.enable_progress_bar if shown else logs.disable_progress_bar)()
    enable_progress_bars()


@pytest.mark.parametrize(("rank", "unwanted", "shown"), [(0, False, True), (1, False, False), (0, True, False)])  # fmt: skip
def test_a_download_is_shown_by_the_leading_process_unless_it_is_unwanted(
    rank: int, unwanted: bool, shown: bool, loud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    if unwanted:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_libraries()
    enabled, bars = loud()
    assert not enabled
    assert bars is shown
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.ERROR


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_of_the_other_processes_are_dropped(
    rank: int, loud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    warnings.resetwarnings()
    quiet_libraries()
    with warnings.catch_warnings(record=True) as heard:
        warnings.warn("look", stacklevel=1)
        exec("import warnings; warnings.warn('renamed', FutureWarning)", {"__name__": "peft.x"})
    assert [str(one.message) for one in heard] == ([] if rank else ["look"])


@pytest.mark.parametrize(("has", "told"), [(False, "cpu"), (True, None)])
def test_deepspeed_is_told_that_there_is_no_accelerator_and_what_it_was_told_stays(
    has: bool, told: str | None, loud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.distributed import device

    monkeypatch.setattr(device, "has_accelerator", lambda: has)
    quiet_libraries()
    assert os.environ.get("DS_ACCELERATOR") == told
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    monkeypatch.setenv("DEEPSPEED_LOG_LEVEL", "info")
    quiet_libraries()
    assert (os.environ["DS_ACCELERATOR"], os.environ["DEEPSPEED_LOG_LEVEL"]) == ("npu", "info")


# --- float16 -------------------------------------------------------------------------------------------


def test_a_first_layer_is_widened_however_it_is_called() -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    seen: list[Any] = []

    class Layer(nn.Module):
        def forward(self, hidden_states: Any, more: Any = None, **kwargs: Any) -> None:
            seen.append((hidden_states.dtype, more, kwargs))

    model = nn.Sequential(Layer())
    wide_residual.use_in(model, model[0])
    rows = torch.ones(1, dtype=torch.float16)
    model[0](rows, "mask", cache=1)
    model[0](hidden_states=rows, cache=1)
    assert seen == [(torch.float32, "mask", {"cache": 1}), (torch.float32, None, {"cache": 1})]
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction

"""What programs of others open of our checkpoints: a tokenizer beside an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import finetune.models  # noqa: F401 - registers the classes
from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import LoraMethod, PTuningV2Method
from finetune.models.load import load_model


@pytest.mark.parametrize("method", [LoraMethod(kind="lora"), PTuningV2Method(kind="ptuning_v2")])
@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_the_tokenizer_of_the_base_opens_from_an_adapter(
    tmp_path: Path, family: str, method: LoraMethod | PTuningV2Method
) -> None:
    base = tiny.save_model(tmp_path / "base", family, tiktoken=family == "chatglm")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = methods.attach(load_model(base), method)
    methods.save(model, adapter, base=BaseRecord(str(base), None, ""))
    opened = AutoTokenizer.from_pretrained(adapter)
    assert isinstance(opened, PreTrainedTokenizerFast)
    expected = AutoTokenizer.from_pretrained(base)
    asked = [{"role": "user", "content": "你好, the order"}]
    assert opened.apply_chat_template(asked) == expected.apply_chat_template(asked)


def test_an_adapter_is_saved_also_when_its_base_has_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base", "glm")
    model = methods.attach(load_model(base), LoraMethod(kind="lora"))
    gone = BaseRecord(str(tmp_path / "gone"), None, "")
    (tmp_path / "adapter").mkdir()
    methods.save(model, tmp_path / "adapter", base=gone)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert "no tokenizer lies beside the adapter" in capsys.readouterr().err

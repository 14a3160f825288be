"""What transformers' Auto classes do with a published folder after `import finetune.models`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import finetune.models  # noqa: F401 - registers chatglm

OPEN_WITHOUT_CODE = """
import sys
from pathlib import Path
import finetune.models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
names = [type(x).__module__ for x in (config, model, tokenizer)]
assert all(name.startswith("finetune.models.") for name in names), names
assert not Path(folder, "EXECUTED").exists()
"""


def test_auto_classes_open_a_folder_without_running_its_code_or_asking(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "chatglm", tiktoken=True)
    code = f"open({str(folder / 'EXECUTED')!r}, 'w').close()\n"
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_CODE, str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stdout + done.stderr


def test_a_tokenizer_from_tokenizer_model_alone_pads_left_and_knows_the_layout(
    tmp_path: Path,
) -> None:
    folder = tiny.save_model(tmp_path / "model", "chatglm", tiktoken=True)
    same = tiny.save_model(tmp_path / "fast", "glm")
    tokenizer, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(same)
    for text in ("the order 你好\n\n 123 <sop> x", "  spaces\tand\n"):
        assert tokenizer(text)["input_ids"] == other(text)["input_ids"]
    messages = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt[:3] == [tiny.CONTROL_IDS[t] for t in ("[gMASK]", "<sop>", "<|user|>")]
    assert prompt[-1] == tiny.CONTROL_IDS["<|assistant|>"]
    padded = tokenizer(["the order", "the"], padding=True)
    assert padded["attention_mask"][1][0] == 0
    assert padded["input_ids"][1][0] == tiny.PAD_ID
    assert padded.keys() == {"input_ids", "attention_mask"}


def test_a_saved_tokenizer_opens_again_with_plain_transformers(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "chatglm", tiktoken=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again("the order 你好 <sop>") == tokenizer("the order 你好 <sop>")
    assert again.chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config


def test_the_real_tokenizer_gives_the_published_ids_of_every_golden_dialogue(
    glm4_assets: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(glm4_assets / "assets/glm-4-9b-chat")
    assert tokenizer.padding_side == "left"
    rows = (glm4_assets / "golden/chat_template.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        ids = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert ids == row["input_ids"][: len(ids)]
        assert len(row["input_ids"]) - len(ids) <= 1  # the goldens end with the final stop
    published = json.loads(
        (glm4_assets / "golden/glm4v/tokenizer_golden.json").read_text(encoding="utf-8")
    )["texts"]
    # The published tokenizer takes a typed control string for text; any fast one takes it for control.
    plain = {t: ids for t, ids in published.items() if not any(c in t for c in tiny.CONTROL_TOKENS)}
    assert len(plain) >= 5
    for text, ids in plain.items():
        assert tokenizer.encode(text) == ids

"""Writes docs/models.md and docs/models_zh.md from what scripts/evidence/family_matrix.py has run.

python scripts/docs/models_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from finetune.language import chinese  # noqa: E402

FILE = ROOT / "scripts/evidence/family_matrix.json"
STEPS = ("train", "resume", "evaluate", "merge", "serve")
STAGES = ("0", "2", "3")
METHODS = ("lora", "ptuning_v2", "full")
REFUSED = "refused: "

# The matrix's name, model_type, checkpoints, images in English and Chinese, vLLM's class.
FAMILIES = (
    ("chatglm", "chatglm", "GLM-4-9B, -Chat, -Chat-1M, LongWriter", "–", "–", "ChatGLMForCausalLM"),
    ("glm4v", "chatglm", "GLM-4V-9B", "one", "一张", "GLM4VAsTrained"),
    ("glm", "glm", "GLM-4-9B-hf, -Chat-hf, GLM-Edge", "–", "–", "TransformersForCausalLM"),
    ("glm4", "glm4", "GLM-4-9B/32B-0414, GLM-Z1", "–", "–", "Glm4ForCausalLM"),
    ("glm4.1v", "glm4v", "GLM-4.1V-9B, GLM-4.6V-Flash, AutoGLM-Phone-9B", "several", "多张", "Glm4vForConditionalGeneration"),
    ("glm46v", "glm46v", "transformers' form of GLM-4.6V around a dense text", "several", "多张", None),
    ("glm_ocr", "glm_ocr", "GLM-OCR", "several", "多张", "GlmOcrForConditionalGeneration"),
    ("glm4_moe", "glm4_moe", "GLM-4.5, -Air, GLM-4.6, GLM-4.7", "–", "–", "Glm4MoeForCausalLM"),
    ("glm4_moe_lite", "glm4_moe_lite", "GLM-4.7-Flash", "–", "–", "Glm4MoeLiteForCausalLM"),
    ("glm4v_moe", "glm4v_moe", "GLM-4.5V, GLM-4.6V", "several", "多张", "Glm4vMoeForConditionalGeneration"),
)  # fmt: skip
TRIED_IN_VLLM = ("chatglm", "glm4v", "glm")

EN: dict[str, str] = {
    "title": "# Models",
    "other": "[简体中文](models_zh.md)",
    "first": "What each family of checkpoints is, and what was run of it. Published weights of the newer families have not been tried here: the cells are tiny random models of the same form.",
    "families": "## Families",
    "heads": "| `model_type` | checkpoints | images in a dialogue | vLLM's class |\n|---|---|---|---|",
    "vllm": "vLLM 0.32 has the class that the last column names; those of {tried} were compared with our own generation ([serving.md](serving.md)), the others were not run here, and `GLM4VAsTrained` is ours. `predict --backend vllm` takes text; images are refused there by name.",
    "no": "none",
    "matrix": "## Every method on every stage",
    "how": "Two processes (gloo, CPU), DeepSpeed; {versions}. Each cell is five steps: **t**rain (the losses of one process without DeepSpeed, within 2e-5), **r**esume (from the second of four steps, the same bytes at the end), **e**valuate (the replies that the run's own evaluation gave), **m**erge (transformers' own class gives the merged folder the adapter's logits, within 1e-4, with two images where it sees), **s**erve (the endpoint says what `predict` says; `chat` answers). Dialogues of the families that see are of text, of one picture, and of three pictures in two turns. ✓ is all that applies; a number is a reason below.",
    "rows": "| | method | ZeRO-0 | ZeRO-2 | ZeRO-3 |\n|---|---|---|---|---|",
    "open": "not run",
    "sum": "{good} of {of} steps were well, {refused} are refused by name, {bad} failed.",
    "reasons": "## Reasons",
    "again": "Made by `scripts/evidence/family_matrix.py` and `scripts/docs/models_page.py`:",
}
ZH: dict[str, str] = {
    "title": "# 模型",
    "other": "[English](models.md)",
    "first": "各个系列的检查点是什么，运行过什么。较新系列的官方权重没有在这里试过：表中各格是同样形式的随机小模型。",
    "families": "## 系列",
    "heads": "| `model_type` | 检查点 | 一个对话中的图像 | vLLM 的类 |\n|---|---|---|---|",
    "vllm": "vLLM 0.32 有最后一列的类；{tried} 的与我们自己的生成做过比较（[serving_zh.md](serving_zh.md)），其余没有在这里运行，`GLM4VAsTrained` 是我们的。`predict --backend vllm` 只接受文本；图像在那里会被指名拒绝。",
    "no": "没有",
    "matrix": "## 每种方法在每个阶段上",
    "how": "两个进程（gloo，CPU），DeepSpeed；{versions}。每格五步：训练（**t**rain，损失与不用 DeepSpeed 的一个进程相差不超过 2e-5）、续训（**r**esume，从四步中的第二步开始，结束时逐字节相同）、评测（**e**valuate，回复与训练自己的评测相同）、合并（**m**erge，transformers 自己的类打开合并结果，logits 与适配器相差不超过 1e-4，能看图的带两张图像）、服务（**s**erve，端点的回复与 `predict` 相同；`chat` 有回答）。能看图的系列的对话有纯文本、一张图像，以及两轮中的三张图像。✓ 表示适用的全部通过；数字是下面的原因。",
    "rows": "| | 方法 | ZeRO-0 | ZeRO-2 | ZeRO-3 |\n|---|---|---|---|---|",
    "open": "未运行",
    "sum": "{of} 步中 {good} 步通过，{refused} 步被指名拒绝，{bad} 步失败。",
    "reasons": "## 原因",
    "again": "由 `scripts/evidence/family_matrix.py` 和 `scripts/docs/models_page.py` 生成：",
}  # fmt: skip


class Reasons:
    """Numbers of the reasons in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, text: str) -> int:
        """The number of a reason, whatever folder it names."""
        text = re.sub(r"\S*/checkpoint-\d+", "FOLDER", text)
        return self.numbers.setdefault(text, len(self.numbers) + 1)


def cell(found: dict[str, str] | None, words: dict[str, str], reasons: Reasons) -> str:
    """What the table says of a cell."""
    if found is None:
        return words["open"]
    bad = {step: text for step, text in found.items() if text}
    if not bad:
        return "✓"
    if set(found) == {"train"}:
        return f"{reasons.of(found['train'])}"
    good = " ".join(step[0] for step in STEPS if step in found and not found[step])
    marks = ", ".join(f"{step[0]}: {reasons.of(text)}" for step, text in bad.items())
    return f"{good} ✓, {marks}"


def page(held: dict[str, Any], words: dict[str, str], *, zh: bool) -> str:
    """The page in one language."""
    cells, reasons = held["cells"], Reasons()
    tried = ", ".join(f"`{one[1]}`" if one[0] != "glm4v" else "GLM-4V" for one in FAMILIES if one[0] in TRIED_IN_VLLM)  # fmt: skip
    families = [
        f"| `{kind}` | {checkpoints} | {chinese_images if zh else images} | {f'`{vllm}`' if vllm else words['no']} |"
        for _, kind, checkpoints, images, chinese_images, vllm in FAMILIES
    ]
    rows = []
    for name, kind, *_ in FAMILIES:
        label = "GLM-4V" if name == "glm4v" else f"`{kind}`"
        for method in METHODS:
            stages = cells.get(name, {}).get(method, {})
            row = [cell(stages.get(stage), words, reasons) for stage in STAGES]
            rows.append(f"| {label} | {method} | {' | '.join(row)} |")
    steps = [t for one in cells.values() for two in one.values() for c in two.values() for t in c.values()]  # fmt: skip
    refused = sum(text.startswith(REFUSED) for text in steps)
    numbers = {"good": steps.count(""), "of": len(steps), "refused": refused}
    numbers["bad"] = len(steps) - steps.count("") - refused
    versions = ", ".join(f"{name} {number}" for name, number in held["versions"].items())
    said = [
        f"{number}. {(chinese(text.removeprefix(REFUSED)) if zh else text.removeprefix(REFUSED))}"
        for text, number in reasons.numbers.items()
    ]
    code = "```bash\n# needs: two processes for half an hour\npython scripts/evidence/family_matrix.py scripts/evidence/family_matrix.json\npython scripts/docs/models_page.py\n```"
    parts = [
        words["title"], words["other"], words["first"], words["families"],
        "\n".join([words["heads"], *families]), words["vllm"].format(tried=tried), words["matrix"],
        words["how"].format(versions=versions), "\n".join([words["rows"], *rows]),
        words["sum"].format(**numbers),
    ]  # fmt: skip
    parts += [words["reasons"], "\n".join(said)] if said else []
    return "\n\n".join([*parts, words["again"], code]) + "\n"


def pages() -> dict[Path, str]:
    """Both pages by their files."""
    held = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        ROOT / "docs/models.md": page(held, EN, zh=False),
        ROOT / "docs/models_zh.md": page(held, ZH, zh=True),
    }


def main() -> int:
    """Write the pages, or say whether they are current."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when one is old")
    given = parser.parse_args()
    old = [file for file, text in pages().items() if not file.is_file() or file.read_text("utf-8") != text]  # fmt: skip
    if given.check:
        for file in old:
            print(f"{file.relative_to(ROOT)} is not what the script writes")
        return int(bool(old))
    for file in old:
        file.write_text(pages()[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

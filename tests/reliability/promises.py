"""What is promised, which cases show it, and how many there must be.

totals.json: suite -> column (`all`, `subset`, `stock`) -> group -> [survived, of], as last measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tests.reliability.frame import ROOT

TOTALS = ROOT / "tests/reliability/totals.json"
Counts = dict[str, list[int]]


@dataclass(frozen=True)
class Promise:
    """A line of docs/reliability.md."""

    english: str
    chinese: str
    cases: str
    """`suite` or `suite:group suite:group`; the arguments of the command that shows it."""


PROMISES = [
    Promise(
        "`kill -9` at any moment of a save costs at most the steps since the last one",
        "保存过程中任何时刻 `kill -9`，最多损失上次保存之后的步数",
        "saves:crash saves:crash_on_2 saves:power saves:random",
    ),
    Promise(
        "a damaged checkpoint is never opened; a full disk costs one save, not the run",
        "损坏的检查点绝不会被打开；磁盘写满只损失一次保存，不损失整个训练",
        "saves:damage saves:space saves:rotation saves:left_over saves:slow_disk",
    ),
    Promise(
        "SIGTERM or Ctrl-C finishes the step, saves and sets the exit code",
        "收到信号后完成当前步、保存，并以退出码说明",
        "signals:signal signals:signal_on_2",
    ),
    Promise(
        "if one process dies, fails or hangs, all of them stop and say which one",
        "任一进程死亡、报错或卡住，全部进程结束，并指出是哪一个",
        "signals:process signals:loader signals:blocking",
    ),
    Promise(
        "a resumed run is the same run, bit for bit, or it is refused",
        "恢复的训练与未中断的训练逐位相同，否则拒绝恢复",
        "resume",
    ),
    Promise(
        "odd data loads alike; a bad row, image, path or option is named with its line and the reason, "
        "all at once; small files in a second of CPU time and 200 MB",
        "写法不同但无害的数据读取结果一致；有问题的行、图像、路径和选项一次性全部指出所在行与原因，小文件耗 CPU 不到一秒、内存不到 200 MB",
        "inputs:files inputs:rows inputs:images inputs:paths inputs:yaml inputs:contradictions "
        "inputs:properties",
    ),
    Promise(
        "nothing typed in data, a chat or a request becomes a control token",
        "数据、对话和请求中输入的任何文字都不会变成控制词元",
        "inputs:controls",
    ),
    Promise(
        "a NaN loss or a lack of memory stops the run before the weights change, and says what to look at",
        "损失不是数或内存不足时，训练在造成损害之前结束，并指出应查看什么",
        "inputs:numbers inputs:memory",
    ),
    Promise(
        "an adapter refuses another base; an output is whole or absent and replaces nothing",
        "适配器不会在未经要求时用于别的基座；写出的结果要么完整要么不存在，绝不覆盖已有内容",
        "artifacts",
    ),
    Promise(
        "opening a model, a checkpoint or data runs none of its code; no secret is written anywhere",
        "打开模型、检查点或数据不会运行其中的代码；任何密钥都不会被写出",
        "security",
    ),
    Promise(
        "what strangers bring is read whole or refused by name: odd outputs and inputs, two writers at once, damaged tables and "
        "endless rows, adapters, models, tokenizers, folders of runs and reports, hostile requests beside ordinary ones",
        "陌生人带来的东西要么完整读取，要么指名拒绝：奇怪的输入输出、两个写入者、损坏的表格和没有尽头的行、适配器、模型、分词器、训练与报告目录，以及与普通请求混在一起的恶意请求",
        "strangers",
    ),
]
HEADS = {
    "docs/reliability.md": (
        "promise",
        "shown by `python -m tests.reliability …`",
        "survived",
        "plain Trainer",
    ),
    "docs/reliability_zh.md": (
        "承诺",
        "由 `python -m tests.reliability …` 验证",
        "通过",
        "原版 Trainer",
    ),
}


def load() -> dict[str, dict[str, Counts]]:
    """The recorded counts."""
    return dict(json.loads(TOTALS.read_text(encoding="utf-8"))) if TOTALS.exists() else {}


def record(suite: str, column: str, counts: Counts, *, whole: bool) -> None:
    """Write down what was measured: all groups of a suite, or only some."""
    totals = load()
    before = {} if whole else totals.get(suite, {}).get(column, {})
    totals.setdefault(suite, {})[column] = dict(sorted({**before, **counts}.items()))
    text = json.dumps(totals, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    TOTALS.write_text(text + "\n", encoding="utf-8")


def fallen(suite: str, column: str, counts: Counts, groups: tuple[str, ...]) -> list[str]:
    """Where there were fewer cases, or fewer that survived, than recorded."""
    recorded = load().get(suite, {}).get(column, {})
    return [
        f"{suite}:{group}: {counts.get(group, [0, 0])} instead of {wanted} survived and in all"
        for group, wanted in recorded.items()
        if (not groups or group in groups)
        and any(a < b for a, b in zip(counts.get(group, [0, 0]), wanted, strict=True))
    ]


def table(page: str) -> str:
    """The Markdown table of the promises."""
    totals = load()

    def sums(cases: str, column: str) -> str:
        found = [0, 0]
        for case in cases.split():
            suite, _, group = case.partition(":")
            counts = totals.get(suite, {}).get(column, {})
            for name, pair in counts.items():
                if group in ("", name):
                    found = [a + b for a, b in zip(found, pair, strict=True)]
        of = {"docs/reliability.md": " of ", "docs/reliability_zh.md": " / "}[page]
        return f"{found[0]}{of}{found[1]}" if found[1] else "–"

    rows = [
        HEADS[page],
        ("---",) * 4,
        *(
            (
                promise.english if page == "docs/reliability.md" else promise.chinese,
                f"`{promise.cases}`",
                sums(promise.cases, "all"),
                sums(promise.cases, "stock"),
            )
            for promise in PROMISES
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def total() -> int:
    """How many faults all promises together rest on."""
    return sum(of for suite in load().values() for _, of in suite.get("all", {}).values())


def write_tables() -> None:
    """Renew the tables between the markers of both pages."""
    for page in HEADS:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        path.write_text(with_table(text, page), encoding="utf-8")


def with_table(text: str, page: str) -> str:
    """The text of a page with its table renewed."""
    begin, end = "<!-- reliability -->\n", "<!-- end of reliability -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{table(page)}\n{end}{after}" if rest else text

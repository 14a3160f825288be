"""Where a training step waits for the GPU, counted on a CPU, by the line that asks.

A run of the product on a tiny model, in which everything that reads a tensor's numbers in Python is
noted with its caller: item, tolist, bool, float, int, nonzero, numpy. What looks at a batch before it
is sent to the GPU asks nobody and is left out, as is what happens at log lines, evaluations and saves.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "numpy")
# They look at a batch as it comes from the loader.
ON_THE_CPU = {"for_model", "get_batch_samples", "_maybe_log_save_evaluate", "_log_step", "_save_checkpoint"}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def count(
    method: str, *, packing: bool, stage: int | None, offload: bool = False
) -> dict[str, Any]:
    """Waits of a step by call site, and in all."""
    import torch

    from finetune.training.trainer import FineTuner
    from tests import runs, tiny

    folder = Path(tempfile.mkdtemp(prefix="syncs-"))
    model = tiny.save_model(folder / "model", "chatglm")
    data = runs.write_dialogues(folder / "train.jsonl", 60)
    options: dict[str, Any] = {"training__max_steps": 6, "training__activation_checkpointing": True, "data__packing": packing, "training__report_to": [], "training__log_every_steps": 100}  # fmt: skip
    if stage is not None:
        options["deepspeed__zero_stage"] = stage
        options["deepspeed__offload_optimizer"] = "cpu" if offload else "none"
    config = runs.config(model, data, folder / "run", **options)
    if method != "lora":
        config["method"] = {"kind": method} | ({"num_virtual_tokens": 4} if method == "ptuning_v2" else {})  # fmt: skip
    found: Counter[str] = Counter()
    steps = 0
    begin = FineTuner.get_batch_samples

    def counted(self: Any, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        return begin(self, *given)

    with _noted(torch, found, lambda: 2 < steps <= 5):
        FineTuner.get_batch_samples = counted  # type: ignore[method-assign]
        try:
            runs.run_here(config)
        finally:
            FineTuner.get_batch_samples = begin  # type: ignore[method-assign]
    sites = {site: number / 3 for site, number in found.most_common()}
    return {"method": method, "packing": packing, "zero_stage": stage, "offload": offload, "syncs_per_step": sum(sites.values()), "sites": sites}  # fmt: skip


@contextmanager
def _noted(torch: Any, found: Counter[str], is_on: Any) -> Iterator[None]:
    before = {name: getattr(torch.Tensor, name) for name in READS}

    def noting(name: str, read: Any) -> Any:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_on():
                frames = [
                    f for f in traceback.extract_stack()[:-1] if "count_syncs" not in f.filename
                ]
                names = {frame.name for frame in frames}
                if not names & ON_THE_CPU and not _inside_another(frames):
                    place = frames[-1].filename.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
                    found[f"{place}:{frames[-1].lineno} {name}"] += 1
            return read(self, *args, **kwargs)

        return noted

    for name, read in before.items():
        setattr(torch.Tensor, name, noting(name, read))
    try:
        yield
    finally:
        for name, read in before.items():
            setattr(torch.Tensor, name, read)


def _inside_another(frames: list[traceback.FrameSummary]) -> bool:
    """Torch's own Python around one of these: counted where it was called."""
    return frames[-1].filename.endswith(("torch/_tensor.py", "torch/utils/data/_utils/fetch.py"))

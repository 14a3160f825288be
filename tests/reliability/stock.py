"""The same tiny run with plain transformers.Trainer, as its documentation writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def train(file: Path) -> None:
    """Train what the settings in `file` say, from the last checkpoint if there is one."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )
    from transformers.trainer_utils import get_last_checkpoint

    settings = json.loads(file.read_text(encoding="utf-8"))
    training, method = settings["training"], settings["method"]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["path"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"]["path"])
    if method["kind"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=method["rank"],
                lora_dropout=method["dropout"],
                target_modules=["q_proj", "v_proj"],
            ),
        )
    rows = []
    for line in Path(settings["data"]["train"]).read_text(encoding="utf-8").splitlines():
        text = "\n".join(message["content"] for message in json.loads(line)["messages"])
        ids = tokenizer(text)["input_ids"]
        rows.append({"input_ids": ids, "labels": list(ids)})
    run_dir = training["output_dir"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=run_dir,
            max_steps=training["max_steps"],
            per_device_train_batch_size=training["batch_size"],
            learning_rate=training["learning_rate"],
            lr_scheduler_type=training.get("lr_schedule", "linear"),
            warmup_steps=training.get("warmup_steps", 0),
            weight_decay=training.get("weight_decay", 0.0),
            max_grad_norm=training.get("max_grad_norm", 1.0),
            logging_steps=1,
            save_steps=training["save_every_steps"],
            save_total_limit=training["keep_checkpoints"],
            seed=training.get("seed", 42),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    last = get_last_checkpoint(run_dir) if Path(run_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)

"""Every option there is: one frozen pydantic model per section of the YAML file.

A field's meaning is the text under it; that text is also the JSON Schema's and the reference
page's. Reading a file, overrides and error reports live in ``finetune.config.load``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.config.data_section import Columns as Columns
from finetune.config.data_section import DataSection as DataSection
from finetune.config.data_section import Source as Source
from finetune.config.data_section import held_out_share as held_out_share
from finetune.config.forgetting import KeepSection
from finetune.config.section import NotEmpty, Positive, Section, Share


class ModelSection(Section):
    """Which checkpoint is tuned, and in which number format."""

    path: NotEmpty
    """A folder, or a hub id such as `THUDM/glm-4-9b-chat`; either published layout. `hf://owner/name` and `ms://owner/name` (ModelScope) say the hub, else `--hub` or `$FINETUNE_HUB` does."""

    revision: str | None = None
    """The hub revision (branch, tag or commit) when `path` is a hub id."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the frozen weights and of the computation; `auto` is bfloat16 on a GPU that multiplies it in hardware, float16 with sums of layers in float32 on one that does not (V100, T4; float32 for models that see images), and float32 on a CPU."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation; `auto` leaves the choice to transformers (sdpa). The flash ones need the package flash-attn or flash-attn-3, are compared with torch when the model is loaded, and give way to sdpa where they differ."""

    kernels: Literal["auto", "torch"] = "auto"
    """Fused kernels on a GPU; `auto` uses each one that gives torch's numbers on this GPU when the model is loaded, and where a model replies on a CPU that is not Intel's the matrix products of oneDNN; `torch` none."""

    adapter: NotEmpty | None = None
    """An adapter of `path` to train further, on new data for example: the folder of a checkpoint or of a run (its best checkpoint, else the newest). Its method and options must be those of `method`."""

    quantization: Literal["nf4"] | None = None
    """QLoRA: the frozen linear layers are held in 4 bits; `method.kind: lora` only, needs the extra `qlora` (bitsandbytes)."""

    freeze: list[str] = []
    """Parts of the model that stay as they are: name parts or regexes searched in parameter names, such as `vision` or `layers\\.[0-9]\\.`."""


class MethodSection(Section):
    """What the sections of all methods share; `finetune.methods` has a record and a module for each."""

    trains_4_bits: ClassVar[bool] = False
    """Whether it can train on a base that `model.quantization` holds in 4 bits."""
    kind: str

    @property
    def num_start_tokens(self) -> int:
        """Tokens of training data that it wants to start from."""
        return 0


class LoraMethod(MethodSection):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through PEFT."""

    trains_4_bits = True
    kind: Literal["lora"] = "lora"

    rank: Positive = 8
    """Rank of the update."""

    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank) with `use_rslora`)."""

    dropout: Share = 0.1
    """Dropout on the adapter's input."""

    target_modules: str | list[str] | None = None
    """A regex over full module names, a list of name endings, or `all-linear`; by default attention and MLP of the text layers, in a mixture of experts the shared experts. In a list `text` and `vision` stand for the layers of that part, so `[text, vision]` adapts the vision encoder too. Routed experts only where an entry names `experts`, with `dropout: 0`."""

    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""

    use_dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353)."""

    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of the B matrices over that of the A matrices."""


class FullMethod(MethodSection):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


class PTuningV2Method(MethodSection):
    """Trained keys and values in front of every layer's own (Liu et al. 2021, arXiv:2110.07602)."""

    kind: Literal["ptuning_v2"] = "ptuning_v2"

    num_virtual_tokens: Positive = 128
    """Length of the prefix in tokens."""

    prefix_projection: bool = False
    """Train an embedding and a two-layer MLP that make the prefix, instead of the prefix itself; folded away on save."""

    encoder_hidden_size: Positive | None = None
    """Width of that MLP; by default the width of one layer's keys."""

    @property
    def num_start_tokens(self) -> int:
        """One for each token of the prefix."""
        return self.num_virtual_tokens


Method = Annotated[LoraMethod | PTuningV2Method | FullMethod, Field(discriminator="kind")]


class TrainingSection(Section):
    """The optimisation and what a run leaves on disk."""

    output_dir: NotEmpty
    """The run directory; relative to the working directory."""

    max_steps: Positive | None = None
    """Optimizer steps; either this or `num_epochs`."""

    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; either this or `max_steps`. Default 3 when neither is given."""

    batch_size: Positive = 1
    """Examples (packed rows when packing) per process and forward pass."""

    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step; the global batch is batch_size x this x processes."""

    tokens_per_step: Positive | None = None
    """Tokens of an optimizer step over all processes, in place of `gradient_accumulation_steps`: as many forward passes of `batch_size` packed rows of `data.max_length` tokens as come nearest. Needs `data.packing`."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""

    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other peak learning rates by name parts or regexes searched in the names of trained weights, the first that is found; such as `vision.transformer: 1e-6` (of the newer families `visual.blocks`) and `vision: 1e-5` for the vision encoder and what joins it to the text."""

    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""

    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Linear warm-up: a number of steps, or a share of all steps when below 1; the first step learns too."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = "adamw"
    """`adamw` is torch's fused one. `adamw_8bit` holds its state in a quarter, the `paged_` ones move it to the CPU's memory while the GPU's is short: of bitsandbytes, the extra `qlora`. `muon` is torch's Muon for matrices with AdamW for the rest, at the same learning rate. All but `adamw` without `deepspeed`. Others: `extra.optim`."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay on matrices (never on norms and biases)."""

    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping by global norm; 0 turns it off."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    offload_activations: bool = False
    """With `activation_checkpointing`, what each layer starts from is kept in the host's pinned memory and not on the GPU: 0.33 MB a token of a 9B model, copied there and back. For rows of 100,000 tokens."""

    sequence_parallel: Positive = 1
    """So many neighbouring processes share the tokens of each row, for rows that are too long for one GPU (Ulysses): each has all tokens of some attention heads, so it must divide their number (GLM-4-9B: 2, 4, 8, 16, 32) and the number of processes. The global batch is batch_size x accumulation x processes / this. Text only; attention `auto` or `sdpa`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of data order, dropout and initialisation."""

    deterministic: bool = False
    """On a GPU too the same run gives the same bits, resumed or not: torch's deterministic kernels, which are slower, and an error where there is none. On a CPU it does so anyway."""

    log_every_steps: Positive = 10
    """Optimizer steps between two log lines."""

    save_every_steps: Positive = 500
    """Optimizer steps between two checkpoints; one is always written at the end."""

    save: Literal["resumable", "weights"] = "resumable"
    """What a checkpoint holds: all that a run goes on from (`checkpoint-STEP`; full tuning of a 9B model 132 GB), or `weights` alone (`weights-STEP`; 19 GB), from which no run can be resumed."""

    save_weights_every_steps: Positive | None = None
    """Beside the resumable checkpoints, what was trained alone, as `weights-STEP`, after every so many steps and at the end."""

    async_save: bool = False
    """Checkpoints are copied to the host's memory and written from there while training goes on; the next save and the end of the run wait for the one before. A process needs host memory for its part of a checkpoint."""

    keep_checkpoints: Positive = 3
    """How many of the newest checkpoints stay (and as many folders of weights alone); the best one stays besides."""

    on_full_disk: Literal["continue", "stop"] = "continue"
    """When there is no room for a checkpoint: `continue` warns and tries again at the next save, `stop` ends the run with exit code 6. The last one of a run is missed only with that code."""

    resume: str = "auto"
    """`auto`: from the newest good checkpoint of `output_dir` if there is one; `never`: refuse to start over an old run; or a checkpoint folder."""

    report_to: list[Literal["tensorboard", "wandb", "swanlab", "mlflow"]] = ["tensorboard"]
    """Experiment trackers beside the console; each but tensorboard must be installed by you."""

    on_end: NotEmpty | None = None
    """A command that is run when the run ends, however it ends, such as `notify-send training`: words as in a shell, but no shell reads them. It finds the run directory in `$FINETUNE_RUN` and the exit code in `$FINETUNE_EXIT_CODE`; when it fails there is a warning. A run that is killed tells nobody."""

    profile: Positive | None = None
    """So many steps after the second one are profiled: `profile/trace.json` for a browser and `profile/kernels.txt`, the ten kernels that took longest, in the run directory."""

    process_timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """How long a process waits for the others before the run is ended."""

    extra: dict[str, Any] = {}
    """Any other field of transformers.TrainingArguments, checked against its real fields."""

    @property
    def epochs(self) -> float:
        """`num_epochs`, or its default."""
        return self.num_epochs or 3.0


class DeepSpeedSection(Section):
    """Sharding of optimizer state (1), gradients (2) and weights (3) over the processes."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep optimizer state in CPU memory."""

    offload_parameters: Literal["none", "cpu"] = "none"
    """Keep weights in CPU memory; stage 3 only."""

    config: str | None = None
    """A DeepSpeed JSON file instead of the fields above; contradictions with `training` are refused."""


class EvaluationSection(Section):
    """Validation loss and greedy generation during training, and `finetune evaluate`."""

    every_steps: Positive | None = None
    """Optimizer steps between two evaluations; without it one evaluation at the end."""

    at_start: bool = False
    """Evaluate before the first step too, to see what the untuned model scores."""

    generate: bool = True
    """Generate replies and score them; otherwise only the validation loss."""

    replies: Literal["every_reply", "last_reply"] = "every_reply"
    """Which replies of a dialogue are asked for; earlier turns come from the reference dialogue."""

    max_new_tokens: Positive = 512
    """Longest reply in tokens; a reply cut here counts as not stopped."""

    max_samples: Positive | None = None
    """At most this many replies are generated, a seeded sample that is the same every time; the log says so."""

    batch_size: Positive | Literal["auto"] = 64
    """Prompts generated at once, per process: fewer where their keys and values would take more than 4 GB, with images at most 16. `auto`: as many as half of the free memory has room for, a power of two, at most 128."""

    best_metric: NotEmpty = "loss"
    """The score that chooses the best checkpoint: `loss`, or any other of docs/metrics.md but `general_loss`; each in the direction in which it is better."""

    keep: KeepSection | None = None
    """What the model did well before, measured at every evaluation: by default on the replies that `data.replay` holds out."""

    choose: Literal["best_metric", "domain_without_forgetting"] = "best_metric"
    """Which checkpoint is the best one: that with the best `best_metric`, or the newest whose `best_metric` is really better than the untuned model's while nothing of `keep` is worse by its margin (a non-inferiority test, p < 0.05 after Holm's correction)."""

    patience: Positive | None = None
    """Stop after this many evaluations without a better `best_metric`."""


class RunConfig(Section):
    """One run: what a YAML file says."""

    model: ModelSection
    data: DataSection
    method: Method
    training: TrainingSection
    deepspeed: DeepSpeedSection | None = None
    """Leave out for plain data-parallel training."""
    evaluation: EvaluationSection = EvaluationSection()

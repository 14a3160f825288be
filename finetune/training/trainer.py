"""transformers.Trainer with our data order, loss normaliser, guard, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cached_property
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, TrainerState

from finetune.distributed import device
from finetune.distributed.processes import fail_together, rank_and_world, reduce_sum
from finetune.distributed.signals import StopFlag
from finetune.errors import FinetuneError, NonFiniteError, ProcessError
from finetune.models.loss import for_model
from finetune.training.arguments import check_distribution
from finetune.training.callbacks.progress import ProgressCallback
from finetune.training.callbacks.schedule import (
    RunComplete,
    Schedule,
    StoppedIsSaved,
    TensorBoard,
    writers,
)
from finetune.training.checkpointing import Saver, check_weights, explain_load_errors
from finetune.training.loading.batches import StepLoader, TrainingData
from finetune.training.measuring.validation import Validation
from finetune.training.objective import StepCounts, count
from finetune.training.optimizer import MUON, groups_of, guard_engine, muon, set_rates, warm_up
from finetune.training.prepare_model import PreparedModel


class FineTuner(Trainer):
    """The Trainer's loop; overridden is only what a law asks for."""

    # The model's loss is a sum over num_items_in_batch, already right for accumulation.
    loss_is_scaled_for_ga = True
    optimizer: Any
    control: Any

    def __init__(
        self,
        prepared: PreparedModel,
        *,
        data: TrainingData,
        saver: Saver,
        stop: StopFlag,
        validation: Validation | None,
        progress: ProgressCallback,
        compares_anew: bool = False,
    ) -> None:
        self.data = data
        self.saver = saver
        self.stop = stop
        self.validation = validation
        self.progress = progress
        self.rates = prepared.rates
        self.split = prepared.split
        self.sharing = prepared.split.parts if prepared.split else 1
        """Processes that share each row, and so have the same batches."""
        self.counts = StepCounts()
        """Of the last step, over all processes."""
        self._samples: list[Any] = []
        self._losses: list[Tensor] = []
        self._loader: StepLoader | None = None
        self._has_begun = False
        """Whether a checkpoint, if there is one, has been opened."""
        schedule = Schedule(
            validation.section if validation else None,
            training=saver.training,
            stop=stop,
            evaluate=self.evaluate,
            save_scores=lambda: saver.save_scores(self),
            save_weights=lambda: self._save_with(saver.save_only_weights),
            compares_anew=compares_anew,
        )
        # A stream goes on where the checkpoint says; nothing of it is read to be skipped.
        prepared.arguments.ignore_data_skip = data.feed is not None
        super().__init__(
            model=prepared.model,
            args=prepared.arguments,
            data_collator=data.collate,
            train_dataset=data.items,
            callbacks=[
                schedule,
                progress,
                *writers(saver.run_dir, saver.training.profile, data.feed),
            ],
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(TensorBoard())
        self.model_accepts_loss_kwargs = True
        check_distribution(self.accelerator, prepared.arguments)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; accelerate would import all of DeepSpeed to see that a model is not one of its."""
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            self.accelerator.unwrap_model = _unwrapped

    # --- data and loss -----------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """This process's micro-batches; accelerate would repeat examples to make ranks even."""
        self._loader = self.data.loader(
            rank=rank_and_world()[0] // self.sharing,
            workers=self.args.dataloader_num_workers,
            seconds=self.args.ddp_timeout,
        )
        return self._loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """One step's micro-batches, and the weight of all supervised tokens of the global batch."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._samples = [batch.pop("sample_ids").numpy() for batch in batches]
        self._losses = []
        here = count(batches, self._samples, self.data.lengths, self.data.objective)
        everywhere = reduce_sum([here.weight, here.supervised, here.tokens, here.cells])
        self.counts = StepCounts(*(number / self.sharing for number in everywhere))
        self.progress.throughput.add(self.counts)
        return batches, self.counts.weight or 1.0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed the Trainer would round the loss weights to the model's number format.
        return for_model(inputs, self.args.device, self.split)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; switching thousands of modules to training is left out when they are."""
        self._has_begun = True
        if not self.is_deepspeed_enabled:
            model.zero_grad = self._forget_gradients  # the Trainer's would walk over all modules
        with _already_training(model):
            loss: Tensor = super().training_step(model, *args, **kwargs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the global mean; remembered until the guard has looked at it."""
        loss = self.data.objective.loss(model, inputs, num_items_in_batch)
        self._losses.append(loss.detach())
        # Gradients are averaged over the processes, while the normaliser counts all of them.
        loss = loss * rank_and_world()[1]
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk over all parameters for every micro-batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With speed, padding and memory beside a loss; without the Trainer's own closing summary."""
        if "train_runtime" in logs:
            return
        if self.data.feed is not None:
            self.state.epoch = None  # of a stream the Trainer knows none
        if "loss" in logs:
            logs = logs | self.progress.numbers()
        super().log(logs, start_time)

    def mean_loss(self) -> float | None:
        """The mean of the logged losses, of all sessions of the run."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return sum(losses) / len(losses) if losses else None

    # --- optimizer ---------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """With a group of its own for the weights of every learning rate, and for Muon's."""
        is_muon = self.saver.training.optimizer == MUON
        if (self.rates.is_one and not is_muon) or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = groups_of(
            self.model, self.rates, self.args.weight_decay, decayed, for_muon=is_muon
        )
        self.optimizer = muon(groups, options) if is_muon else kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; DeepSpeed's engine exists since a moment and has not loaded a state yet."""
        if self.is_deepspeed_enabled:
            guard_engine(self.accelerator, self._guard)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warm_up(scheduler, self.args.get_warmup_steps(num_training_steps))
        set_rates(scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # The optimizer's state holds the rate of the schedule as it was planned then: 0 at the
            # end of a run that now goes on for longer.
            set_rates(self.lr_scheduler)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._clipped(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self._clipped(float("inf")) if grad_norm is None else grad_norm
        if not self.is_deepspeed_enabled:
            self._guard(norm if self.accelerator.scaler is None else None)
        return norm

    @cached_property
    def trained_weights(self) -> list[nn.Parameter]:
        """The weights that learn; to walk over all modules of a model takes a millisecond."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _clipped(self, largest: float) -> Any:
        """The norm of the gradients, no larger than `largest` from now on."""
        return self.accelerator.clip_grad_norm_(self.trained_weights, largest)

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        for weight in self.trained_weights:
            weight.grad = None

    def _guard(self, norm: Tensor | None) -> None:
        """End the run before it learns from what is not a number; hear who was asked to stop.

        Called before every optimizer step, in every process, with the norm of the gradients, or None
        where loss scaling makes one that is no number normal. The only place of a step where the GPU
        is waited for.

        Raises:
            NonFiniteError: In every process, naming the examples.
        """
        looked_at = self._losses if norm is None else [*self._losses, norm.to(self._losses[0])]
        is_finite = device.numbers(torch.isfinite(torch.stack(looked_at)))
        gradient_is_finite = norm is None or is_finite.pop()
        if self.stop.sync(not (gradient_is_finite and all(is_finite))):
            with fail_together():
                self._refuse(is_finite, gradient_is_finite)

    def _refuse(self, is_finite: list[bool], gradient_is_finite: bool) -> None:
        losses = [i for i, fine in enumerate(is_finite) if not fine]
        if not losses and gradient_is_finite:
            return  # another process has found it
        places = self.data.places(self._samples[i] for i in losses or range(len(self._samples)))
        what = "the loss" if losses else "the gradient"
        raise NonFiniteError(
            f"{what} of step {self.state.global_step + 1} is not a finite number; nothing was "
            f"learned from it and no checkpoint written. Examples in this forward pass:\n  {places}"
            f"\nLook at these, lower training.learning_rate, or use model.dtype: bfloat16 or "
            "float32 instead of float16; then resume from the last checkpoint"
        )

    # --- the run ---------------------------------------------------------------------------------

    def run(self, folder: Path | None, step: int) -> None:
        """Go through the steps that are left behind `step`, of which `folder` is the checkpoint.

        Dropout is other in every process, and after a resume at another number of processes. A
        resumed run gets its streams from the checkpoint, where there is one for this process.
        """
        self.add_callback(StoppedIsSaved())  # behind the user's
        # A fresh adapter is in training mode around a base that is not, whose layers would recompute nothing.
        self.model.train()
        torch.manual_seed(self.saver.training.seed + rank_and_world()[0] + (step << 32))
        self.train(str(folder) if folder else None)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Go through the steps that are left; signals wait for the end of one."""
        try:
            self.stop.install()
            same = device.deterministic() if self.saver.training.deterministic else nullcontext()
            with (
                same,
                explain_load_errors(resume_from_checkpoint, begun=lambda: self._has_begun),
            ):
                result = super().train(resume_from_checkpoint, **kwargs)
        except RunComplete:
            result = None
        except BaseException as error:
            self._let_a_save_end(error)
            if isinstance(error, FinetuneError) and self._loader is not None:
                self._loader.close()
            for worker in active_children():
                worker.kill()  # one that hangs would keep this process from ending
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):
                raise ProcessError(
                    f"process {rank_and_world()[0]}: a loader process failed: {error} "
                    "Look for a lack of memory, or set data.loader_workers to 0"
                ) from error
            raise
        finally:
            self.model_wrapped.__dict__.pop("zero_grad", None)
        self.saver.finish()
        if self._loader is not None:
            self._loader.close()
        return result

    def _let_a_save_end(self, error: BaseException) -> None:
        """What all processes found wrong together must not cut a save short that they began."""
        if isinstance(error, FinetuneError) and not isinstance(error, ProcessError):
            with suppress(FinetuneError):  # the run ends for the first error
                self.saver.finish()

    # --- state -------------------------------------------------------------------------------

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        for option in fields(TrainerState):
            value = getattr(self.state, option.name)
            if option.name == "epoch" and value is None:
                continue  # a stream has no epochs
            if isinstance(option.default, int | float) and not isinstance(value, int | float):
                raise TypeError(f"{option.name} in trainer_state.json is no number")
        # A resumed run logs as often as its own config says, not the earlier one's.
        self.state.compute_steps(self.args, max_steps)
        return begun

    # --- evaluation and checkpoints ----------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss and scores, logged as `eval_<name>`; leaves no trace in the training."""
        step = self.state.global_step
        scores: dict[str, float] | None = {}
        if self.validation:
            check_weights(self.trained_weights, step)
            with self.progress.silent(), self._whole_weights():
                scores = self.validation.scores(self.model, step)
            self.progress.say_if_too_often(self.validation.section.every_steps)
        if scores is None:  # every process knows, so every process comes here
            self.stop.sync()
            scores = {}
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        if metrics:
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _whole_weights(self) -> AbstractContextManager[None]:
        if not self.is_deepspeed_enabled:
            return nullcontext()
        from finetune.training.deepspeed.gathered import whole_weights

        return whole_weights(self.model_wrapped)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._save_with(self.saver.save)

    def _save_with(self, save: Callable[[Any], None]) -> None:
        with self.progress.throughput.paused():
            save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.saver.load_weights(self.model, Path(resume_from_checkpoint))


@contextmanager
def _already_training(model: Any) -> Iterator[None]:
    """`model.train()` does nothing inside, if the model is in training mode."""
    if model.training:
        model.train = lambda mode=True: model
    try:
        yield
    finally:
        model.__dict__.pop("train", None)


def _unwrapped(model: Any, **_: Any) -> Any:
    """The model without what torch puts around it to train in several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

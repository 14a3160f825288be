"""What is done to DeepSpeed's engine, each part alone: guard, states, cuts for other numbers of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from finetune.errors import CheckpointError
from finetune.training.deepspeed import gathered, resharded, sharded_engine
from finetune.training.deepspeed.sharded_engine import GuardedEngine, TakenStates


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- the guard of a step ---------------------------------------------------------------------------


class Engine:
    """An engine that notes what it is asked for."""

    def __init__(self, *, half: bool = False, frozen: bool = False, optimizer: Any = None) -> None:
        self.module = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2, bias=False)
        if frozen:
            self.module = nn.Sequential(self.module, self.frozen.requires_grad_(False))
        self.optimizer = optimizer or SimpleNamespace()
        self.events: list[Any] = []
        self.half = half
        self.norm: Any = None

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.events.append(is_boundary)

    def backward(self, loss: Any, **_: Any) -> None:
        next(iter(self.module.parameters())).grad = torch.full((2, 2), 1.0)

    def step(self) -> None:
        looks = [zero.is_invalid_grad_norm(float("nan")) for zero in (stage3,) if hasattr(zero, "is_invalid_grad_norm")]  # fmt: skip
        self.events.append(("step", any(looks)))

    def fp16_enabled(self) -> bool:
        return self.half

    def get_global_grad_norm(self) -> Any:
        return self.norm

    def save_checkpoint(self, folder: str, **options: Any) -> Any:
        self.events.append(("save", options))

    def load_checkpoint(self, folder: str, **options: Any) -> Any:
        self.events.append(("load", options))


@pytest.mark.parametrize("half", [False, True])
def test_the_guard_sees_the_norm_before_the_step_at_the_end_of_an_accumulation_only(
    half: bool,
) -> None:
    engine = Engine(half=half)
    guarded = GuardedEngine(engine, lambda norm: engine.events.append(("guard", norm)))
    guarded.backward(None, sync_gradients=False)
    assert engine.events == [False]
    guarded.backward(None)
    _, boundary, guard, step = engine.events
    assert boundary is True
    assert guard[0] == "guard"
    assert (guard[1] is None) if half else (float(guard[1]) == 2.0)
    assert step[0] == "step"
    assert step[1] is half  # whose look at the norm is its own affair with loss scaling only
    assert guarded.get_global_grad_norm() == (None if half else 2.0)
    engine.norm = 7.0
    assert guarded.get_global_grad_norm() == 7.0


def test_deepspeeds_look_at_the_norm_comes_back_after_a_step_that_fails() -> None:
    engine = Engine()
    looks = [zero.is_invalid_grad_norm for zero in (stage3, stage_1_and_2) if hasattr(zero, "is_invalid_grad_norm")]  # fmt: skip

    def failing() -> None:
        raise ValueError("broken")

    engine.step = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="broken"):
        GuardedEngine(engine, lambda norm: None).backward(None)
    assert looks == [zero.is_invalid_grad_norm for zero in (stage3, stage_1_and_2) if hasattr(zero, "is_invalid_grad_norm")]  # fmt: skip
    assert looks


@pytest.mark.parametrize(("parts", "norm"), [({0: [numbers(3.0), None], 1: None}, 3.0), ({}, 0.0)])
def test_gradients_that_are_dealt_out_count_and_then_deepspeed_tells_their_norm(
    parts: dict[int, Any], norm: float
) -> None:
    engine = Engine(optimizer=SimpleNamespace(averaged_gradients=parts))
    seen: list[Any] = []
    guarded = GuardedEngine(engine, seen.append)
    engine.backward = lambda loss, **_: None  # type: ignore[method-assign]
    guarded.backward(None)
    assert [float(one) for one in seen] == [norm]
    assert guarded.get_global_grad_norm() is None


def test_the_step_that_an_unfused_optimizer_has_taken_by_itself_is_forgotten() -> None:
    optimizer: Any = FP16_UnfusedOptimizer.__new__(FP16_UnfusedOptimizer)
    optimizer.optimizer = SimpleNamespace(state={"weight": {"step": 1}})
    GuardedEngine(Engine(optimizer=optimizer), lambda norm: None)
    assert optimizer.optimizer.state == {}


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_stay_out_of_states_and_need_not_be_in_them(
    frozen: bool, tmp_path: Path
) -> None:
    engine = Engine(frozen=frozen)
    GuardedEngine(engine, lambda norm: None)
    (tmp_path / "latest").write_text("global_step1\n")
    (tmp_path / "global_step1").mkdir()
    engine.save_checkpoint(str(tmp_path))
    engine.load_checkpoint(str(tmp_path))
    saves, loads = engine.events[0][1], engine.events[1][1]
    assert saves == {"save_latest": False} | ({"exclude_frozen_parameters": True} if frozen else {})
    assert loads == ({"load_module_strict": False} if frozen else {})
    assert type(engine.checkpoint_engine) is TakenStates  # type: ignore[attr-defined]
    assert engine._copy_recovery_script("x") is None  # type: ignore[attr-defined]


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("run by a pickle",))


def test_a_state_that_would_run_something_is_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"x": Harmful()}, tmp_path / "states.pt")
    for read in (TakenStates().load, sharded_engine._read):
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            read(str(tmp_path / "states.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["DynamicLossScaler", "LossScaler", "fragment_address"])
def test_what_deepspeed_keeps_in_its_states_is_opened(kind: str, tmp_path: Path) -> None:
    made = getattr(sharded_engine, kind)
    one = made(7, 3) if kind == "fragment_address" else made.__new__(made)
    torch.save({"held": one}, tmp_path / "states.pt")
    for found in (TakenStates().load(str(tmp_path / "states.pt")), sharded_engine._read(tmp_path / "states.pt", mapped=True)):  # fmt: skip
        assert type(found["held"]) is made
        assert vars(found["held"]) == vars(one)


def test_states_that_were_taken_are_held_no_longer() -> None:
    engine = TakenStates()
    engine.save({"x": 1}, "a")
    assert engine.taken() == {"a": {"x": 1}}
    assert engine.taken() == {}


# --- states for another number of processes ----------------------------------------------------------


def test_the_files_of_all_processes_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for rank in (10, 2, 0, 11, 1, *range(3, 10)):
        (tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    found = [path.name for path in resharded._parts(tmp_path)]
    assert found == [f"bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(12)]


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0, 2, [1, 2]), (1, 5, [2, 3, 4, 5]), (3, 4, [4]), (2, 3, [3]), (4, 9, [5, 6]), (6, 9, [])],
)
def test_a_cut_takes_the_numbers_between_its_ends_from_all_pieces(
    begin: int, end: int, expected: list[float]
) -> None:
    pieces = [numbers(1, 2), numbers(3), numbers(4, 5, 6)]
    assert resharded.taken(pieces, begin, end).tolist() == expected


@pytest.mark.parametrize(("rank", "own"), [(0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6, 0, 0])])
def test_stages_1_and_2_are_cut_anew_number_by_number(rank: int, own: list[float]) -> None:
    # Seven numbers of two processes, four each; saved weights have lost the zero at their end.
    saved = [
        {
            "single_partition_of_fp32_groups": [weights],
            "base_optimizer_state": {
                "state": {0: {"exp_avg": moments, "step": torch.tensor(5.0)}},
                "param_groups": ["kept"],
            },
            "zero_stage": 2,
        }
        for weights, moments in (
            (numbers(0, 1, 2, 3), numbers(0, 10, 20, 30)),
            (numbers(4, 5, 6), numbers(40, 50, 60, 0)),
        )
    ]
    optimizer = SimpleNamespace(partition_size=[3])
    found = resharded._of_flat_groups(optimizer, saved, rank)
    assert [one.tolist() for one in found["single_partition_of_fp32_groups"]] == [own]
    state = found["base_optimizer_state"]["state"][0]
    assert state["exp_avg"].tolist() == [10 * number for number in own]
    assert float(state["step"]) == 5.0
    assert found["base_optimizer_state"]["param_groups"] == ["kept"]
    assert found["zero_stage"] == 2


@pytest.mark.parametrize(("rank", "own"), [(0, [1, 2, 11]), (1, [3, 4, 12]), (2, [5, 0, 0])])
def test_stage_3_is_cut_anew_weight_by_weight(rank: int, own: list[float]) -> None:
    # Five and two numbers of two processes: three and one each, filled up with a zero.
    def saved_by(row: torch.Tensor) -> dict[str, Any]:
        state = {0: {"exp_avg": 10 * row, "step": torch.tensor(4.0)}}
        groups = [{"lr": 0.5, "params": [0]}]
        return {
            "fp32_flat_groups": [row],
            "optimizer_state_dict": {"state": state, "param_groups": groups},
        }

    saved = [saved_by(numbers(1, 2, 3, 11)), saved_by(numbers(4, 5, 0, 12))]
    weights = [
        SimpleNamespace(ds_numel=5, ds_tensor=torch.empty(2)),
        SimpleNamespace(ds_numel=2, ds_tensor=torch.empty(1)),
    ]
    optimizer = SimpleNamespace(fp16_groups=[weights], sub_group_to_group_id={0: 0})
    found = resharded._of_stage_3(optimizer, saved, rank)
    assert [one.tolist() for one in found["fp32_flat_groups"]] == [own]
    inner = found["optimizer_state_dict"]
    assert inner["state"][0]["exp_avg"].tolist() == [10 * number for number in own]
    assert float(inner["state"][0]["step"]) == 4.0
    assert inner["param_groups"] == [{"lr": 0.5, "params": [0]}]


def test_stage_3_goes_on_behind_each_sub_group_and_gives_each_its_own_count_of_steps() -> None:
    # Two weights of two numbers, each in a sub-group of its own; one process before, two now.
    step = torch.tensor(4.0)
    saved = [
        {
            "fp32_flat_groups": [numbers(1, 2), numbers(3, 4)],
            "optimizer_state_dict": {
                "state": {
                    n: {"exp_avg": numbers(10 * n, 10 * n + 1), "step": step} for n in (0, 1)
                },
                "param_groups": [{"lr": 0.5, "params": [0]}, {"lr": 0.1, "params": [1]}],
            },
        }
    ]
    weights = [[SimpleNamespace(ds_numel=2, ds_tensor=torch.empty(1))] for _ in range(2)]
    optimizer = SimpleNamespace(fp16_groups=weights, sub_group_to_group_id={0: 0, 1: 1})
    found = resharded._of_stage_3(optimizer, saved, 1)
    assert [one.tolist() for one in found["fp32_flat_groups"]] == [[2], [4]]
    inner = found["optimizer_state_dict"]
    assert [inner["state"][n]["exp_avg"].tolist() for n in (0, 1)] == [[1], [11]]
    assert inner["state"][0]["step"] is not inner["state"][1]["step"]
    assert [group["params"] for group in inner["param_groups"]] == [[0], [1]]
    for one in saved:
        one["optimizer_state_dict"]["state"] = {}  # saved before the first step
    fresh = resharded._of_stage_3(optimizer, saved, 0)
    assert fresh["optimizer_state_dict"]["state"] == {0: {}, 1: {}}
    assert [one.tolist() for one in fresh["fp32_flat_groups"]] == [[1], [3]]


@pytest.mark.parametrize(("rank", "source"), [(0, "0"), (1, "1"), (2, "0"), (3, "1")])
def test_a_process_opens_the_files_of_one_that_was_there_and_afterwards_its_own_again(
    rank: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharded.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(resharded.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(resharded, "_of_flat_groups", lambda optimizer, saved, rank: f"of {rank}")

    class Asked:
        optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
        seq_dp_world_size = 4
        loaded_checkpoint_dp_world_size = 2

        def _get_ckpt_name(self, folder: str, tag: str, mp: Any = None, pp: Any = None) -> str:
            return f"{folder}/{tag}/{pp}"

        def _load_checkpoint(self, *given: Any, **options: Any) -> str:
            return "loaded"

        def _get_all_zero_checkpoints(self, folder: str, tag: str) -> list[str]:
            return ["its own"]

    engine: Any = Asked()
    with resharded._cut_anew(engine, [{}, {}]):
        assert engine._get_ckpt_name("f", "t") == f"f/t/{source}"
        assert engine._get_ckpt_name("f", "t", None, "7") == "f/t/7"
        assert engine._get_all_zero_checkpoints("f", "t") == [f"of {rank}"] * 4
        assert engine._load_checkpoint("f") == "loaded"
        assert engine.loaded_checkpoint_dp_world_size == 4
    assert engine._get_ckpt_name("f", "t") == "f/t/None"
    assert engine._get_all_zero_checkpoints("f", "t") == ["its own"]


@pytest.mark.parametrize("kind", [SimpleNamespace, DeepSpeedZeroOptimizer_Stage3])
def test_states_that_cannot_be_cut_say_how_many_processes_to_start(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharded.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(resharded.dist, "get_world_size", lambda: 4)
    optimizer = kind.__new__(kind)
    optimizer.swap_optimizer = True
    engine = SimpleNamespace(optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"of 2 processes, .* cut for 4: start 2"), resharded._cut_anew(engine, [{}, {}]):  # fmt: skip
        pass


@pytest.mark.parametrize(("files", "world", "cuts"), [(0, 2, False), (2, 2, False), (3, 2, True)])
def test_only_states_of_another_number_of_processes_are_cut(
    files: int, world: int, cuts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").write_text("global_step3\n")
    (tmp_path / "global_step3").mkdir()
    for rank in range(files):
        (tmp_path / f"global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    cut: list[Any] = []

    class Cut:
        def __init__(self, engine: Any, saved: list[Any]) -> None:
            cut.append(saved)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(resharded, "_cut_anew", Cut)
    monkeypatch.setattr(resharded.dist, "get_world_size", lambda: world)
    engine = SimpleNamespace(load_checkpoint=lambda folder, **options: options)
    resharded.go_on_at_any_number(engine, lambda path: {"optimizer_state_dict": path.name})
    assert engine.load_checkpoint(str(tmp_path), x=1) == {"x": 1}
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(files)]
    assert cut == ([names] if cuts else [])


# --- weights gathered for an evaluation ----------------------------------------------------------------


class Offload:
    def __init__(self, module: nn.Module) -> None:
        self.calls: list[str] = []
        self.forward_hooks = [module.register_forward_hook(lambda *_: self.calls.append("after"))]
        self.backward_hooks = [
            module.register_full_backward_hook(lambda *_: self.calls.append("back"))
        ]
        self.fwd_pre_hook = module.register_forward_pre_hook(lambda *_: self.calls.append("before"))


@pytest.mark.parametrize("room", [0, -1])
def test_weights_are_whole_for_an_evaluation_where_there_is_room_beside_the_reserve(
    room: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = nn.Linear(4, 4, bias=False)
    module.weight.ds_id, module.weight.ds_numel = 0, 16  # type: ignore[attr-defined]
    offload = Offload(module)
    engine = SimpleNamespace(module=module, optimizer=SimpleNamespace(parameter_offload=offload))
    held: list[int] = []

    class Gathered:
        def __init__(self, weights: Any) -> None:
            held.append(len(weights))

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(gathered.deepspeed.zero, "GatheredParameters", Gathered)
    monkeypatch.setattr(gathered.device, "free_bytes", lambda: 16 * 4 + gathered.RESERVE + room)

    def evaluate() -> None:
        with gathered.whole_weights(engine):
            module(torch.ones(1, 4, requires_grad=True))
            raise ValueError("of the evaluation")

    with pytest.raises(ValueError, match="of the evaluation"):
        evaluate()
    assert held == ([1] if room == 0 else [])
    assert offload.calls == ([] if room == 0 else ["before", "after"])
    offload.calls.clear()
    module(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert offload.calls == ["before", "after", "back"]  # all hooks are there again
    assert ("gathers its weights" in capsys.readouterr().err) is (room < 0)


def test_below_stage_3_there_is_nothing_to_gather() -> None:
    with gathered.whole_weights(SimpleNamespace(optimizer=SimpleNamespace())):
        pass

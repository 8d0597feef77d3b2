"""8-bit moments, stochastic rounding, and updates in the backward pass."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import OptimizerType, Precision, TrainingSpec
from stagetune_trainer import adamw_8bit
from stagetune_trainer.adamw_8bit import AdamW8bit
from stagetune_trainer.loss import OutputHead
from stagetune_trainer.optimizers import make_optimizer
from stagetune_trainer.run import run_task
from stagetune_trainer.training_state import RandomState, TrainingState, WholeTensors
from stagetune_trainer.update import AccumulatedUpdate, BackwardUpdate
from stop_requests import AfterChecks

Train = Callable[..., tuple[StageReport, TrainerExitCode]]
EIGHT_BIT = TrainingSpec(optimizer=OptimizerType.ADAMW_8BIT)


@pytest.fixture
def train(
    make_later_config: Callable[..., StageConfig],
    make_stage: Callable[..., dict[str, Any]],
    make_tiny_model: Callable[..., Path],
    never: Any,
    tmp_path: Path,
) -> Train:
    """`train(run, stop=None, attempt=0, stage={}, **training)` of layers 1 and 2 of a tiny model.

    Its larger matrices have enough values for 8-bit moments.
    """
    model = {"source": f"file://{make_tiny_model('llama', hidden_size=64, intermediate_size=128)}"}

    def run(
        directory: str,
        *,
        stop: Any = None,
        attempt: int = 0,
        stage: dict[str, Any] | None = None,
        method: str = "Full",
        **training: Any,
    ) -> tuple[StageReport, TrainerExitCode]:
        config = make_later_config(
            "Train",
            model=model,
            stage=make_stage(0, 1, 2, **(stage or {})),
            method={"type": method},
            training=training,
            attempt=attempt,
        )
        root = tmp_path / directory
        if not root.exists():
            shutil.copytree(tmp_path / "run" / "prepare", root / "prepare")
        return run_task(config.model_copy(update={"run_directory": str(root)}), stop or never)

    return run


def succeeded(result: tuple[StageReport, TrainerExitCode]) -> StageReport:
    report, code = result
    assert code is TrainerExitCode.SUCCEEDED, report.failure
    return report


def weights(report: StageReport) -> dict[str, Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / names.WEIGHTS_FILE)


def fall(report: StageReport) -> float:
    assert report.train is not None
    return report.train.initial_validation_loss - report.train.validation_loss


def assert_same_bits(first: StageReport, second: StageReport) -> None:
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("precision", list(Precision))
def test_8_bit_moments_teach_as_much(precision: Precision, train: Train) -> None:
    usual = succeeded(train("usual", optimizer="AdamW", precision=precision))
    small = succeeded(train("small", optimizer="AdamW8bit", precision=precision))
    assert fall(usual) > 0.1
    assert fall(small) == pytest.approx(fall(usual), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_torchaos_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit as TorchaoAdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.manual_seed(0)
    value = torch.randn(64, 96).to(dtype)
    gradients = [torch.randn(64, 96).to(dtype) for _ in range(5)]
    group = {"weight_decay": 0.1}
    found, expected = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    ours = AdamW8bit([{"params": [found], **group}], lr=1e-2)
    theirs = TorchaoAdamW8bit(
        [{"params": [expected], **group}], lr=1e-2, bf16_stochastic_round=True
    )
    for parameter, optimizer in ((found, ours), (expected, theirs)):
        torch.manual_seed(1)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(found, expected)
    state = theirs.state[expected]["exp_avg_sq"]
    assert torch.equal(ours.state[found]["exp_avg_sq_codes"], state.codes)
    assert torch.equal(ours.state[found]["exp_avg_sq_scale"], state.scale)


def test_moments_take_a_byte_and_those_of_small_tensors_stay_fp32() -> None:
    parameters = {
        "large": nn.Parameter(torch.randn(64, 64).bfloat16()),
        "small": nn.Parameter(torch.randn(64).bfloat16()),
        "uneven": nn.Parameter(torch.randn(4099).bfloat16()),
    }
    optimizer = make_optimizer(parameters, EIGHT_BIT)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    large = optimizer.state[parameters["large"]]
    assert {key: (tensor.dtype, tensor.numel()) for key, tensor in large.items()} == {
        "step": (torch.float32, 1),
        "exp_avg_codes": (torch.uint8, 4096),
        "exp_avg_scale": (torch.float32, 16),
        "exp_avg_sq_codes": (torch.uint8, 4096),
        "exp_avg_sq_scale": (torch.float32, 16),
    }
    for name in ("small", "uneven"):
        state = optimizer.state[parameters[name]]
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.float32


def test_whole_state_stands_where_a_checkpoint_puts_it_back() -> None:
    """A GPU rounds otherwise beside a number of the host's; no GPU is needed to see where it is."""
    for size in (64, 8192):
        state = adamw_8bit._new_state(torch.empty(size, device="meta"))
        assert {value.device.type for value in state.values()} == {"meta"}


def test_large_tensor_is_updated_in_parts_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradient, results = torch.randn(80, 256), []
    for size in (2**24, 1024):
        monkeypatch.setattr(adamw_8bit, "_CHUNK_SIZE", size)
        parameter = nn.Parameter(torch.ones(80, 256))
        optimizer = make_optimizer({"weight": parameter}, EIGHT_BIT)
        optimizer.param_groups[0]["lr"] = 1e-3
        for _ in range(3):
            parameter.grad = gradient
            optimizer.step()
        results.append(parameter.detach())
    assert not torch.equal(results[0], torch.ones(80, 256))
    assert torch.equal(results[0], results[1])


def test_stochastic_rounding_keeps_updates_that_plain_rounding_loses() -> None:
    """A thousand steps of a thousandth of the distance to the next bf16 number below 1."""
    torch.manual_seed(0)
    steps, rate = 1000, 2.0**-8 / 1000
    plain, stochastic = (nn.Parameter(torch.ones(64, 64).bfloat16()) for _ in range(2))
    usual = torch.optim.AdamW([plain], lr=rate, weight_decay=0.0)
    ours = make_optimizer({"weight": stochastic}, EIGHT_BIT)
    ours.param_groups[0]["lr"] = rate
    for _ in range(steps):
        plain.grad, stochastic.grad = (torch.ones_like(plain) for _ in range(2))
        usual.step()
        ours.step()
    assert torch.equal(plain, torch.ones_like(plain))
    mean = float(stochastic.detach().float().mean())
    assert mean == pytest.approx(1 - 2.0**-8, abs=2.0**-8 / 10)


class OneStage(NamedTuple):
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    state: TrainingState


def stepped(stage: OneStage, steps: int) -> None:
    for _ in range(steps):
        for parameter in stage.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        stage.optimizer.param_groups[0]["lr"] = 1e-2
        stage.optimizer.step()


def new_stage() -> OneStage:
    torch.manual_seed(3)
    parameters = {
        "model.layers.1.weight": nn.Parameter(torch.randn(64, 64).bfloat16()),
        "model.layers.1.weight_scale": nn.Parameter(torch.randn(8, 8).bfloat16()),
    }
    optimizer = make_optimizer(parameters, EIGHT_BIT)
    held = WholeTensors(parameters, optimizer)
    return OneStage(parameters, optimizer, TrainingState(held=held, names=frozenset(parameters)))


def test_checkpoint_holds_the_8_bit_state_to_the_bit(tmp_path: Path) -> None:
    saved, loaded = new_stage(), new_stage()
    stepped(saved, 3)
    saved.state.snapshot().write(tmp_path, RandomState.capture())
    stepped(saved, 2)
    loaded.state.load(tmp_path)
    stepped(loaded, 2)
    for name, parameter in saved.parameters.items():
        other = loaded.parameters[name]
        assert torch.equal(parameter, other)
        state, again = saved.optimizer.state[parameter], loaded.optimizer.state[other]
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)


def test_checkpoint_is_smaller(train: Train, tmp_path: Path) -> None:
    sizes = []
    for optimizer in ("AdamW", "AdamW8bit"):
        stop = AfterChecks(9)
        assert train(optimizer, stop=stop, optimizer=optimizer, precision="BF16")[1] is (
            TrainerExitCode.INTERRUPTED
        )
        checkpoint = tmp_path / optimizer / "stages" / "01-layers-1-2" / "checkpoints"
        sizes.append(sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")))
    # By formula 12 and 4.03 bytes a parameter; torch's random state and headers are the rest.
    assert sizes[1] < 0.45 * sizes[0]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("checks", [2, 11, 14])
def test_stopped_stage_goes_on_to_the_same_bits_with_8_bit_moments(
    method: str, checks: int, train: Train
) -> None:
    fields: dict[str, Any] = {
        "method": method,
        "optimizer": "AdamW8bit",
        "precision": "BF16",
        "earlyStopping": {"patience": 5},
    }
    unbroken = succeeded(train("unbroken", **fields))
    _, code = train("broken", stop=AfterChecks(checks), **fields)
    assert code is TrainerExitCode.INTERRUPTED
    assert_same_bits(succeeded(train("broken", **fields)), unbroken)


def test_bf16_stage_keeps_bf16_weights_and_fp32_adapters(train: Train) -> None:
    fields = {"optimizer": "AdamW8bit", "precision": "BF16"}
    full = succeeded(train("full", **fields))
    assert {tensor.dtype for tensor in weights(full).values()} == {torch.bfloat16}
    lora = succeeded(train("lora", method="LoRA", **fields))
    assert {tensor.dtype for tensor in weights(lora).values()} == {torch.float32}


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_update_in_the_backward_pass_gives_the_same_bits_without_clipping(
    optimizer: str, method: str, train: Train
) -> None:
    fields: dict[str, Any] = {
        "method": method,
        "optimizer": optimizer,
        "microBatchSize": 4,
        "maxGradNorm": 1e6,
    }
    together = succeeded(train("together", **fields))
    one_by_one = succeeded(train("one-by-one", optimizerInBackward=True, **fields))
    assert fall(together) > 0.05
    assert_same_bits(one_by_one, together)


def test_stopped_stage_goes_on_to_the_same_bits_with_updates_in_the_backward_pass(
    train: Train,
) -> None:
    fields: dict[str, Any] = {
        "optimizer": "AdamW8bit",
        "optimizerInBackward": True,
        "precision": "BF16",
        "microBatchSize": 4,
    }
    unbroken = succeeded(train("unbroken", **fields))
    assert train("broken", stop=AfterChecks(9), **fields)[1] is TrainerExitCode.INTERRUPTED
    assert_same_bits(succeeded(train("broken", **fields)), unbroken)


def layers(count: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(count)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def test_no_two_gradients_stand_at_once() -> None:
    model, optimizer = layers()
    living: list[int] = []
    optimizer.register_step_pre_hook(
        lambda *_: living.append(sum(value.grad is not None for value in model.parameters()))
    )
    update = BackwardUpdate(list(model.parameters()), optimizer, 1.0)
    update.begin(1e-3)
    update.backward(model(torch.randn(2, 8)).square().sum())
    assert living == [1, 1, 1, 1]
    assert all(value.grad is None for value in model.parameters())


def test_gradients_are_clipped_one_by_one_and_their_whole_norm_is_told() -> None:
    inputs, norms = torch.randn(2, 8), []
    for kind in (AccumulatedUpdate, BackwardUpdate):
        model, _ = layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        before = [value.detach().clone() for value in model.parameters()]
        update = kind(list(model.parameters()), optimizer, 0.01)
        update.begin(1.0)
        update.backward(model(inputs).square().sum())
        norms.append(update.gradient_norm())
        update.apply()
        steps = [
            float((old - new).detach().norm())
            for old, new in zip(before, model.parameters(), strict=True)
        ]
        together = math.sqrt(sum(step**2 for step in steps))
        if kind is AccumulatedUpdate:
            assert together == pytest.approx(0.01, rel=1e-3)
        else:
            assert steps == pytest.approx([0.01] * 4, rel=1e-3)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_nothing_is_updated_from_a_number_on_that_is_not_finite() -> None:
    model, optimizer = layers()
    before = [value.detach().clone() for value in model.parameters()]
    update = BackwardUpdate(list(model.parameters()), optimizer, 1.0)
    update.begin(1e-3)
    update.backward(model(torch.full((2, 8), math.nan)).sum())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    # The gradient of the third layer from the top is spoilt on its way down.
    model[1].register_full_backward_hook(lambda *_: (torch.full((2, 8), math.inf),))
    inputs = torch.randn(2, 8, requires_grad=True)
    update.begin(1e-3)
    update.backward(model(inputs).square().sum())
    assert not math.isfinite(update.gradient_norm())
    changed = [
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    ]
    assert changed == [False, True, True, True]
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_diverging_stage_with_updates_in_the_backward_pass_leaves_its_last_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"optimizerInBackward": True, "microBatchSize": 4}
    unbroken = succeeded(train("unbroken", **fields))
    assert train("broken", stop=AfterChecks(9), **fields)[1] is TrainerExitCode.INTERRUPTED
    root = tmp_path / "broken" / "stages" / "01-layers-1-2"
    checkpoints = sorted(path.name for path in (root / "checkpoints").iterdir())
    compute = OutputHead.cross_entropy_sum

    def poisoned(self: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
        loss = compute(self, hidden, targets)
        if hidden.requires_grad:
            # The loss is finite, its gradient is not.
            hidden.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(OutputHead, "cross_entropy_sum", poisoned)
    report, code = train("broken", **fields)
    assert code is TrainerExitCode.DIVERGED
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.DIVERGED
    assert "gradient norm nan" in report.failure.message
    assert "the last checkpoint stands" in report.failure.message
    assert not (root / "output").exists()
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == checkpoints
    monkeypatch.undo()
    assert_same_bits(succeeded(train("broken", **fields)), unbroken)


LONG = {"steps": 80, "epochs": 10.0, "validationInterval": 2, "learningRate": 1e-3}


def test_stage_ends_when_it_gains_too_little_for_its_time(train: Train) -> None:
    # No model loses a thousand nats a minute for long: a minute is thousands of such steps.
    ended = succeeded(
        train("a", stage=LONG, earlyStopping={"patience": 80, "minGainPerMinute": 1000})
    )
    assert ended.train is not None
    assert (ended.train.stopped_early, ended.train.stopped_by) == (True, "Gain")
    assert 2 <= ended.train.steps < 80
    patient = succeeded(
        train("b", stage=LONG, earlyStopping={"patience": 80, "minGainPerMinute": 1e-9})
    )
    assert patient.train is not None
    assert patient.train.steps > ended.train.steps


def test_gain_is_counted_by_the_training_time_since_the_validation_before(
    train: Train, tmp_path: Path
) -> None:
    """Interrupted behind a validation, the stage compares with that one and not with the first."""
    fields = {"stage": LONG, "earlyStopping": {"patience": 80, "minGainPerMinute": 1e-9}}
    assert train("a", stop=AfterChecks(40), **fields)[1] is TrainerExitCode.INTERRUPTED
    (loop_file,) = (tmp_path / "a").rglob(names.LOOP_STATE_FILE)
    loop = json.loads(loop_file.read_text())
    assert loop["validated_step"] > 0
    assert 0 < loop["validated_train_seconds"] <= loop["train_seconds"]
    assert loop["stopped_by"] is None
    report, code = train("a", **fields)
    assert (report.outcome, code) == (Outcome.SUCCEEDED, TrainerExitCode.SUCCEEDED)

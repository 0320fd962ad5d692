"""Two processes on the CPU: FSDP2 and DeepSpeed as Accelerate runs them, what travels, and what is counted."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_worker import MODELS, build

import memtune
from memtune.errors import ConfigError
from memtune.preparation.distribution import settle, sharded

HERE = Path(__file__).parents[1]
CONFIGS = HERE.parent / "examples" / "configs"
BENCHMARK = HERE.parent / "examples" / "benchmarks" / "communication.py"

pytestmark = pytest.mark.slow


def launch(program, *arguments, processes, **environment):
    """Run a program in as many processes, and give what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(program), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def work(what, out, *, processes, **environment):
    """The results of each process of `distributed_worker.py`."""
    out.mkdir(exist_ok=True)
    launch(HERE / "distributed_worker.py", what, out, processes=processes, **environment)
    return [json.loads((out / f"results_{rank}.json").read_text()) for rank in range(processes)]


def environment_of(name):
    """What Accelerate's launcher sets for one of the configurations, with the CPU in place of GPUs."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "program.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    given = prepare_multi_gpu_env(arguments)
    kept = {key: value for key, value in given.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    return kept | {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}


def deepspeed_environment(stage):
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cpu",
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of each model."""
    return work("train", tmp_path_factory.mktemp("alone"), processes=1)[0]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, work("train", folder, processes=2, **environment_of("fsdp"))


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    folder = tmp_path_factory.mktemp("zero2")
    return folder, work("train", folder, processes=2, **deepspeed_environment(2))


@pytest.fixture(scope="module")
def stage_3(tmp_path_factory):
    """The environment of stage 3, for which the tiny backbone is not so small that it would stay whole."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    named = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    file = tmp_path_factory.mktemp("stage_3") / "deepspeed.json"
    file.write_text(json.dumps(settings | dict.fromkeys(named, "auto")))
    environment = deepspeed_environment(3)
    del environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"]
    return environment | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory, stage_3):
    folder = tmp_path_factory.mktemp("zero3")
    return folder, work("train", folder, processes=2, **stage_3)


def check_same_run(folder, results, alone, name, *, kind, sharded=False):
    """Two processes of a kind did what one does, and both end with the adapter that was saved."""
    expected, run = alone[name], results[0][name]
    for part in ("history", "resumed"):
        for entry, other in zip(run[part], expected[part], strict=True):
            assert entry == pytest.approx(other, abs=1e-4)
    assert run["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-4)
    assert run["in bf16"] == pytest.approx(run["evaluated"], abs=0.02)
    assert expected["history"][-1]["loss"] < expected["history"][0]["loss"] - 0.01
    assert all(each[name]["kept"] for each in results)
    saved = memtune.load(folder / name.replace(" ", "_"), backbone=build())
    assert {saved.task.digest()} == {each[name]["digest"] for each in results}
    assert {each[name]["distributed_type"] for each in results} == {kind}
    if sharded:
        assert all(0.4 < each[name]["share"] < 0.6 for each in results)  # of the backbone, while it trains


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_trains_what_one_process_trains(fsdp, alone, name):
    folder, results = fsdp
    check_same_run(folder, results, alone, name, kind="FSDP", sharded=True)


@pytest.mark.parametrize("name", MODELS)
def test_zero_2_trains_what_one_process_trains(zero2, alone, name):
    folder, results = zero2
    check_same_run(folder, results, alone, name, kind="DEEPSPEED")
    check_checkpoints_have_no_backbone(folder, name)


def check_checkpoints_have_no_backbone(folder, name):
    files = (folder / name.replace(" ", "_") / "run" / "checkpoint-3" / "pytorch_model").iterdir()
    backbone = sum(parameter.nbytes for parameter in build().parameters())
    assert 0 < sum(file.stat().st_size for file in files if "model_states" in file.name) < backbone / 2


@pytest.mark.parametrize("name", MODELS)
def test_zero_3_trains_what_one_process_trains(zero3, alone, name):
    folder, results = zero3
    check_same_run(folder, results, alone, name, kind="DEEPSPEED", sharded=True)
    check_checkpoints_have_no_backbone(folder, name)


def test_zero_3_takes_parameters_of_one_number(tmp_path, stage_3):
    (expected,) = work("towers", tmp_path / "one", processes=1)
    for losses in work("towers", tmp_path / "two", processes=2, **stage_3):
        assert losses == [pytest.approx(each, abs=1e-4) for each in expected]


@pytest.mark.parametrize("whole", [True, False])
def test_what_zero_3_cannot_shard_is_refused(whole):
    """By hand, as it is seen before DeepSpeed is asked for anything."""
    method = memtune.CodaPromptConfig(pool_size=2, ortho_mu=0.1, blocks=None) if whole else memtune.MemoryConfig(2)
    model = memtune.wrap(build(), method, num_labels=3)
    if not whole:
        parameter: Any = next(model.backbone.parameters())
        parameter.ds_id = 0  # by which DeepSpeed knows its own
    message = "with a penalty of trained values" if whole else "has in shards already"
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=message), sharded(accelerator, model):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true"),
    ],
)
def test_what_views_cannot_follow_is_refused(tmp_path, changed, message):
    results = work("refuse", tmp_path, processes=2, **environment_of("fsdp") | changed)
    assert all(message in each["error"] for each in results)


def test_what_deepspeed_would_cast_is_refused():
    plugin = SimpleNamespace(deepspeed_config={})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(state=state, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match="mixed_precision: got 'bf16' with"):
        settle(accelerator, memtune.TrainingConfig(mixed_precision="bf16"))
    assert not plugin.deepspeed_config


def test_the_first_fsdp_is_refused():
    """By hand, as Accelerate's own settings for it need a GPU."""
    plugin = SimpleNamespace(fsdp_version=1)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"got fsdp_version 1, .* set fsdp_version: 2"):
        settle(accelerator, memtune.TrainingConfig())


def test_deepspeed_that_is_not_installed_is_named(tmp_path):
    if find_spec("deepspeed"):
        pytest.skip("it is installed")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
    (result,) = work("refuse", tmp_path, processes=1, **environment)
    assert "cannot start as it was launched: DeepSpeed is not installed" in result["error"]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configuration_of_deepspeed_is_the_stage_that_was_run(stage):
    settings = yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text())
    assert settings["deepspeed_config"]["zero_stage"] == stage
    assert settings["mixed_precision"] == "no"


def test_only_the_gradients_of_what_is_trained_travel():
    """Each step's bytes, counted in a communication hook, are four for each trained value."""
    printed = launch(BENCHMARK, "--quick", "--size", "tiny", processes=2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    sent = {name: int(counted.replace(",", "")) for name, counted, *_ in rows[2:]}
    width, head = 192, 10 * 192 + 10
    memory = 2 * 4 * width  # blocks, tokens
    assert sent == {
        "masked memory": 4 * (memory + width + head),
        "unmasked memory": 4 * (memory + width + head),
        "LoRA": 4 * (2 * 2 * 8 * 2 * width + head),
        "full fine-tuning": sent["full fine-tuning"],
    }
    config = build().config
    config.update({"hidden_size": width, "num_attention_heads": 3, "intermediate_size": 768, "patch_size": 16})
    config.num_labels = 10
    whole = type(build())(config)
    assert sent["full fine-tuning"] == 4 * sum(parameter.numel() for parameter in whole.parameters())


def test_each_image_counts_once(tmp_path):
    """Of odd numbers of images two processes have unequal shares; a repeated image would change the mean."""
    one = work("evaluate", tmp_path / "one", processes=1)[0]
    two = work("evaluate", tmp_path / "two", processes=2)
    for each in two:
        for count, scores in one.items():
            assert each[count]["accuracy"] == scores["accuracy"]
            assert each[count]["loss"] == pytest.approx(scores["loss"], abs=1e-6)
    assert torch.tensor([scores["loss"] for scores in one.values()]).isfinite().all()

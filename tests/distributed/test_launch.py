"""Starting several processes: the launch files, and what is reported when the processes are not as meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from peft import LoraConfig, get_peft_model

from hf_kdtl.trainer.checks import check_setting
from hf_kdtl.trainer.process_checks import check_ranks, data_problem, difference, launch_problem
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import Images, launch, pair, trainer
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "hf_kdtl/configs/launch").glob("*.yaml"))
EXPECTED = {
    "one": (DistributedType.NO, "no"),
    "cpu": (DistributedType.MULTI_GPU, "no"),
    "ddp": (DistributedType.MULTI_GPU, "no"),
    "ddp_bf16": (DistributedType.MULTI_GPU, "bf16"),
    "fsdp2": (DistributedType.FSDP, "no"),
}


def parsed(*arguments):
    """What `accelerate launch` makes of its command line."""
    args = launch_command_parser().parse_args([*arguments, "script.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_each_file_and_it_says_what_it_is_for(file):
    kind, precision = EXPECTED[file.stem]
    found = load_config_from_file(str(file))
    assert found.distributed_type == kind and found.mixed_precision == precision
    args = parsed("--config_file", str(file))
    assert args.multi_gpu == (kind == DistributedType.MULTI_GPU) and not args.cpu
    assert args.use_fsdp == (kind == DistributedType.FSDP)
    assert args.num_processes == (1 if file.stem == "one" else 2) and args.mixed_precision == precision
    head = " ".join(line.lstrip("# ") for line in file.read_text().split("compute_environment")[0].splitlines())
    assert f"accelerate launch --config_file {file.name}" in head
    assert "Tested: " in head and ("ot tested: " in head or file.stem == "cpu")


def test_every_file_is_expected():
    assert {file.stem for file in FILES} == EXPECTED.keys()


# ---- Fewer processes than were asked for ----


def environment(*arguments):
    """What `accelerate launch` would tell the process that it starts alone."""
    return prepare_simple_launcher_cmd_env(parsed(*arguments))[1]


@pytest.fixture
def bare(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def test_a_launcher_that_started_one_process_of_two_is_found(bare, tmp_path):
    multi_cpu = tmp_path / "multi_cpu.yaml"
    multi_cpu.write_text((ROOT / "hf_kdtl/configs/launch/cpu.yaml").read_text().replace("MULTI_GPU", "MULTI_CPU"))
    for asked in (["--cpu", "--num_processes=2"], ["--num_processes=2"], [f"--config_file={multi_cpu}"]):
        message = launch_problem(environment(*asked), 1)
        assert "configured for several processes and started one" in message
        assert "--multi_gpu --num_processes 2" in message
    assert launch_problem(environment("--cpu", "--num_processes=1"), 1) is None
    assert launch_problem(environment(f"--config_file={ROOT / 'hf_kdtl/configs/launch/one.yaml'}"), 1) is None


def test_processes_that_torchrun_started_are_fine(bare):
    several = prepare_multi_gpu_env(parsed(f"--config_file={ROOT / 'hf_kdtl/configs/launch/cpu.yaml'}"))
    ranked = several | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert launch_problem(ranked, 2) is None
    assert launch_problem(ranked | {"WORLD_SIZE": "1"}, 1) is None  # torchrun --nproc_per_node 1
    assert launch_problem({"MASTER_ADDR": "a-cluster"}, 1) is None  # no launcher
    message = launch_problem(ranked, 1)
    assert "requests 2 processes (WORLD_SIZE) and this run has 1" in message and "--num_processes 2" in message


# ---- Other ways of several devices ----


def test_deepspeed_is_refused_by_name(tmp_path):
    runner = trainer(tmp_path, build("vit"), data=Images(4))
    runner.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*accelerate launch --multi_gpu --num_processes"):
        check_setting(runner)


@pytest.mark.parametrize("plugin", [False, True])
def test_fsdp_is_for_the_launcher_to_ask(tmp_path, plugin):
    runner = trainer(tmp_path, build("vit"), data=Images(4))
    runner.is_fsdp_enabled, runner.args.fsdp = plugin, not plugin
    with pytest.raises(
        ValueError, match="in the launcher alone: hf-kdtl configs copy fsdp2; accelerate launch --config_file fsdp2"
    ):
        check_setting(runner)


def environment_of_fsdp(monkeypatch, **changed):
    file = f"--config_file={ROOT / 'hf_kdtl/configs/launch/fsdp2.yaml'}"
    printed = {k: v for k, v in prepare_multi_gpu_env(parsed(file)).items() if "FSDP" in k}
    for name, value in (printed | changed).items():
        monkeypatch.setenv(name, value)


NOT_SHARDED = [
    ({"gradient_rule": {"name": "pcgrad"}}, "gradient_rule, which compares full gradients"),
    ({"layer_rates": {"mode": "discrepancy"}}, "measured layer_rates"),
    ({"torch_compile": True}, "torch_compile"),
    (
        {CHECKPOINTING: True, "objectives": [{"name": "task"}, {"name": "jacobian"}]},
        "activation checkpointing together with derivatives",
    ),
    ({"push_to_hub": True}, "push_to_hub"),
]


def test_fsdp2_is_taken_over_from_accelerate(monkeypatch, tmp_path):
    environment_of_fsdp(monkeypatch)
    runner = trainer(tmp_path, *pair())
    assert runner.sharded and not runner.is_fsdp_enabled
    assert runner.accelerator.distributed_type != DistributedType.FSDP
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    with pytest.raises(ValueError, match="under FSDP2 a double backward gives zero"):
        _ = trainer(tmp_path, *pair(), objectives=[{"name": "jacobian", "estimator": "vjp"}]).distiller


@pytest.mark.parametrize(("settings", "says"), NOT_SHARDED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_fsdp2_would_break_is_refused(monkeypatch, tmp_path, settings, says):
    environment_of_fsdp(monkeypatch)
    runner = trainer(tmp_path, *pair())
    for name, value in settings.items():
        setattr(runner.args, name, value)
    with pytest.raises(
        ValueError, match=f"{says}.* is not supported under FSDP2. Use DDP: accelerate launch --multi_gpu"
    ):
        check_setting(runner)


def test_students_that_fsdp2_would_break_are_refused(monkeypatch, tmp_path):
    environment_of_fsdp(monkeypatch)
    with pytest.raises(ValueError, match="BatchNorm, whose statistics would differ"):
        trainer(tmp_path, build("resnet"), data=Images(4))
    with pytest.raises(ValueError, match="students with adapters"):
        trainer(tmp_path, get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj"])), data=Images(4))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FSDP_VERSION", "1", "FSDP1 is not supported"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading is not supported: set it to false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is not supported"),
    ],
)
def test_other_kinds_of_fsdp_are_refused(monkeypatch, tmp_path, name, value, says):
    environment_of_fsdp(monkeypatch, **{name: value})
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, build("vit"), data=Images(4))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    runner = trainer(tmp_path, build("vit"), data=Images(4))
    runner.args._n_gpu = 4
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch --multi_gpu --num_processes 4 <script>"):
        check_setting(runner)


# ---- Processes that differ, and too little data ----


def test_the_settings_that_differ_are_named():
    assert difference([{"seed": "1"}, {"seed": "1"}]) is None
    one = {"seed": "1", "bf16": "false"}
    message = difference([one, one, one | {"seed": "2"}])
    assert message.startswith("processes 0 and 2 differ in seed (seed 1 on 0 and 2 on 2)") and "bf16" not in message
    assert "differ in max_steps" in difference([{}, {"max_steps": "3"}])
    many = [{str(i): str(rank) for i in range(9)} for rank in range(2)]
    assert "and 4 more" in difference(many)


@pytest.mark.parametrize(
    ("images", "processes", "drop_last", "says"),
    [
        (3, 4, False, "4 processes and 3 training images.*--num_processes 3"),
        (4, 4, False, None),
        (31, 4, True, "31 training images are fewer than one batch of 4 x 8.*--per_device_train_batch_size 7"),
        (32, 4, True, None),
        (7, 1, True, "7 training images are fewer than one batch of 1 x 8"),
    ],
)
def test_data_that_does_not_go_round(images, processes, drop_last, says):
    args = SimpleNamespace(world_size=processes, per_device_train_batch_size=8, dataloader_drop_last=drop_last)
    message = data_problem(SimpleNamespace(args=args, train_dataset=range(images)))
    assert message is None if says is None else re.search(says, message)


def test_one_process_is_not_compared(bare, tmp_path):
    runner = trainer(tmp_path, build("vit"), data=Images(4))
    check_ranks(runner)
    runner.train_dataset, runner.args.dataloader_drop_last = Images(2), True
    with pytest.raises(ValueError, match="training would make no step"):
        check_ranks(runner)


# ---- Really started ----


@pytest.mark.slow
def test_two_processes_agree_on_what_is_wrong(tmp_path):
    launch("tests.distributed.ranks_worker", 2, tmp_path / "out")
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["world"] == 2
    assert first["equal"] == first["of a rank"] == ""
    assert "differ in seed (seed 42 on 0 and 43 on 1)" in first["seed"]
    assert "differ in objectives" in first["objectives"]
    assert "differ in the number of training images (the number of training images 16 on 0 and 15" in first["images"]
    assert "2 processes and 1 training images" in first["fewer images"]
    assert "differ in the student's parameters" in first["student"]


@pytest.mark.slow
def test_one_process_where_two_were_asked_for(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["-m", "tests.distributed.ranks_worker", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "out.0.json").read_text())
    assert found["world"] == 1 and "configured for several processes and started one" in found["equal"]


def command_of(file, name, *arguments):
    """What a command prints on two processes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"hf_kdtl/configs/launch/{file}.yaml",
    ]
    command += [
        "--main_process_port=0",
        "-m",
        f"hf_kdtl.commands.{name}",
        "--use_cpu",
        "true",
        "--max_steps",
        "4",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cpu", "fsdp2"])
def test_commands_on_two_cpu_processes(file, tmp_path):
    config = ["--config", "digits_teacher", "--eval_strategy", "no"]
    command_of(file, "train_teacher", *config, "--output_dir", str(tmp_path / "teacher"))
    results = json.loads((tmp_path / "teacher/results.json").read_text())
    model = tmp_path / "teacher/model"
    assert results["run"]["processes"] == 2 and (model / "model.safetensors").is_file()
    if file == "fsdp2":  # a teacher in parts, in two runs after each other, and then evaluated unsharded
        runs = ["--seeds", "1", "2", "--student_layers", "2", "--output_dir", str(tmp_path / "student")]
        command_of(file, "distill", "--teacher", str(model), "--dataset", "digits", *runs)
        assert (tmp_path / "student/report.md").is_file()

"""The traps in which processes train alone without a word, by the environments that launchers make."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from forgather_fn.distributed.launched import check_world_size, idle_devices


@pytest.fixture
def accelerate_launch(monkeypatch, tmp_path):
    """What `accelerate launch` gives the one process that it starts, where it does not go through torch's launcher."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def environment(*arguments):
        args = launch_command_parser().parse_args([*arguments, "train.py"])
        args, *_ = _validate_launch_command(args)
        assert not args.multi_gpu  # which is what starts several
        return prepare_simple_launcher_cmd_env(args)[1]

    return environment


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cpu", "--num_processes", "2"),
        ("--num_processes", "2"),
        ("--num_processes", "1", "--num_machines", "2", "--main_process_ip", "ada", "--main_process_port", "29500"),
        ("--config_file", "multi_cpu.yaml"),
    ],
)
def test_one_process_of_several_is_refused(accelerate_launch, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "multi_cpu.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_CPU, num_machines: 1, num_processes: 2,"
        " mixed_precision: 'no', use_cpu: true}"
    )
    with pytest.raises(ValueError, match=r"told to start several processes, and has started one.*\n *forgather launch"):
        check_world_size(accelerate_launch(*arguments), 1)


@pytest.mark.parametrize("arguments", [("--cpu",), ("--cpu", "--num_processes", "1"), ("--num_processes", "1")])
def test_one_process_that_was_asked_for_is_let_be(accelerate_launch, arguments):
    check_world_size(accelerate_launch(*arguments), 1)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_refused(variable):
    with pytest.raises(
        ValueError, match=rf"(?s)2 processes \({variable}=2\), and this one knows of 1: .*launch -n 2 --cpu"
    ):
        check_world_size({variable: "2", "RANK": "0"}, 1)
    check_world_size({variable: "2"}, 2)
    check_world_size({variable: "1"}, 1)


def test_a_process_without_a_launcher_is_let_be():
    check_world_size({}, 1)
    check_world_size({"MASTER_ADDR": "ada", "MASTER_PORT": "29500"}, 1)


def test_idle_gpus_are_told_of_where_nobody_chose():
    said = idle_devices({}, 2, ["train.py", "--x"])
    assert said == "1 of 2 GPUs is used. For all of them: forgather launch -n 2 train.py --x"
    assert idle_devices({}, 1, ["train.py"]) is None
    assert idle_devices({"WORLD_SIZE": "1"}, 2, ["train.py"]) is None  # torchrun --nproc-per-node 1: one is meant

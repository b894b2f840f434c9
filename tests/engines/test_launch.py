"""Launches on several processes and nodes, as users type them, and the files in docs/launch/ that they start from."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from clm_helpers import QUIET, log_history, run_clm, run_main
from launch_helpers import NEEDS_DEEPSPEED, ROOT, TESTS, run, run_together
from nodes_worker import BLOCKS

pytestmark = pytest.mark.timeout(600)  # a test may set up two runs, each with a timeout of its own

LAUNCH = ROOT / "docs" / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
# (nodes, processes); two nodes with eight each if not here
SIZES = {"ddp_8.yaml": (1, 8), "zero3_8.yaml": (1, 8)}


# ---- the files ----


def validated(arguments):
    """What `accelerate launch` makes of its arguments and the configuration file that they name."""
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_the_configuration(name):
    config = load_config_from_file(str(LAUNCH / name))  # raises for keys that it does not know
    assert (config.num_machines, config.num_processes) == SIZES.get(name, (2, 16))
    args = validated(
        ["--config_file", str(LAUNCH / name), "--machine_rank", "0", "run_clm.py", "--optim", "mars_lion"]
    )
    assert (args.num_processes, args.mixed_precision, args.use_cpu) == (config.num_processes, "bf16", False)
    engines = {"ddp": args.multi_gpu, "fsdp": args.use_fsdp, "zero": args.use_deepspeed}
    assert [engine for engine, used in engines.items() if used] == [re.match("[a-z]+", name)[0]]


def test_fsdp_is_version_2():
    for name in CONFIGS:
        config = load_config_from_file(str(LAUNCH / name)).fsdp_config
        assert not config or (config["fsdp_version"], config["fsdp_offload_params"]) == (2, False)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("zero")])
def test_deepspeed_leaves_the_optimizer_to_the_script(name):
    """A configuration with an optimizer of its own would not run MARS."""
    config = load_config_from_file(str(LAUNCH / name)).deepspeed_config
    assert name.startswith(f"zero{config['zero_stage']}_")
    assert config["offload_optimizer_device"] == config["offload_param_device"] == "none"
    assert not {"deepspeed_config_file", "optimizer", "scheduler"} & set(config)


def test_the_slurm_script(tmp_path):
    """Syntax, and what it starts on each of three nodes with four GPUs: srun and scontrol are stand-ins."""
    script = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames node[7-9]" ] && printf "node7\\nnode8\\nnode9\\n"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift; for id in 0 1 2; do SLURM_NODEID=$id "$@" || exit 1; done',
        "accelerate": '[ "$1" = launch ] && shift; printf "%s\\t" "$@"; printf "%s\\n" "$OMP_NUM_THREADS"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NNODES": "3", "SLURM_CPUS_PER_TASK": "24", "GPUS": "4"}
    done = subprocess.run(
        ["bash", script, "--optim", "mars_lion", "--sample_prompt", "two words"],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    commands = [line.split("\t") for line in done.stdout.splitlines()]
    for rank, (*command, threads) in enumerate(commands):
        args = validated([argument.replace("docs/launch", str(LAUNCH)) for argument in command])
        assert (args.num_machines, args.num_processes, int(args.machine_rank)) == (3, 12, rank)
        assert (args.main_process_ip, args.main_process_port, args.multi_gpu) == ("node7", 29500, True)
        assert args.training_script == "run_clm.py"
        assert args.training_script_args == ["--optim", "mars_lion", "--sample_prompt", "two words"]
        assert threads == "6"
    assert len(commands) == 3


# ---- runs ----

RUN = [
    *("--optim", "mars_shampoo", "--learning_rate", "0.02", "--max_steps", "6", "--logging_steps", "1"),
    *("--max_eval_samples", "5", "--save_strategy", "no", "--report_to", "none", "--use_cpu"),
    *("--disable_tqdm", "true"),  # then logs are printed line by line
]
NEW_MODEL = [
    *("--vocab_size", "300"),
    # Without dropout: processes draw different masks.
    "--config_overrides",
    "n_layer=1,n_head=2,n_embd=32,n_positions=32,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
]
TOTAL_BATCH = 8


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The output folder of the run on one process."""
    output_dir = tmp_path_factory.mktemp("one") / "out"
    batch = ["--per_device_train_batch_size", str(TOTAL_BATCH), "--per_device_eval_batch_size", str(TOTAL_BATCH)]
    run_clm.main([*RUN, *NEW_MODEL, *batch, "--output_dir", str(output_dir), *QUIET])
    return output_dir


def accelerate_launch(*arguments, processes, output_dir, model=NEW_MODEL):
    """`accelerate launch … run_clm.py …` with RUN, the model and the total batch shared out to `processes`."""
    per_device = ["--per_device_train_batch_size", str(TOTAL_BATCH // processes), "--per_device_eval_batch_size", "2"]
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", *arguments]
    return [*launch, str(ROOT / "run_clm.py"), *RUN, *model, *per_device, "--output_dir", str(output_dir)]


def check_same_run(output_dir, expected_dir, printed):
    """Losses as on one process, with float32 rounding; Newton–Schulz multiplies differences of the gradients."""
    assert "INFO run_clm: 2 processes on cpu, " in printed
    history, expected = log_history(output_dir), log_history(expected_dir)
    for key in ("loss", "eval_loss", "eval_perplexity", "eval_accuracy"):
        values, expected_values = ([row[key] for row in rows if key in row] for rows in (history, expected))
        assert len(values) == (6 if key == "loss" else 1)
        assert values == pytest.approx(expected_values, rel=1e-5), key


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_launch_of_two_processes_equals_one_process(one_process, tmp_path):
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = accelerate_launch(*flags.split(), "--main_process_port", "0", processes=2, output_dir="out")
    (printed,) = run_together(lambda port: [({}, launch)], tmp_path)
    check_same_run(tmp_path / "out", one_process, printed)


def deepspeed_launch(config, *arguments, model=NEW_MODEL):
    """A launch of two processes with a file of docs/launch/ that has DeepSpeed."""
    options = ["--config_file", str(LAUNCH / config), "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--main_process_port", "0"]
    launch = [*accelerate_launch(*options, processes=2, output_dir="out", model=model), *arguments]
    return [({"DS_ACCELERATOR": "cpu"}, launch)]


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_a_launch_with_deepspeed_equals_one_process(one_process, tmp_path):
    (printed,) = run_together(lambda port: deepspeed_launch("zero2_2x8.yaml"), tmp_path)
    assert "You are using ZeRO with an untested optimizer" in printed  # one that is not DeepSpeed's own
    check_same_run(tmp_path / "out", one_process, printed)


@pytest.mark.slow
@pytest.mark.exhaustive
@NEEDS_DEEPSPEED
def test_a_launch_with_stage_3_equals_one_process(one_process, tmp_path):
    """mars_m on a model that is there: a new one gets other weights in shards."""
    more = ["--optim", "mars_m", "--optim_args", "max_norm=1"]
    model = ["--model_name_or_path", str(one_process)]
    batch = ["--per_device_train_batch_size", str(TOTAL_BATCH), "--per_device_eval_batch_size", str(TOTAL_BATCH)]
    run_clm.main([*RUN, *model, *batch, *more, "--output_dir", str(tmp_path / "one"), *QUIET])
    (printed,) = run_together(lambda port: deepspeed_launch("zero3_8.yaml", *more, model=model), tmp_path)
    check_same_run(tmp_path / "out", tmp_path / "one", printed)


def test_a_launch_that_hangs_is_run_again_and_shows_its_stacks(tmp_path):
    script = (
        "import pathlib, time\nif not pathlib.Path('ran').exists():\n  pathlib.Path('ran').touch()\n  time.sleep(60)"
    )
    with pytest.warns(UserWarning, match=r'(?s)hung.*File "<string>", line 4'):
        codes, _ = run(lambda port: [({}, [sys.executable, "-c", script])], tmp_path, timeout=5)
    assert codes == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "of_rank_1, code",
    [("os._exit(7)", 7), ("raise ValueError", 1), ("os.kill(os.getpid(), 9)", -9), ("sys.exit(0)", 0)],
)
def test_a_forked_launch_ends_as_its_processes_do(tmp_path, of_rank_1, code):
    """The other rank waits for the one that fails; it is killed."""
    (tmp_path / "script.py").write_text(
        "import os, sys\nimport torch.distributed as dist\ndist.init_process_group('gloo')\nrank = dist.get_rank()\n"
        f"print('rank %d %s' % (rank, sys.argv[1]), flush=True)\nif rank == 1: {of_rank_1}\n"
        + ("import time; time.sleep(300)\n" if code else "")
    )
    done = forks.start(2, tmp_path / "script.py", ["argument"], {}, timeout=60)
    assert done.returncode == code, done.stderr
    assert "rank 1 argument" in done.stdout and ("ValueError" in done.stderr) == (code == 1)


@pytest.mark.slow
def test_a_forked_launch_that_hangs_is_ended(tmp_path):
    (tmp_path / "script.py").write_text("print('begins', flush=True)\nimport time; time.sleep(300)")
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        forks.start(2, tmp_path / "script.py", [], {}, timeout=10)
    assert hung.value.stdout == "begins\nbegins\n"
    assert hung.value.stderr.count('script.py", line 2 in <module>') == 2  # the stacks
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        forks.start(1, tmp_path / "script.py", [], {"TRITON_INTERPRET": "1"}, timeout=10)


def two_nodes(address, port):
    """The launch of each of two nodes with one process."""
    common = ["--config_file", str(LAUNCH / "ddp_2x8.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    common += ["--main_process_ip", address, "--main_process_port", port]
    return [accelerate_launch(*common, "--machine_rank", str(r), processes=2, output_dir="out") for r in (0, 1)]


@pytest.mark.slow
def test_two_nodes_on_loopback_equal_one_process(one_process, tmp_path):
    printed = run_together(lambda port: [({}, launch) for launch in two_nodes("127.0.0.1", port)], tmp_path)
    check_same_run(tmp_path / "out", one_process, printed[0])
    # The second node neither logs nor reports.
    for line in ("INFO", "perplexity", "'loss'", "train_runtime"):
        assert line in printed[0] and line not in printed[1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_dies_on_one_node_ends_the_launches_of_both(tmp_path):
    def kill_on_the_second(running, logs):
        deadline = time.monotonic() + 100
        while "'loss'" not in logs[0].read_text():  # both train
            if time.monotonic() > deadline or any(process.poll() is not None for process in running):
                return
            time.sleep(0.1)
        for worker in psutil.Process(running[1].pid).children():
            worker.kill()

    def endless(port):
        return [({}, [*launch, "--max_steps", "1000000"]) for launch in two_nodes("127.0.0.1", port)]

    codes, printed = run(endless, tmp_path, meanwhile=kill_on_the_second)
    assert "INFO run_clm: 2 processes on cpu, " in printed[0], printed[0][-4000:]
    assert "Signal 9 (SIGKILL)" in printed[1], printed[1][-4000:]
    assert None not in codes and 0 not in codes, (codes, *(text[-4000:] for text in printed))


@pytest.fixture
def network_namespaces():
    """Two network namespaces joined by a pair of virtual interfaces: (name, interface, address) of each."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")

    def ip(*arguments):
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
        if done.returncode != 0:
            pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    nodes = [(f"mars-{os.getpid()}-{i}", f"mars{os.getpid()}v{i}"[-15:], f"10.199.61.{i + 1}") for i in (0, 1)]
    try:
        for name, _, _ in nodes:
            ip("netns", "add", name)
        (first, one, _), (second, two, _) = nodes
        ip("link", "add", one, "netns", first, "type", "veth", "peer", "name", two, "netns", second)
        for name, interface, address in nodes:
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for name, _, _ in nodes:  # the interfaces go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_nodes_with_their_own_addresses_equal_one_process(one_process, tmp_path, network_namespaces):
    def commands(port):
        launches = two_nodes(network_namespaces[0][2], port)
        return [
            ({"GLOO_SOCKET_IFNAME": interface}, ["ip", "netns", "exec", name, *launch])
            for (name, interface, _), launch in zip(network_namespaces, launches, strict=True)
        ]

    printed = run_together(commands, tmp_path)
    check_same_run(tmp_path / "out", one_process, printed[0])


# ---- before training, on two nodes with two processes each ----


@pytest.fixture(scope="module")
def two_by_two(one_process, tmp_path_factory):
    """What nodes_worker.py wrote, for each of its four processes."""
    folder = tmp_path_factory.mktemp("two_by_two")
    rendezvous = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    worker = [sys.executable, str(TESTS / "engines" / "nodes_worker.py"), str(folder), str(one_process)]

    def commands(port):
        ranks = ({"RANK": str(r), "LOCAL_RANK": str(r % 2), "MASTER_PORT": port} for r in range(4))
        return [({**rendezvous, **rank}, worker) for rank in ranks]

    run_together(commands, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
def test_evaluation_counts_every_block_once(two_by_two, one_process, tmp_path, blocks):
    expected = run_main(
        *("--do_eval", "--model_name_or_path", one_process, "--output_dir", tmp_path, "--max_eval_samples", blocks),
        *("--per_device_eval_batch_size", 1),
    )
    for results in two_by_two:
        metrics = results["evaluations"][str(blocks)]
        for key in ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_samples"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-6), key


FAILURES = {
    "missing text": (2, "UsageError: --train_file text.txt: there is no such file"),
    "full folder": (2, "UsageError: --output_dir full: is not empty (notes.txt)"),
    "load_texts fails": (3, "OSError: No space left on device"),
    "train_bpe fails": (0, "OSError: No space left on device"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_process_that_fails_alone_ends_all(two_by_two, name):
    """Both processes of node 1 lack the text or have the full folder; the other two learn of the first of them."""
    process, message = FAILURES[name]
    messages = [results["refusals"][name] for results in two_by_two]
    failed = (2, 3) if message.startswith("UsageError") else (process,)
    for rank, said in enumerate(messages):
        expected = message if rank in failed else f"UsageError: process {process} on {socket.gethostname()}: {message}"
        assert said.startswith(expected), said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        (
            "no checkpoint",
            "the checkpoint that --resume_from_checkpoint auto finds must be the same for all processes: "
            "checkpoint-1 for process 0, None for 2",
        ),
        ("other text", "the number of tokens of the training text must be the same for all processes: "),
    ],
)
def test_nodes_that_see_different_files_are_refused(two_by_two, name, message):
    for results in two_by_two:
        assert results["refusals"][name].startswith(f"UsageError: {message}")


@pytest.mark.slow
def test_data_are_prepared_once_on_a_shared_disk_and_once_a_node_on_separate_ones(two_by_two):
    tokenised = {
        name: [results["preparations"][name].get("tokenize", 0) > 0 for results in two_by_two]
        for name in ("own disks", "shared disk", "again", "overwritten")
    }
    assert tokenised == {
        "own disks": [True, False, True, False],
        "shared disk": [True, False, False, False],
        "again": [False] * 4,
        # Nobody can tell whether the other node's first process sees what process 0 has just written.
        "overwritten": [True, False, True, False],
    }
    for results in two_by_two:
        assert {name: counts.get("train_bpe", 0) for name, counts in results["preparations"].items()} == {
            name: int(results is two_by_two[0]) for name in tokenised
        }


@pytest.mark.slow
def test_results_are_written_by_the_first_process_alone(two_by_two):
    assert two_by_two[0]["files"] == ["evaluated/all_results.json", "evaluated/eval_results.json"]
    assert two_by_two[2]["files"] == []  # node 1 has a folder of its own


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_resume_what_each_has_saved(two_by_two):
    hashes = [digest for results in two_by_two for digest in results["resumed"]]
    assert len(hashes) == 12 and len(set(hashes)) == 1  # on both nodes, resumed in the middle, at the end or not

"""The command line: training, resuming, reproducing, comparing; exit codes and messages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.checkpoint.lock import locked
from forgather_fn.cli import COMMANDS, main
from forgather_fn.completion import script
from forgather_fn.config import record as records
from forgather_fn.config.commands import train
from forgather_fn.demo import Settings
from forgather_fn.demo.train import train as train_demo

ROOT = Path(__file__).parent.parent.parent
MINE = """-- extends 'projects/demo.yaml'
[model_args]
    width: 16
    layers: 1
    heads: 2
[trainer_args]
    == super()
    max_steps: 12
    save_steps: 4
"""
FLAGS = ["--text", "text.txt", "--context", "16", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{number} bottles of beer on the wall, " for number in range(99, 0, -1)))
    Path("mine.yaml").write_text(MINE)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; give its exit code and what it wrote."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return command


def fingerprint(out: str) -> str:
    found = re.search(r"^fingerprint: ([0-9a-f]{64})$", out, re.MULTILINE)
    assert found, out
    return found[1]


def test_ten_lines_train_the_same_bits_as_the_demonstration(run):
    code, out, _ = run("train", "mine.yaml", *FLAGS, "--set", "main.save_steps=100")
    settings = Settings(run="demo", data="text.txt", steps=12, width=16, layers=1, heads=2, context=16, batch_size=4)
    assert code == 0
    assert fingerprint(out) == train_demo(settings)


def test_a_run_is_recorded_in_its_directory_and_in_each_checkpoint(run):
    run("train", "mine.yaml", *FLAGS)
    record = records.read("runs/mine")
    assert list(record.templates) == [
        "mine.yaml",
        "projects/demo.yaml",
        "projects/causal_lm.yaml",
        "trainers/plan.yaml",
    ]
    assert record.templates["mine.yaml"] == MINE
    assert record.arguments["main.max_steps"] == 12
    assert record.overrides == {"main.batch_size": "4"}
    assert record.command == ["forgather", "train", "mine.yaml", *FLAGS]
    checkpoints = list_checkpoints("runs/mine")
    assert [entry.step for entry in checkpoints] == [4, 8, 12]
    for entry in checkpoints:
        assert records.read(entry.path) == record


def test_a_run_is_made_again_to_the_bit_from_its_record_alone(run):
    first = fingerprint(run("train", "mine.yaml", *FLAGS)[1])
    Path("mine.yaml").unlink()
    code, out, _ = run("train", "--from", "runs/mine")
    assert (code, fingerprint(out)) == (0, first)
    old, new = records.read("runs/mine"), records.read("runs/mine-again")
    assert (old.templates, old.rendered, old.graph, old.hash) == (new.templates, new.rendered, new.graph, new.hash)
    code, out, _ = run("train", "--from", "runs/mine/checkpoints/checkpoint-4", "--set", "output_dir=runs/b")
    assert (code, fingerprint(out)) == (0, first)
    assert run("config", "diff", "runs/mine", "runs/b") == (0, "", "")


def test_what_was_allowed_once_is_to_be_allowed_again(run, folder, monkeypatch):
    Path("own_models_of_a_user.py").write_text(
        "from forgather_fn.demo.model import Transformer\ndef tiny(): return Transformer(width=8, layers=1, heads=1)\n"
    )
    monkeypatch.syspath_prepend(folder)
    own = ("--set", "main.model=!partial:own_models_of_a_user:tiny []")
    code, _, err = run("train", "mine.yaml", *FLAGS, *own)
    assert (code, "--allow own_models_of_a_user:tiny" in err) == (2, True)
    allowed = ("--allow", "own_models_of_a_user:tiny")
    first = fingerprint(run("train", "mine.yaml", *FLAGS, *own, *allowed)[1])
    code, _, err = run("train", "--from", "runs/mine")
    assert (code, "--allow own_models_of_a_user:tiny" in err) == (2, True)
    assert fingerprint(run("train", "--from", "runs/mine", *allowed)[1]) == first


SCORES = """
import torch
class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
    def forward(self, x, labels):
        scores = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels), "logits": scores}
def make(): return Scores()
def samples(): return [{"x": torch.full((4,), i / 9), "labels": i % 3} for i in range(24)]
"""
CLASSES = """-- extends 'trainers/trainer.yaml'
[model]
.model: &model !partial:own_scores:make []
[datasets]
.train_dataset: &train_dataset !call:own_scores:samples []
.eval_dataset: &eval_dataset ~
.data_collator: &data_collator ~
[trainer_args]
    == super()
    max_steps: 4
    save_steps: 2
    report_to: none
    disable_tqdm: true
"""


def test_the_class_layer_is_trained_recorded_and_made_again(run, folder, monkeypatch):
    Path("own_scores.py").write_text(SCORES)
    Path("classes.yaml").write_text(CLASSES)
    monkeypatch.syspath_prepend(folder)
    assert run("train", "classes.yaml", "--allow", "own_scores")[0] == 0
    record = records.read("runs/classes")
    checkpoints = list_checkpoints("runs/classes")
    assert [entry.step for entry in checkpoints] == [2, 4]
    assert [records.read(entry.path) for entry in checkpoints] == [record, record]
    assert run("train", "classes.yaml", "--allow", "own_scores")[0] == 2  # there is one already
    assert run("train", "--from", "runs/classes", "--allow", "own_scores")[0] == 0
    first, again = (Path(name, "checkpoint-4/model.safetensors") for name in ("runs/classes", "runs/classes-again"))
    assert first.read_bytes() == again.read_bytes()
    code, _, err = run("train", "classes.yaml", "--allow", "own_scores", "--resume", "--max-steps", "6")
    assert (code, "main.args.max_steps: 4 -> 6" in err) == (2, True)
    changed = ("--resume", "--max-steps", "6", "--allow-changes")
    assert run("train", "classes.yaml", "--allow", "own_scores", *changed)[0] == 0
    assert [entry.step for entry in list_checkpoints("runs/classes")][-1] == 6


def test_a_run_that_was_killed_goes_on_to_the_same_bits(run):
    expected = fingerprint(run("train", "mine.yaml", *FLAGS)[1])
    command = [sys.executable, "-m", "forgather_fn", "train", "mine.yaml", *FLAGS, "--set", "output_dir=runs/killed"]
    process = subprocess.Popen(
        [*command, "main.logging_steps=1"], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not list(Path("runs/killed").glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints("runs/killed")
    settings = ("--set", "output_dir=runs/killed", "main.logging_steps=1")
    code, out, _ = run("train", "mine.yaml", *FLAGS, *settings, "--resume")
    assert (code, fingerprint(out)) == (0, expected)


def test_a_run_goes_on_from_a_checkpoint_of_another(run):
    expected = fingerprint(run("train", "mine.yaml", *FLAGS)[1])
    source = "runs/mine/checkpoints/checkpoint-4"
    other = ("train", "mine.yaml", *FLAGS, "--resume", source, "--set", "output_dir=runs/other")
    code, out, _ = run(*other)
    assert (code, fingerprint(out)) == (0, expected)
    assert [entry.step for entry in list_checkpoints("runs/other")] == [8, 12]
    assert run(*other, "main.seed=1")[0] == 2


def test_resuming_what_has_not_begun_begins(run):
    code, out, _ = run("train", "mine.yaml", *FLAGS, "--resume")
    assert (code, "step 12\n" in out) == (0, True)


def test_a_run_is_not_written_over(run):
    run("train", "mine.yaml", *FLAGS)
    code, _, err = run("train", "mine.yaml", *FLAGS)
    assert code == 2
    assert err.startswith("forgather: error: runs/mine holds a run at step 12: --resume goes on with it, --set ")


def test_a_run_that_another_process_writes_to_keeps_its_record(run):
    run("train", "mine.yaml", *FLAGS, "--set", "main.save_steps=100", "main.max_steps=1")
    before = Path("runs/mine/record.json").read_bytes()
    with locked(Path("runs/mine")):
        code, _, err = run("train", "mine.yaml", *FLAGS, "--resume", "--allow-changes")
    assert code == 2
    assert "is being written to by process" in err
    assert Path("runs/mine/record.json").read_bytes() == before


def test_a_changed_configuration_is_shown_and_refused_unless_allowed(run):
    run("train", "mine.yaml", *FLAGS)
    changed = ("train", "mine.yaml", *FLAGS, "--resume", "--set", "main.max_steps=14")
    code, _, err = run(*changed)
    assert code == 2
    assert "  main.max_steps: 12 -> 14\n" in err
    code, out, _ = run(*changed, "--allow-changes")
    assert code == 0
    assert "step 14\n" in out
    assert records.read("runs/mine").arguments["main.max_steps"] == 14
    assert records.read("runs/mine/record-1.json").arguments["main.max_steps"] == 12


def test_an_argument_is_set_by_option_or_path(run):
    code, out, _ = run("-t", "mine.yaml", "construct", "--target", "meta")
    assert (code, "'config_name': 'demo'" in out) == (0, True)
    for arguments in (["--learning-rate", "0.5"], ["--set", "main.learning_rate=5e-1"]):
        for named in (["-t", "mine.yaml", "graph"], ["graph", "mine.yaml"]):
            assert "learning_rate: 0.5\n" in run(*named, *arguments)[1]


def test_what_a_configuration_declares_is_in_the_help(run, capsys):
    with pytest.raises(SystemExit) as exit:
        run("train", "mine.yaml", "--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert re.search(r"--context INT +bytes in a window", out)
    assert "forgather train projects/demo.yaml --set main.max_steps=200" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "which configuration? Name it"),
        ("-t mine.yaml pp mine.yaml", "which configuration: mine.yaml, or -t mine.yaml? Name one"),
        ("train nowhere.yaml", "there is no configuration 'nowhere.yaml': "),
        ("train projects/demos.yaml", "'projects/demos.yaml': did you mean 'projects/demo.yaml'? expected"),
        ("train min.yaml", "there is no configuration 'min.yaml': did you mean 'mine.yaml'?"),
        ("train mine.yaml --set x=1", "no template refers to the variable x"),
        ("train mine.yaml --set contxt=1", "no template refers to the variable contxt: did you mean context?"),
        ("train mine.yaml --set main.max_steps=many", "assembled: max_steps='many': expected an integer"),
        ("train mine.yaml --set main.max_stps=1", "assembled has no argument max_stps: did you mean max_steps?"),
        ("train mine.yaml --set context", "--set context: expected NAME=VALUE"),
        ("train mine.yaml --set context=!call:x", "context=!call:x: a variable takes plain values; it calls x"),
        ("train mine.yaml --set main.model=!call:os:system", "--allow os:system"),
        ("train mine.yaml --from runs/x", "--from takes the configuration from the record"),
        ("train --from runs/x", "cannot read runs/x: No such file"),
        ("train mine.yaml -n 0", "expected a number of processes, at least 1"),
        ("train mine.yaml --grid x", "--grid x: expected NAME=A,B,C"),
        ("train mine.yaml --grid x=1 x=2", "x is there twice"),
        ("train broken.yaml", "'nothing' is undefined; give it with --set nothing=VALUE"),
        ("train untrained.yaml", "main is int: expected a Training"),
        ("-t mine.yaml construct --target zzz", "there is no target 'zzz'"),
        ("-t mine.yaml code --target zzz", "there is no target 'zzz'"),
        ("config show .", "cannot read record.json: No such file"),
        ("runs .", "has no runs of forgather train"),
        ("tb nowhere", "nowhere is not there"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_block(run, arguments, message):
    Path("broken.yaml").write_text("a: 1\n[main]\nmain: {{ nothing }}\n")
    Path("untrained.yaml").write_text("main: 1\n")
    code, _, err = run(*arguments.split())
    assert code == 2
    assert err.startswith("forgather: error: ")
    assert message in err
    assert "Traceback" not in err


def test_an_error_shows_the_line_of_the_template(run):
    Path("broken.yaml").write_text("-- extends 'mine.yaml'\n[trainer_args]\n    == super()\n    max_stps: 3\n")
    _, _, err = run("train", "broken.yaml", *FLAGS)
    assert err.splitlines()[1:] == [
        "  at broken.yaml, line 4, in block trainer_args",
        "    | max_stps: 3",
        "  key main.max_stps",
    ]
    Path("broken.yaml").write_text("-- extends 'mine.yaml'\n[trainer_args]\n    == super()\n    max_steps: !int 3\n")
    _, _, err = run("train", "broken.yaml", *FLAGS)
    assert err.splitlines()[1:] == [
        "  at broken.yaml, line 4, in block trainer_args",
        "    | max_steps: !int 3",
        "  key main.max_steps",
    ]


def test_an_error_shows_the_setting(run):
    _, _, err = run("train", "mine.yaml", *FLAGS, "--set", "main.max_steps=many")
    assert err.splitlines()[1:] == ["  at main.max_steps=many", "  key main.max_steps"]


def test_debug_shows_where_an_error_arose(run):
    with pytest.raises(ValueError, match="there is no configuration"):
        run("train", "nowhere.yaml", "--debug")


def test_each_stage_is_printed(run):
    code, rendered, _ = run("-t", "mine.yaml", "pp")
    assert code == 0
    assert "max_steps: 12" in rendered
    assert rendered.startswith("meta:\n")  # and not with what statements have left
    assert run("pp", "mine.yaml")[1] == rendered
    origins = run("-t", "mine.yaml", "pp", "--origins")[1]
    assert re.search(r"^mine.yaml:8 +\|     max_steps: 12$", origins, re.MULTILINE)
    assert run("-t", "mine.yaml", "targets")[1] == "meta\ndynamic_args\nmain\n"
    assert run("-t", "mine.yaml", "trefs")[1].split() == list(records_templates())
    assert "- `mine.yaml`" in run("-t", "mine.yaml", "trefs", "--format", "md")[1]
    assert run("-t", "mine.yaml", "trefs", "--format", "tree")[1].splitlines() == [
        f"{'  ' * depth}{name}" for depth, name in enumerate(records_templates())
    ]
    assert '  "mine.yaml" -> "projects/demo.yaml";\n' in run("-t", "mine.yaml", "trefs", "--format", "dot")[1]
    compile(run("-t", "mine.yaml", "code")[1], "mine.py", "exec")
    for kind in ("yaml", "python", "repr", "none"):
        assert run("-t", "mine.yaml", "graph", "--format", kind)[0] == 0


def records_templates() -> tuple[str, ...]:
    return "mine.yaml", "projects/demo.yaml", "projects/causal_lm.yaml", "trainers/plan.yaml"


def test_generated_code_trains_the_same_bits(run):
    from forgather_fn.fingerprint import fingerprint as fingerprint_of

    expected = fingerprint(run("train", "mine.yaml", *FLAGS)[1])
    namespace: dict[str, object] = {}
    exec(run("-t", "mine.yaml", "code", *FLAGS)[1], namespace)
    training = namespace["main"](output_dir="runs/code")  # type: ignore[operator]
    assert fingerprint_of(training.train().params) == expected


def test_a_grid_makes_a_run_for_each_combination_and_a_table_compares_them(run):
    grid = ("--grid", "main.learning_rate=1e-3,3e-3", "main.seed=1,2")
    code, out, _ = run("train", "mine.yaml", *FLAGS, *grid, "--set", "output_dir=runs/grid")
    assert code == 0
    assert len(set(re.findall(r"^fingerprint: (\w+)$", out, re.MULTILINE))) == 4
    code, out, _ = run("runs", "runs/grid")
    lines = out.splitlines()
    assert lines[0].split() == ["run", "step", "eval_loss", "learning_rate", "seed"]
    assert {line.split()[0] for line in lines[1:]} == {
        f"learning_rate={rate},seed={seed}" for rate in ("1e-3", "3e-3") for seed in (1, 2)
    }
    losses = [float(line.split()[2]) for line in lines[1:]]
    assert losses == sorted(losses)
    backwards = run("runs", "runs/grid", "--greater")[1].splitlines()
    code, _, err = run("runs", "runs/grid", "--metric", "eval_los")
    assert (code, err.partition(", ")[0]) == (0, "no run has a metric 'eval_los'; they have 'eval_loss'")
    assert backwards[1:] == lines[:0:-1]
    assert run("train", "mine.yaml", *FLAGS, *grid, "--set", "output_dir=runs/grid", "--resume")[0] == 0


def test_a_grid_goes_on_after_a_run_that_failed(run):
    code, out, err = run("train", "mine.yaml", *FLAGS, "--grid", "main.max_steps=0,3")
    assert code == 1
    assert "1 of 2 runs failed: max_steps=0" in err
    assert "step 3\n" in out


@pytest.fixture
def interrupting(monkeypatch):
    """Press Ctrl-C at the first evaluation."""
    monkeypatch.setattr("forgather_fn.demo.train.show", lambda tick: signal.raise_signal(signal.SIGINT))


def test_ctrl_c_ends_a_run_and_is_told_by_the_exit_code(run, interrupting, monkeypatch):
    code, out, err = run("train", "mine.yaml", *FLAGS)
    assert (code, "step 1\nfingerprint: " in out) == (130, True)
    assert err.endswith("forgather: interrupted: runs/mine is saved at step 1; --resume goes on from there\n")
    monkeypatch.setattr("forgather_fn.demo.train.show", lambda tick: None)
    code, out, _ = run("train", "mine.yaml", *FLAGS, "--resume")
    assert (code, "step 12\nfingerprint: " in out) == (0, True)


def test_ctrl_c_ends_a_grid(run, interrupting):
    code, out, err = run("train", "mine.yaml", *FLAGS, "--grid", "main.seed=1,2,3")
    assert (code, re.findall(r"^\d/3", out, re.MULTILINE)) == (130, ["1/3"])
    assert "interrupted: runs/mine/seed=1 is saved at step 1; --resume goes on from there\n" in err
    assert not Path("runs/mine/seed=2").exists()


def written(directory):
    return {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


def test_a_step_of_a_run_is_replayed_from_its_record(run):
    run("train", "mine.yaml", *FLAGS, "--set", "main.logging_steps=1")
    before = written("runs/mine")
    code, out, _ = run("replay", "runs/mine", "--step", "5")
    assert (code, written("runs/mine")) == (0, before)
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 6]
    assert out.startswith('step 5 (the 6th: it is reported in row "step": 6 of metrics.jsonl), from checkpoint-4\n')
    assert f"  loss: {row['loss']!r}\n" in out


def test_a_replay_builds_what_is_allowed(run, folder, monkeypatch):
    Path("models_to_replay.py").write_text(
        "from forgather_fn.demo.model import Transformer\ndef tiny(): return Transformer(width=8, layers=1, heads=1)\n"
    )
    monkeypatch.syspath_prepend(folder)
    allowed = ("--allow", "models_to_replay:tiny")
    run("train", "mine.yaml", *FLAGS, "--set", "main.model=!partial:models_to_replay:tiny []", *allowed)
    code, _, err = run("replay", "runs/mine", "--step", "5")
    assert (code, "--allow models_to_replay:tiny" in err) == (2, True)
    assert run("replay", "runs/mine", "--step", "5", *allowed)[0] == 0


def test_a_replay_of_what_is_not_known_says_what_to_give(run):
    Path("runs/own").mkdir(parents=True)
    code, _, err = run("replay", "runs/own", "--step", "3")
    assert (code, "give --program MODULE:FUNCTION, where FUNCTION(run) gives (program, stream)" in err) == (2, True)
    code, _, err = run("replay", "runs/own", "--step", "3", "--allow", "x:y")
    assert (code, "--allow x:y: runs/own is not made again from the record" in err) == (2, True)


MODELS = """
import torch
from forgather_fn.demo.model import Transformer
class Exhausting(Transformer):
    def forward(self, *args, **kwargs): raise torch.OutOfMemoryError("out of memory")
def small(fails: bool): return (Exhausting if fails else Transformer)(width=8, layers=1, heads=1)
"""


def test_a_grid_goes_on_after_a_run_that_ran_out_of_memory(run, folder, monkeypatch):
    Path("models_that_fail.py").write_text(MODELS)
    monkeypatch.syspath_prepend(folder)
    model = ("--set", "main.model=!partial:models_that_fail:small {fails: false}", "--allow", "models_that_fail:small")
    code, out, err = run("train", "mine.yaml", *FLAGS, *model, "--grid", "main.model.fails=true,false")
    assert code == 1
    assert "Traceback" in err
    assert "OutOfMemoryError: out of memory" in err
    assert "1 of 2 runs failed: fails=true" in err
    assert "step 12\n" in out


def test_a_grid_of_several_processes_ends_where_one_of_them_fails(run, monkeypatch):
    def failing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("one process alone")

    monkeypatch.setattr(train, "start", failing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one process alone"):
        run("train", "mine.yaml", *FLAGS, "--grid", "main.seed=1,2")


ESCAPES = """\
"\\e[31mred": 1
meta: {config_description: "a\\e[2Jb"}
dynamic_args: {x: {help: "c\\e[2Jd"}}
"""


@pytest.mark.parametrize(
    "command", ["targets red.yaml", "ls", "ls -r", "graph red.yaml", "trefs red.yaml", "pp red.yaml"]
)
def test_what_a_configuration_says_does_nothing_to_a_terminal(run, command):
    Path("red.yaml").write_text(ESCAPES)
    Path("project").mkdir()
    Path("project/meta.yaml").write_text('name: "e\\e[2Jf"\n')
    code, out, err = run(*command.split())
    assert code == 0
    assert "\x1b" not in out + err


def test_what_a_configuration_says_of_its_options_does_nothing_to_a_terminal(run, capsys):
    Path("red.yaml").write_text(ESCAPES)
    with pytest.raises(SystemExit):
        run("graph", "red.yaml", "--help")
    assert r"c\x1b[2Jd" in capsys.readouterr().out
    Path("red.yaml").write_text('dynamic_args: {x: {names: "--\\e[2J"}}\n')
    assert run("graph", "red.yaml")[0] == 2


def test_records_are_shown_and_compared(run):
    run("train", "mine.yaml", *FLAGS)
    run("train", "mine.yaml", *FLAGS, "--set", "output_dir=runs/b", "main.seed=1")
    code, out, _ = run("config", "show", "runs/mine")
    assert code == 0
    assert f"hash           {records.read('runs/mine').hash}" in out
    for part in ("arguments", "rendered", "graph", "templates", "command"):
        assert run("config", "show", "runs/mine", "--part", part)[1]
    assert run("config", "diff", "runs/mine", "runs/b")[:2] == (1, "main.seed: - -> 1\n")
    assert run("config", "diff", "runs/mine")[0] == 0
    Path("mine.yaml").write_text(MINE.replace("max_steps: 12", "max_steps: 13"))
    assert run("config", "diff", "runs/mine")[:2] == (1, "main.max_steps: 12 -> 13\n")


def test_configurations_are_listed(run):
    Path("broken.yaml").write_text("a: {{ nothing }}\n")
    code, out, _ = run("ls")
    assert code == 0
    assert re.search(r"  mine.yaml +A small language model", out)
    assert re.search(r"  broken.yaml +\(cannot be read: 'nothing' is undefined", out)
    assert "projects/causal_lm.yaml" in out


def test_several_processes_are_launched(run, monkeypatch):
    started = []

    def record(script, processes, *, module):
        started.append((script, processes, module))
        return 7

    monkeypatch.setattr("forgather_fn.distributed.cli.launch", record)
    code, _, err = run("train", "mine.yaml", "-n", "2", "--resume")
    assert (code, started) == (2, [])
    assert ".strategy: &strategy !partial:forgather_fn:accelerated []" in err
    with Path("mine.yaml").open("a") as file:
        file.write("[distributed_env]\n.strategy: &strategy !partial:forgather_fn:accelerated []\n")
    assert run("train", "mine.yaml", "-n", "2", "--resume")[0] == 7
    assert started == [(["forgather_fn", "train", "mine.yaml", "--resume"], 2, True)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(run, shell):
    code, out, _ = run("completion", shell)
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert "resume" in out


def test_the_script_for_bash_completes():
    text = script("bash", {"train": ["--resume", "--set"], "ls": ["--recursive"]})
    probe = f'{text}\nCOMP_WORDS=(forgather train --re); COMP_CWORD=2; _forgather; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "--resume\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_about_configurations_shows_an_example(name, capsys):
    if "config" not in COMMANDS[name][1]:
        pytest.skip("another part's")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert re.search(rf"examples?:\s+forgather .*{name}", capsys.readouterr().out)


def test_a_reader_that_has_read_enough_is_no_error(folder):
    Path("long.yaml").write_text("".join(f"key{i}: {'x' * 90}\n" for i in range(3_000)))  # more than a pipe holds
    command = f"{sys.executable} -m forgather_fn -t long.yaml pp | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {code} +\S", out, re.MULTILINE) for code in (0, 1, 2, 75, 130))

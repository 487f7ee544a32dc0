"""What a user names on the command line may lie beside them."""

import sys

import pytest

from forgather_fn.cli import main
from forgather_fn.config import ConfigError, build, parse
from forgather_fn.importing import import_named

MINE = """
from torch import nn


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def rebuilt(run):
    raise ValueError(f"rebuilt was asked for {run.name}")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, request):
    """Write a module into the current directory, from where an installed command does not import by itself."""
    name = f"mine_{request.node.name.replace('[', '_').rstrip(']')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield name
    sys.modules.pop(name, None)


def test_a_module_of_the_current_directory_is_found(mine):
    assert import_named(mine).__name__ == mine


def test_what_is_installed_comes_first(mine, tmp_path):
    import_named(mine)
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1


@pytest.mark.parametrize("allowed", ["", ":model"], ids=["package", "name"])
def test_a_configuration_builds_what_is_allowed_from_there(mine, allowed):
    assert len(build(parse(f"main: !call:{mine}:model []"), allow=[f"{mine}{allowed}"])) == 2


def test_what_is_not_allowed_is_not_looked_for_there(mine, tmp_path):
    with pytest.raises(ConfigError, match=f"add --allow {mine}:model"):
        build(parse(f"main: !call:{mine}:model []"))
    assert mine not in sys.modules
    build(parse("main: !call:torch.nn:Linear [1, 1]"), allow=[mine])  # a name of the registry
    assert str(tmp_path) not in sys.path


def test_a_pipeline_is_explained_of_a_model_from_there(mine, capsys):
    assert main(["pipeline", "explain", f"{mine}:model", "--stages", "2"]) == 0
    assert "2 stages" in capsys.readouterr().out


def test_a_replay_asks_a_function_from_there(mine, capsys):
    assert main(["replay", "runs/a", "--step", "3", "--program", f"{mine}:rebuilt"]) == 2
    assert capsys.readouterr().err == "forgather: error: rebuilt was asked for a\n"

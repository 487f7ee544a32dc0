"""Projects and workspaces: where templates are found, and what needs to be allowed."""

import sys
from pathlib import Path

import pytest

from forgather_fn.cli import main
from forgather_fn.config import ConfigError
from forgather_fn.config.load import load
from forgather_fn.config.project import find


@pytest.fixture
def project(tmp_path):
    work, here = tmp_path / "work", tmp_path / "work/projects/one"
    (work / "forgather_workspace").mkdir(parents=True)
    (work / "forgather_workspace/defaults.yaml").write_text(
        "name: unnamed\n[search]\nsearchdir:\n    - templates\n    - {{ workspace_root }}/shared\n"
    )
    (work / "shared").mkdir()
    (work / "shared/base.yaml").write_text("[main]\nmain: {dir: {{ project_dir | toyaml }}, lr: 1}\n")
    (here / "templates/configs").mkdir(parents=True)
    (here / "meta.yaml").write_text(
        "-- extends 'defaults.yaml'\n[search]\n== super()\nname: One\ndefault_config: a.yaml\n"
    )
    (here / "templates/configs/a.yaml").write_text("-- extends 'base.yaml'\n")
    (here / "templates/configs/b.yaml").write_text("-- extends 'base.yaml'\n[main]\n== super()\nmeta: 1\n")
    return here


def test_a_project_says_where_its_templates_are(project):
    found = find(project / "templates")
    assert found is not None
    assert (found.name, found.default, list(found.configurations())) == (
        "One",
        "a.yaml",
        ["configs/a.yaml", "configs/b.yaml"],
    )
    assert found.search_path[:2] == (project / "templates", project.parent.parent / "shared")


@pytest.mark.parametrize("name", ["a", "a.yaml", "configs/a.yaml", ""])
def test_a_configuration_is_found_by_name_or_default(project, name):
    assert load(name, project_dir=project).build("main", []) == {"dir": str(project), "lr": 1}


def test_a_file_of_a_project_sees_its_templates(project):
    path = project / "templates/configs/b.yaml"
    assert load(str(path)).build("main", [])["lr"] == 1


def test_a_folder_without_a_project_has_none(tmp_path):
    (tmp_path / "forgather_workspace").mkdir()
    (tmp_path / "inside").mkdir()
    assert find(tmp_path / "inside") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("nme: x\n", "'nme' is not known"), ("searchdir: 3\n", "searchdir is 3, a int"), ("a: [", "not valid")],
)
def test_what_a_project_says_is_checked(tmp_path, text, message):
    (tmp_path / "meta.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find(tmp_path)


def test_a_search_path_for_python_has_to_be_allowed(project, monkeypatch):
    (project / "lib").mkdir()
    (project / "lib/own_module_of_a_project.py").write_text("def make(): return 3\n")
    with (project / "meta.yaml").open("a") as file:
        file.write("system_path: [lib]\n")
    (project / "templates/configs/c.yaml").write_text("main: !call:own_module_of_a_project:make []\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = load("c", project_dir=project)
    with pytest.raises(ConfigError, match="--allow system_path"):
        loaded.build("main", ["own_module_of_a_project:make"])
    assert str(project / "lib") not in sys.path
    assert loaded.build("main", ["system_path", "own_module_of_a_project:make"]) == 3


@pytest.fixture
def outside(project):
    """Put a file beside the workspace; the project's templates refer to it by name."""
    elsewhere = project.parents[2] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "private.txt").write_text("a secret\n")
    (project / "templates/configs/d.yaml").write_text("main: {% include 'private.txt' %}\n")
    return elsewhere


@pytest.mark.parametrize(
    "searchdir", ["[/]", "[templates, ../../../elsewhere]", "[link]", "['{{ project_dir }}/../../..']"]
)
def test_a_search_path_outside_of_the_workspace_has_to_be_allowed(project, outside, searchdir):
    (project / "link").symlink_to(outside)
    (project / "meta.yaml").write_text(f"searchdir: {searchdir}\n")
    with pytest.raises(ConfigError, match=r"outside of the project and its workspace.*add --allow searchdir"):
        load("d", project_dir=project)
    found = find(project, ["searchdir"])
    assert found is not None
    assert len(found.search_path) > 1


def test_a_template_outside_is_found_where_that_is_allowed(project, outside):
    (project / "meta.yaml").write_text("searchdir: [templates, ../../../elsewhere]\n")
    loaded = load("d", project_dir=project, allow=["searchdir"])
    assert loaded.build("main", ["searchdir"]) == "a secret"


def test_a_workspace_that_is_a_link_does_not_lead_out(tmp_path, outside):
    evil = tmp_path / "unpacked/evil"
    (evil / "templates").mkdir(parents=True)
    (tmp_path / "unpacked/forgather_workspace").symlink_to(outside)
    (evil / "meta.yaml").write_text("name: {% include 'private.txt' %}\n")
    with pytest.raises(ConfigError, match=r"elsewhere, outside of the project.*add --allow searchdir"):
        find(evil)
    found = find(evil, ["searchdir"])
    assert found is not None
    assert found.name == "a secret"


@pytest.mark.parametrize("name", ["config_prefix", "default_config"])
@pytest.mark.parametrize("place", ["{outside}", "{outside}/private.txt", "../../../elsewhere"])
def test_a_project_names_configurations_in_its_search_path_only(project, outside, name, place):
    (project / "meta.yaml").write_text(f"{name}: {place.format(outside=outside)}\n")
    with pytest.raises(ConfigError, match=f"{name} is '.*': expected a path below a folder of searchdir"):
        load("", project_dir=project)


def test_commands_that_look_take_the_folders_that_are_allowed(project, outside, capsys):
    (project / "meta.yaml").write_text("searchdir: [templates, ../../../elsewhere]\n")
    named = ["-p", str(project), "pp", "d"]
    assert main(named) == 2
    assert "--allow searchdir" in capsys.readouterr().err
    assert main([*named, "--allow", "searchdir"]) == 0
    assert "a secret" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*named, "--allow", "torch:load"])  # which would do nothing there


def test_a_project_that_cannot_be_used_does_not_end_a_list(project, outside, capsys):
    (project / "meta.yaml").write_text("searchdir: [/]\n")
    (project.parent / "two").mkdir()
    (project.parent / "two/meta.yaml").write_text("name: Second\n")
    assert main(["ls", "-r", "-p", str(project.parent)]) == 0
    out = capsys.readouterr().out
    assert f"{project}: cannot be read: {project}/meta.yaml: templates are looked for in /, outside" in out
    assert "two: Second" in out


def test_output_dir_is_always_there(tmp_path):
    (tmp_path / "x.yaml").write_text("main: [!var output_dir, {{ output_dir }}]\n")
    assert load(str(tmp_path / "x.yaml")).build("main", []) == [str(Path("runs/x"))] * 2
    assert load(str(tmp_path / "x.yaml"), {"output_dir": "o"}).build("main", []) == ["o", "o"]

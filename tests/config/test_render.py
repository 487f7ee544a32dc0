"""Rendering: inheritance, parts, functions, and the positions of what goes wrong."""

import threading
from pathlib import Path

import pytest

from forgather_fn.config import ConfigError, parse, render
from forgather_fn.config.text import Text, joined, stripped

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.yaml")))
def test_a_configuration_renders_to_the_golden_text(name):
    variables = {"max_steps": 7} if name == "variables" else {}
    text = render(f"{name}.yaml", [GOLDEN], variables, clock=lambda: 0.0, environ={"HOME": "/h", "USER": "u"})
    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_golden_configuration_has_its_text():
    assert len(list(GOLDEN.glob("*.yaml"))) >= 5
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {path.stem for path in GOLDEN.glob("*.txt")}


def test_each_line_knows_where_it_came_from():
    text = render("wide.yaml", [GOLDEN])
    found = {
        line.strip(): (at.template, at.line, at.block) for line, at in zip(text.split("\n"), text.origins, strict=True)
    }
    assert found["lr: 1e-5"] == ("base/run.yaml", 12, "optimizer")
    assert found["weight_decay: 0.1"] == ("wide.yaml", 9, "optimizer")
    assert found["max_steps: 200"] == ("wide.yaml", 17, "trainer_args")
    assert {origin.text.strip() for origin in text.origins} >= {"lr: 1e-5"}


def test_the_templates_that_were_used_are_kept():
    text = render("wide.yaml", [GOLDEN])
    assert sorted(text.templates) == ["base/run.yaml", "base/trainer.yaml", "wide.yaml"]
    assert text.templates["wide.yaml"] == (GOLDEN / "wide.yaml").read_text()
    assert {"max_steps", "ns"} <= text.variables
    assert text.references == (
        ("wide.yaml", "base/run.yaml"),
        ("wide.yaml", "wide.yaml#wide.trainer"),
        ("wide.yaml#wide.trainer", "base/trainer.yaml"),
    )


@pytest.mark.parametrize(
    ("template", "message", "line"),
    [
        ("a: 1\nb: {{ stepz }}", "'stepz' is undefined; did you mean 'steps'?", 2),
        ("a: 1\nb: {{ zzz }}", "'zzz' is undefined; give it with --set zzz=VALUE, or in the template", 2),
        ("a: 1\n-- set x =\n", "not a valid template: ", 2),
        ("a: 1\n-- endfor\n", "not a valid template: ", 2),
        ("a: 1\n-- include 'nowhere.yaml'\n", "template 'nowhere.yaml' was not found; searched:", 2),
        ("a: {{ 1 / 0 }}", "ZeroDivisionError: division by zero", 1),
        ("\n\n-- do raise('too bad')\n", "too bad", 3),
        ("-- do assert(steps > 5, 'more steps')\n", "more steps", 1),
        ("a: 1\nb: {{ steps.real.nothing }}", "has no attribute 'nothing'", 2),
        ("a: {{ steps | nofilter }}\n", "not a valid template: No filter named 'nofilter'", 1),
    ],
)
def test_an_error_says_where(template, message, line):
    with pytest.raises(ConfigError) as error:
        render(template, variables={"steps": 3})
    assert message in error.value.problem
    assert error.value.position.line == line
    assert f"at <template>, line {line}" in str(error.value)


CHILD = """-- extends 'projects/demo.yaml'

[model_args]
    width: 16
[trainer_args]
    == super()
    max_steps: 12
"""


@pytest.mark.parametrize(
    ("was", "now", "message", "line"),
    [
        ("[trainer_args]", "[trainer_arg]", "has a block [trainer_arg]: did you mean [trainer_args]?", 5),
        ("[trainer_args]", "[nothing_like_it]", "has a block [nothing_like_it]: there are [config_metadata] ", 5),
        ("[model_args]", "[model_args]:", "a block begins with [model_args] alone on its line", 3),
        ("[model_args]", "[model-args]", "a block begins with [model_args] alone on its line", 3),
        ("[trainer_args]", "[trainer_args]:", "a block begins with [trainer_args] alone on its line", 5),
        ("[trainer_args]", "[trainer_args] # mine", "a block begins with [trainer_args] alone on its line", 5),
        ("[model_args]", "x: 1", "a template that extends another consists of blocks", 3),
        ("[model_args]", "-- if true\n== 1 + 1\n-- endif", "a template that extends another consists of blocks", 4),
        ("[model_args]", "--set x = 1\n[model_args]", "a marker is followed by a blank: '-- set x = 1'", 3),
        ("-- extends", "--extends", 'this extends nothing; a marker is followed by a blank: "-- extends ', 1),
    ],
)
def test_what_a_child_says_is_never_dropped(was, now, message, line):
    with pytest.raises(ConfigError) as error:
        parse(render(CHILD.replace(was, now, 1)))
    assert message in error.value.problem
    assert error.value.position.line == line


def test_a_block_that_no_parent_has_is_told_before_what_follows_from_it(tmp_path):
    (tmp_path / "base.yaml").write_text("[model]\n-- do raise('give a [model]')\n")
    (tmp_path / "leaf.yaml").write_text("-- extends 'base.yaml'\n[modle]\nx: 1\n")
    with pytest.raises(
        ConfigError, match=r"did you mean \[model\]\? \(base.yaml\)\n  at leaf.yaml, line 2, in block modle"
    ):
        render("leaf.yaml", [tmp_path])
    (tmp_path / "base.yaml").write_text("-- do raise('first')\n-- extends 'root.yaml'\n")
    with pytest.raises(ConfigError, match=r"^first"):  # it is not known yet which blocks there are
        render("leaf.yaml", [tmp_path])


def test_a_block_of_a_part_has_the_line_of_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("[a]\nx: 1\n")
    (tmp_path / "leaf.yaml").write_text("-- include 'p'\n#--- p ---\n-- extends 'base.yaml'\n[a]\nx: 2\n[b]\n")
    with pytest.raises(ConfigError, match=r"has a block \[b\].*\n  at leaf.yaml, line 6, in block b"):
        render("leaf.yaml", [tmp_path])


def test_blocks_that_are_taken_are_no_error(tmp_path):
    (tmp_path / "root.yaml").write_text("[a]\nx: 1\n")
    (tmp_path / "base.yaml").write_text("-- extends 'root.yaml'\n[a]\nx: 2\n    [inner]\n    y: 2\n")
    (tmp_path / "leaf.yaml").write_text("-- extends 'base.yaml'\n# of YAML: {{ 1 }}\n## none\n[inner]\n    y: 3\n")
    assert render("leaf.yaml", [tmp_path]) == "x: 2\n    y: 3\n"
    called = "-- extends 'root.yaml'\n{% block a %}{{ self.own() }}{% endblock %}\n{% block own %}x: 4{% endblock %}\n"
    assert render(called, [tmp_path]) == "x: 4"
    either = "-- if leaf\n-- extends 'root.yaml'\n-- endif\n[a]\nx: 5\n"
    assert render(either, [tmp_path], {"leaf": True}) == render(either, [tmp_path], {"leaf": False}) == "x: 5\n"


def test_super_without_a_parent_says_what_it_is():
    with pytest.raises(
        ConfigError, match=r"block called 'a': super\(\) is its text in the template that this one extends"
    ):
        render("[a]\n== super()\n")


def test_an_error_in_a_part_has_the_line_of_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("-- include 'p.part'\n#---- p.part ----\nx: 1\ny: {{ zzz }}\n")
    with pytest.raises(ConfigError) as error:
        render(tmp_path / "a.yaml")
    assert (error.value.position.template, error.value.position.line) == ("a.yaml", 4)
    (tmp_path / "a.yaml").write_text("-- include 'p.part'\n#---- p.part ----\nx: 1\n-- if\n")
    with pytest.raises(ConfigError) as error:
        render(tmp_path / "a.yaml")
    assert (error.value.position.template, error.value.position.line) == ("a.yaml", 4)


def test_a_part_is_found_in_its_own_file_first(tmp_path):
    (tmp_path / "base.yaml").write_text("[a]\n-- include 'p'\n[b]\n[c]\n#--- p ---\nfrom: base\n")
    (tmp_path / "leaf.yaml").write_text("-- extends 'base.yaml'\n[b]\n-- include 'p'\n#--- p ---\nown: leaf\n")
    assert render("leaf.yaml", [tmp_path]) == "from: base\nown: leaf\n"
    assert render("leaf.yaml", [tmp_path]) == "from: base\nown: leaf\n"  # nothing is kept from the first time


def test_a_part_of_two_other_files_is_ambiguous(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"x{name}: 1\n#--- p ---\nfrom: {name}\n")
    with pytest.raises(ConfigError, match=r"'p' could be any of one.yaml#p, two.yaml#p"):
        render("-- include 'one.yaml'\n-- include 'two.yaml'\n-- include 'p'\n", [tmp_path])


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1")
    assert render("a.yaml", [tmp_path]) == "x: 1"
    (tmp_path / "a.yaml").write_text("x: 2")
    assert render("a.yaml", [tmp_path]) == "x: 2"


def test_the_parent_may_be_computed(tmp_path):
    (tmp_path / "base.yaml").write_text("[a]\nx: 1\n")
    assert render(
        "-- set ns = namespace(parent='base.yaml')\n-- extends ns.parent\n[a]\n== super()\ny: 2\n", [tmp_path]
    ) == ("x: 1\n\ny: 2\n")


@pytest.mark.parametrize("name", ["../secret.yaml", "/etc/passwd", "sub/../../secret.yaml", "link.yaml", ""])
def test_includes_stay_inside_the_search_path(tmp_path, name):
    (tmp_path / "secret.yaml").write_text("secret: 1")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/link.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(ConfigError, match=r"search path|was not found"):
        render(f"-- include '{name}'\n", [tmp_path / "templates"])


def test_time_stands_still_during_a_rendering():
    template = "{{ utcisotime() }} {{ utcfiletime() }} {{ utcnow().year }}"
    assert render(template, clock=lambda: 86400.0) == "1970-01-02T00:00:00 1970-01-02T00-00-00 1970"


def test_functions_and_filters():
    template = "{{ joinpath('a', 'b') }} {{ basename('/x/y.z') }} {{ splitext('y.z')[1] }} {{ getenv('A', 'b') }}"
    assert render(template, environ={}) == "a/b y.z .z b"
    assert render("{{ repr('x') }} {{ relpath('/a/b', '/a') }} {{ dirname('/a/b') }}") == "'x' b /a"
    assert render("{{ modname_from_path('/a/b.py') }} {{ normpath('a/../b') }} {{ versions.python[:2] }}") == "b b 3."
    assert render("a: {{ none | toyaml }}\nb: {{ nothing | toyaml('no') }}\nc: {{ [1, 'x'] | toyaml }}") == (
        "a: null\nb: 'no'\nc: [1, x]"
    )


def test_formats_that_are_small_are_formatted():
    assert render("{{ 'run-{}-2024010112' .format(1) }} {{ '{{{}}}'.format(2) }} {{ '%05d-1000000' % 3 }}") == (
        "run-1-2024010112 {2} 00003-1000000"
    )
    assert render("{{ '%s' | format('x') }} {{ '{:>4}'.format(1) }} {{ 50 % 7 }}") == "x    1 1"


def test_secrets_that_were_looked_up_are_known():
    text = render("a: {{ getenv('HF_TOKEN') }} {{ getenv('HOME') }}", environ={"HF_TOKEN": "hush", "HOME": "/h"})
    assert text.secrets == {"hush"}


def test_rendering_is_safe_in_threads():
    found = []
    threads = [threading.Thread(target=lambda: found.append(render("wide.yaml", [GOLDEN]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_origins_go_with_the_lines():
    a, b = render("x: 1\ny: 2\n"), render("z: 3")
    assert [origin.line for origin in joined([a, b]).origins] == [1, 2, 1]
    assert [origin.text for origin in joined(["  ", b, "\n", a]).origins] == ["z: 3", "x: 1", "y: 2", ""]
    assert [origin.line for origin in stripped(render("\n\nx: 1\ny\n\n"), "\n").origins] == [3, 4]  # type: ignore[attr-defined]
    assert isinstance(a, Text)

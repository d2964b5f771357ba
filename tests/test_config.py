from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import deepspec
import objectives_page
from deepspec.config import OptimConfig, Recipe, dump_recipe, load_recipe
from deepspec.errors import RecipeError
from deepspec.recipe_files import recipe_names

PACKAGE = Path(deepspec.__file__).parent
ROOT = PACKAGE.parent.parent

MINIMAL = """
name: mine
algorithm: dflash
draft: {num_layers: 2, block: 7}
optim: {max_steps: 10}
"""


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(name_or_path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    return str(caught.value)


# ---- shipped recipes


POCKET = [name for name in recipe_names() if "/" not in name]


def test_the_pocket_recipes_ship_and_bases_are_not_offered():
    assert POCKET == ["pocket-dflash", "pocket-dspark", "pocket-eagle3", "pocket-eagle3-portable"]
    assert not [name for name in recipe_names() if name.split("/")[-1].startswith("_")]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_under_its_own_name(name):
    recipe = load_recipe(name, ["target=some/model"] if name.endswith(("/generic", "/small")) else [])
    assert recipe.name == name.replace("/", "-")
    assert recipe.algorithm in name


def test_shipped_recipes_differ_in_nothing_but_the_algorithm():
    trees = [load_recipe(name).model_dump(exclude={"name", "algorithm", "draft", "loss"}) for name in POCKET]
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("kind", ["pocket-{}", "{}/small"])
def test_losses_of_short_trainings_are_those_that_won_in_every_domain(kind: str):
    for algorithm, objective in objectives_page.RECIPES.items():
        setting = objectives_page.SETTINGS[objective].strip("`").split()
        loss = load_recipe(kind.format(algorithm), ["target=pocket"]).loss
        assert loss.terms() == load_recipe("pocket-dflash", setting).loss.terms()
        assert loss.positions == ("survival" if "survival" in objective else "decay")


def test_every_data_file_is_in_the_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["deepspec"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    hidden = {"__pycache__"}
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py" and not hidden & set(p.parts)}
    assert {str(path.relative_to(PACKAGE)) for path in files - packed} == set()
    assert PACKAGE / "recipes" / "_pocket.yaml" in packed


# ---- resolving and merging


def test_path_and_overrides_and_yaml_floats_without_a_dot(tmp_path):
    recipe = load_recipe(
        written(tmp_path, MINIMAL), ["optim.lr=1e-3", "seed=4", "draft.target_layer_ids=[-1, 3]"]
    )
    assert (recipe.optim.lr, recipe.seed, recipe.draft.target_layer_ids) == (1e-3, 4, [-1, 3])
    assert recipe.optim.max_steps == 10  # its neighbours stay


def test_later_overrides_win(tmp_path):
    assert load_recipe(written(tmp_path, MINIMAL), ["seed=1", "seed=2"]).seed == 2


def test_override_with_null_takes_a_limit_away():
    recipe = load_recipe("pocket-dspark", ["optim.max_minutes=null", "optim.max_steps=5"])
    assert (recipe.optim.max_minutes, recipe.optim.max_steps) == (None, 5)


def test_extending_a_shipped_recipe_merges_mappings_and_replaces_lists(tmp_path):
    path = written(
        tmp_path,
        "extends: pocket-dspark\nname: mine\ntrackers: [none]\n"
        "optim: {lr: 1.0e-4}\ndraft: {markov_rank: 8}\n",
    )
    recipe, base = load_recipe(path), load_recipe("pocket-dspark")
    assert recipe == base.model_copy(
        update={
            "name": "mine",
            "trackers": ["none"],
            "optim": base.optim.model_copy(update={"lr": 1e-4}),
            "draft": base.draft.model_copy(update={"markov_rank": 8}),
        }
    )


def test_several_bases_are_laid_over_each_other_in_their_order(tmp_path):
    written(tmp_path, MINIMAL + "seed: 1\n", "a.yaml")
    written(tmp_path, "seed: 2\noptim: {lr: 1.0e-3}\n", "b.yaml")
    recipe = load_recipe(written(tmp_path, "extends: [a.yaml, b.yaml]\nnum_anchors: 5\n", "c.yaml"))
    assert (recipe.seed, recipe.optim.lr, recipe.optim.max_steps, recipe.num_anchors) == (2, 1e-3, 10, 5)
    assert load_recipe(written(tmp_path, "extends: [b.yaml, a.yaml]\n", "d.yaml")).seed == 1


def test_fault_in_one_of_several_bases_names_that_base(tmp_path):
    written(tmp_path, MINIMAL, "a.yaml")
    written(tmp_path, "optim: {lr: -1}\n", "b.yaml")
    text = refusal(written(tmp_path, "extends: [a.yaml, b.yaml]\n", "c.yaml"))
    assert text.split("where: ")[1] == str(tmp_path / "b.yaml")


@pytest.mark.parametrize("bases", ["3", "[a.yaml, 3]", "{a: b}"])
def test_extends_that_names_no_recipe_is_refused(tmp_path, bases):
    assert "`extends` takes names or paths" in refusal(written(tmp_path, f"extends: {bases}\n"))


def test_shipped_name_with_a_folder_wins_over_a_path_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "dspark").mkdir()
    (tmp_path / "dspark" / "qwen3-4b").write_text(MINIMAL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("dspark/qwen3-4b").target == "Qwen/Qwen3-4B"


def test_misspelt_name_with_a_folder_gives_the_nearest(tmp_path):
    assert "did you mean dspark/qwen3-4b?" in refusal("dspark/qwen3-4")
    assert "did you mean dspark/generic?" in refusal("dspark-generic")


def test_extends_resolves_paths_from_the_file_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    written(tmp_path, MINIMAL, "base.yaml")
    child = written(tmp_path / "deep", "extends: ../base.yaml\nseed: 3\n", "child.yaml")
    monkeypatch.chdir("/")
    assert (load_recipe(child).name, load_recipe(child).seed) == ("mine", 3)


def test_recipes_that_extend_each_other_end_in_an_error(tmp_path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    written(tmp_path, "extends: a.yaml\n", "b.yaml")
    text = refusal(tmp_path / "a.yaml")
    assert "circle" in text
    assert text.index("a.yaml") < text.index("b.yaml")


def test_resolved_recipe_loads_back_to_itself(tmp_path):
    for name in POCKET:
        recipe = load_recipe(name, ["seed=9", "draft.target_layer_ids=[0, 2]"])
        dump_recipe(recipe, tmp_path / "run" / "recipe.yaml")
        assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_recipe_cannot_change_under_a_running_job():
    with pytest.raises(Exception, match="frozen"):
        load_recipe("pocket-dflash").seed = 1


# ---- refusals: file, key path, nearest key


def test_unknown_key_names_file_key_path_and_nearest_key(tmp_path):
    path = written(tmp_path, MINIMAL.replace("max_steps", "max_step"))
    text = refusal(path)
    assert "unknown key `optim.max_step`; did you mean `optim.max_steps`?" in text
    assert f"where: {path}" in text


def test_unknown_key_in_a_base_names_the_base(tmp_path):
    written(tmp_path, MINIMAL + "tresholds: 1\n", "base.yaml")
    child = written(tmp_path, "extends: base.yaml\n", "child.yaml")
    where = refusal(child).split("where: ")[1]
    assert where == str(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=1", "`lr`; did you mean `optim.lr`?"),  # right name, wrong mapping
        ("optim.num_layers=1", "`optim.num_layers`; did you mean `draft.num_layers`?"),
        ("draft.markov_rnk=1", "`draft.markov_rnk`; did you mean `draft.markov_rank`?"),
        ("algoritm=dflash", "`algoritm`; did you mean `algorithm`?"),
    ],
)
def test_nearest_key_is_looked_for_in_the_whole_tree(override, expected):
    text = refusal("pocket-dspark", override)
    assert f"unknown key {expected}" in text
    assert f"where: override {override}" in text


def test_unknown_key_far_from_everything_suggests_nothing():
    assert "unknown key `zzz`\n" in refusal("pocket-dspark", "zzz=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=-1", "`optim.lr` is -1: input should be greater than 0"),
        ("optim.lr=.nan", "`optim.lr` is nan"),
        ("draft.block=many", "`draft.block` is 'many'"),
        ("draft.target_layer_ids=[0, -2]", "`draft.target_layer_ids[1]` is -2"),
        ("draft=3", "`draft` is 3, but it must be a mapping of keys"),
        ("precision=bfloat", "did you mean 'bfloat16'?"),
        ("trackers=[tensorbord]", "did you mean 'tensorboard'?"),
        ("name=../escape", "`name` is '../escape'"),
    ],
)
def test_value_out_of_range_names_key_and_value(override, expected):
    assert expected in refusal("pocket-dspark", override)


def test_all_problems_are_told_at_once():
    text = refusal("pocket-dspark", "optim.lr=-1", "seeds=2")
    assert "`optim.lr` is -1" in text
    assert "unknown key `seeds`" in text


def test_missing_key_is_named(tmp_path):
    path = written(tmp_path, MINIMAL.replace("name: mine", ""))
    assert refusal(path).startswith("`name` is missing\n")


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("pocket-dflash", ["draft.markov_rank=8"], "`draft.markov_rank` must be 0 for dflash"),
        (
            "pocket-dflash",
            ["draft.confidence=true", "loss.confidence=1"],
            "`draft.confidence` must be false for dflash",
        ),
        ("pocket-eagle3", ["draft.num_layers=2"], "`draft.num_layers` must be 1 for eagle3, not 2"),
        ("pocket-eagle3", ["loss.kl=0.5"], "set one of `loss.ce` and `loss.kl` for eagle3"),
        ("pocket-eagle3", ["loss.positions=dpace"], "`loss.positions` cannot be dpace for eagle3"),
        (
            "pocket-dspark",
            ["draft.markov_rank=0", "draft.confidence=false", "loss.confidence=0"],
            "without both it is dflash",
        ),
        ("pocket-dspark", ["draft.markov_rank=0"], "`draft.confidence_with_markov` needs"),
        ("pocket-dspark", ["loss.confidence=0"], "`draft.confidence` and `loss.confidence` go together"),
        ("pocket-dflash", ["loss.confidence=1"], "`draft.confidence` and `loss.confidence` go together"),
        ("pocket-dflash", ["loss.ce=0"], "so the draft would learn no tokens"),
        ("pocket-dflash", ["draft.target_layer_ids=[3, 3]"], "strictly increasing order, not [3, 3]"),
        ("pocket-dflash", ["draft.target_layer_ids=[]"], "strictly increasing order, not []"),
        ("pocket-dflash", ["optim.max_minutes=null"], "training has no end"),
        ("pocket-dflash", ["data.train=pocket:tain"], "`data.train` is 'pocket:tain', but it must be"),
        ("pocket-dflash", ["data.select=pocket:train"], "must not be trained on"),
        (
            "pocket-dflash",
            ["data.min_supervised=600"],
            "`data.min_supervised` (600) is above `data.max_length` (512)",
        ),
        ("pocket-dflash", ["trackers=[none, none]"], "`trackers` contains the same name twice"),
    ],
)
def test_keys_at_odds_are_refused(recipe, overrides, expected):
    text = refusal(recipe, *overrides)
    assert expected in text
    assert f"override {overrides[-1]}" in text  # the override may be what put them at odds


@pytest.mark.parametrize("limit", ["epochs", "max_steps", "max_minutes"])
def test_any_one_limit_is_enough(tmp_path, limit):
    recipe = load_recipe(written(tmp_path, MINIMAL.replace("max_steps: 10", f"{limit}: 2")))
    assert recipe.optim == OptimConfig.model_validate({limit: 2})


def test_missing_recipe_names_the_nearest_and_the_rest():
    text = refusal("pocket-dsprak")
    assert "did you mean pocket-dspark?" in text
    assert "pocket-eagle3" in text


def test_missing_file_is_not_mistaken_for_a_name(tmp_path):
    assert f"there is no recipe file {tmp_path / 'no.yaml'}" in refusal(tmp_path / "no.yaml")


def test_missing_base_names_the_file_that_asked_for_it(tmp_path):
    path = written(tmp_path, "extends: pocket-dsprak\n")
    text = refusal(path)
    assert f"where: `extends` in {path}" in text
    assert "did you mean pocket-dspark?" in text


def test_key_given_twice_is_refused_with_its_line(tmp_path):
    path = written(tmp_path, MINIMAL + "seed: 1\nseed: 2\n")
    text = refusal(path)
    assert "the key `seed` appears twice" in text
    assert f"where: {path}:7" in text


def test_broken_yaml_names_the_line(tmp_path):
    path = written(tmp_path, "name: mine\ndraft: {num_layers: 2\noptim: 1\n")
    assert re.search(rf"not valid YAML: .*\n  where: {re.escape(str(path))}:\d+$", refusal(path))


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "a recipe must be a mapping" in refusal(written(tmp_path, text))


@pytest.mark.parametrize("text", ["seed", "=1", "optim..lr=1", ".lr=1"])
def test_malformed_override_shows_how_one_looks(text):
    assert "write key.path=value" in refusal("pocket-dflash", text)


def test_recipe_file_that_is_not_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"where: {path}" in refusal(path)


def test_dumped_recipe_is_complete(tmp_path):
    dump_recipe(load_recipe("pocket-eagle3"), tmp_path / "r.yaml")
    assert set(yaml.safe_load((tmp_path / "r.yaml").read_text())) == set(Recipe.model_fields)

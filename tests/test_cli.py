"""The command line: every command on a tiny random Llama, exit codes, and what bad input is told."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import deepspec
from deepspec.cli import app
from deepspec.cli.eval import draft_labels
from deepspec.cli.generate import coloured
from deepspec.data.tokens import prompt_ids
from deepspec.decode.engine import Generation
from deepspec.decode.text import pieces_of
from deepspec.errors import DataError, UserError
from deepspec.measure.evaluate import load_prompts
from deepspec.report.results import read_results
from deepspec.targets import Target
from talking import recipe_tree, save_talking_llama, write_data, write_recipe, write_rows
from tools.pocket import check
from tools.pocket.corpus import Example

ALGORITHMS = ("eagle3", "dflash", "dspark")
COMMANDS = (
    ["quickstart"],
    ["plan"],
    ["train"],
    ["eval"],
    ["calibrate"],
    ["profile"],
    ["recommend"],
    ["simulate"],
    ["verify"],
    ["compare"],
    ["report"],
    ["generate"],
    ["inspect"],
    ["export"],
    ["data", "inspect"],
    ["data", "regenerate"],
    ["data", "download"],
    ["data", "split"],
    ["data", "cache"],
    ["data", "features-server"],
    ["target", "convert"],
)


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def good(*words: Any) -> Any:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words: Any) -> str:
    """What a command that must end with exit code 2 says; never on standard output."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a talking target, its data, and a draft of each algorithm trained for two steps."""
    folder = tmp_path_factory.mktemp("scene")
    target = save_talking_llama(folder / "target")
    write_data(folder)
    for algorithm in ALGORITHMS:
        recipe = write_recipe(
            folder / f"{algorithm}.yaml", recipe_tree(target, folder, algorithm, max_steps=2)
        )
        result = good("train", recipe, "--runs", folder / "runs")
        assert (
            f"best checkpoint: {folder / 'runs' / f'tiny-{algorithm}' / 'checkpoints' / 'best'}"
            in result.stdout
        )
        assert "held-out τ: " in result.stdout
        assert f"next: deepspec eval --target {target} --draft {folder / 'runs'}" in result.stdout
    return folder


def eval_words(scene: Path, *drafts: str, prompts: bool = True) -> list[Any]:
    words: list[Any] = ["eval", "--target", scene / "target", "--max-new-tokens", 6]
    words += ["--prompts", scene / "prompts.jsonl"] if prompts else []
    for draft in drafts:
        words += ["--draft", scene / "runs" / f"tiny-{draft}"]
    return words


@pytest.fixture(scope="module")
def results(scene: Path) -> Path:
    """A results file of all three drafts at temperature 0."""
    path = scene / "results.json"
    good(*eval_words(scene, *ALGORITHMS), "--out", path)
    return path


# ── help ──────────────────────────────────────────────────────────────────────────────────────────────


def test_help_of_every_command_has_an_example_and_loads_no_torch():
    code = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom deepspec.cli import app\n"
        "found = {}\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    r = CliRunner().invoke(app, [*words, '--help'])\n"
        "    found[' '.join(words)] = [r.exit_code, r.output]\n"
        "print(json.dumps([found, sorted({'torch', 'transformers'} & set(sys.modules))]))\n"
    )
    source = str(Path(deepspec.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [source, os.getenv("PYTHONPATH")]))}
    command = [sys.executable, "-c", code, json.dumps(COMMANDS)]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    found, loaded = json.loads(output)
    assert loaded == []
    for words, (exit_code, text) in found.items():
        assert exit_code == 0
        assert f"Example:\n    deepspec {words}" in text


def test_commands_tested_for_help_are_all_there_are():
    listed = {info.name or info.callback.__name__ for info in app.registered_commands}
    assert listed == {words[0] for words in COMMANDS if len(words) == 1}
    for group in app.registered_groups:
        inside = {(group.name, info.name) for info in group.typer_instance.registered_commands}
        assert inside == {tuple(words) for words in COMMANDS if words[0] == group.name}


def test_version_and_bare_command():
    assert good("--version").stdout == f"deepspec {deepspec.__version__}\n"
    assert "Commands:" in good().stdout


# ── a tiny random Llama, untouched ────────────────────────────────────────────────────────────────────


def test_tiny_llama_is_measured_without_changing_a_token(scene, results):
    (found,) = read_results(results)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [
        "plain",
        "transformers generate",
        "prompt lookup",
        *(f"tiny-{a}" for a in ALGORITHMS),
    ]
    assert [rows[f"tiny-{a}"]["algorithm"] for a in ALGORITHMS] == list(ALGORITHMS)
    for name, row in rows.items():
        assert [p["id"] for p in row["per_prompt"]] == ["r0", "r1", "r2"]
        if name != "plain":
            assert row["lossless"] == {"identical": 3, "prompts": 3, "near_ties": 0}
    assert found["conditions"]["thinking"] is False


ONE_PROMPT = ("--limit", 1, "--no-baselines", "--max-new-tokens", 2, "--json")


@pytest.fixture(scope="module")
def one_prompt(scene: Path) -> Any:
    """What an evaluation of one draft on one prompt prints."""
    return good(*eval_words(scene, "dflash"), *ONE_PROMPT)


def test_json_is_all_that_standard_output_holds(scene, one_prompt):
    one = json.loads(one_prompt.stdout)
    assert [row["method"] for row in one["rows"]] == ["plain", "tiny-dflash"]
    words = [*eval_words(scene, "dflash"), *ONE_PROMPT]
    two = json.loads(good(*words, "--temperature", 0, "--temperature", 1).stdout)
    assert [each["conditions"]["temperature"] for each in two] == [0.0, 1.0]


def test_several_temperatures_do_not_overwrite_each_other(scene, tmp_path):
    words = [*eval_words(scene, "dspark"), *ONE_PROMPT[:-1], "--temperature", 0]
    result = good(*words, "--temperature", 0.5, "--out", tmp_path / "e.json", "--report", tmp_path / "e.html")
    written = [read_results(tmp_path / f"e-t{t}.json")[0] for t in ("0", "0.5")]
    assert [each["conditions"]["temperature"] for each in written] == [0.0, 0.5]
    assert "<html" in (tmp_path / "e.html").read_text("utf-8")
    assert "tiny-" in result.stdout
    assert "accepted length τ: tokens kept per verify round" in " ".join(result.stdout.split())


def test_draft_of_another_thinking_mode_is_measured_with_a_warning(scene, one_prompt):
    aware = good(*eval_words(scene, "dflash"), *ONE_PROMPT, "--thinking")
    assert "tiny-dflash was trained without thinking, but is measured with thinking" in aware.stderr
    assert json.loads(aware.stdout)["conditions"]["thinking"] is True
    assert "was trained" not in one_prompt.stderr


def test_prompts_with_another_system_prompt_are_measured_with_a_warning(scene, tmp_path):
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    words = [*eval_words(scene, "dflash", prompts=False), "--prompts", tmp_path / "p.jsonl"]
    words += ONE_PROMPT
    assert "trained without system prompt, but is measured with system prompt " in good(*words).stderr


def test_training_on_answers_of_another_thinking_mode_names_both_sides(scene, tmp_path):
    answers = tmp_path / "thoughts.jsonl"
    words = ["data", "regenerate", scene / "prompts.jsonl", "--out", answers, "--target", scene / "target"]
    good(*words, "--max-new-tokens", 8, "--thinking")
    result = good(
        "train", scene / "dflash.yaml", "optim.max_steps=1", "--answers", answers, "--runs", tmp_path
    )
    assert "was answered with thinking, but the recipe trains without thinking" in result.stderr.replace(
        "\n", " "
    )
    facts = json.loads((tmp_path / "tiny-dflash/checkpoints/best/deepspec.json").read_text("utf-8"))
    assert (facts["thinking"], facts["data"]["thinking"], facts["system_prompt"]) == (False, True, None)


def test_fine_tuning_starts_from_the_given_weights_and_says_which(scene, tmp_path):
    words = ["train", scene / "dflash.yaml", "optim.lr=1e-12", "optim.max_steps=1", "name=tuned"]
    words += ["--from", scene / "runs/tiny-dflash", "--runs", tmp_path]
    good(*words)
    best = Path("checkpoints/best")
    before = load_file(scene / "runs/tiny-dflash" / best / "model.safetensors")
    after = load_file(tmp_path / "tuned" / best / "model.safetensors")
    # One step at next to no learning rate: these are the given weights, where fresh ones would be others.
    assert max(float((after[k] - v).abs().max()) for k, v in before.items()) < 1e-6
    facts = json.loads((tmp_path / "tuned" / best / "deepspec.json").read_text("utf-8"))
    assert facts["started_from"]["draft"] == str(scene / "runs/tiny-dflash")
    assert facts["started_from"]["thinking"] is False


def test_fine_tuning_a_draft_of_another_shape_says_where_they_differ(scene, tmp_path):
    text = refused(
        "train", scene / "dspark.yaml", "--from", scene / "runs/tiny-dflash", "--runs", tmp_path, "name=t"
    )
    assert "is not the draft that the recipe describes" in text
    assert "algorithm dflash, the recipe dspark" in text


def test_finished_run_is_not_taken_for_the_fine_tuned_one(scene):
    text = refused(
        "train", scene / "dflash.yaml", "--from", scene / "runs/tiny-dspark", "--runs", scene / "runs"
    )
    assert "its start_from is not set, the recipe's is " in text


def test_draft_of_another_template_is_measured_with_a_warning(scene, tmp_path):
    other = tmp_path / "target"
    other.mkdir()
    for file in (scene / "target").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant: "))
    words = eval_words(scene, "dflash")
    words[words.index(scene / "target")] = other
    text = good(*words, *ONE_PROMPT).stderr
    trained = json.loads((scene / "runs/tiny-dflash/checkpoints/best/deepspec.json").read_text())
    assert f"trained with chat template {trained['template_hash'][:12]}, but is measured with " in text


def test_generate_prints_the_answer_and_says_who_wrote_it(scene):
    words = ["generate", "say six", "--target", scene / "target", "--max-new-tokens", 6]
    spoken = good(*words, "--draft", scene / "runs/tiny-dspark")
    plain = good(*words, "--plain")
    assert spoken.stdout == plain.stdout
    assert "tokens per verify round" in spoken.stderr
    assert "τ" not in plain.stderr


def test_a_character_spread_over_draft_and_target_tokens_stays_whole(scene):
    target = Target.from_pretrained(scene / "target")
    assert target.tokenizer is not None
    ids = target.tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    answer = Generation(token_ids=[*ids, 0], from_draft=[False, True, False, False], stopped=True)
    drawn = coloured(pieces_of(target.tokenizer, answer))
    assert drawn.plain == "né"
    assert drawn.spans == []  # it is whole only with the target's token, so it is not the draft's


@pytest.fixture(scope="module")
def regenerated(scene: Path) -> list[Any]:
    """The words of a command that has answered three prompts; the file comes after --out."""
    words = ["data", "regenerate", scene / "prompts.jsonl", "--out", scene / "a.jsonl"]
    words += ["--target", scene / "target", "--max-new-tokens", 4]
    assert "3 new answers" in good(*words).stdout
    return words


def test_regenerating_again_asks_nothing_twice(scene, regenerated):
    before = (scene / "a.jsonl").read_bytes()
    assert "0 new answers; 3 rows had one before" in good(*regenerated).stdout
    assert (scene / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [(["--thinking"], "thinking"), (["--temperature", 0.5], "sampling"), (["--seed", 9], "seed")],
)
def test_answers_made_under_other_conditions_are_not_taken_for_this_runs(scene, regenerated, change, name):
    before = (scene / "a.jsonl").read_bytes()
    text = refused(*regenerated, *change)
    assert f"made with {name}" in text
    assert "a.jsonl:1" in text
    assert (scene / "a.jsonl").read_bytes() == before


def test_prompt_given_twice_would_count_twice(scene, tmp_path):
    line = (scene / "prompts.jsonl").read_text("utf-8").splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line}\n", "utf-8")
    with pytest.raises(DataError, match="the id comes twice"):
        load_prompts(tmp_path / "twice.jsonl", Target.from_pretrained(scene / "target"))


def test_an_evaluation_may_leave_bad_prompts_out(scene, tmp_path):
    path, line = tmp_path / "some.jsonl", (scene / "prompts.jsonl").read_text("utf-8").splitlines()[0]
    path.write_text(f"{line}\nno JSON\n{line}\n", "utf-8")
    words = ["eval", "--target", scene / "target", "--draft", scene / "runs" / "tiny-dflash"]
    words += ["--prompts", path, *ONE_PROMPT]
    assert "--skip-bad leaves such rows out" in refused(*words)
    result = good(*words, "--skip-bad")
    assert "skipped 2 bad rows" in result.stderr
    assert json.loads(result.stdout)["conditions"]["prompts"] == 1


def test_packaged_prompts_are_taken_wherever_a_file_of_conversations_is(tmp_path):
    good("data", "split", "pocket:select", "--out", tmp_path)
    good("data", "download", "pocket:select", "--limit", 2, "--out", tmp_path / "two.jsonl")
    assert len((tmp_path / "two.jsonl").read_text("utf-8").splitlines()) == 2
    good("plan", "pocket-dspark", "--machine", "laptop-cpu", "--data", "pocket:select")
    assert "deepspec data regenerate" in refused("train", "pocket-dspark", "--answers", "pocket:select")
    assert "one of pocket:train" in refused("data", "split", tmp_path / "missing", "--out", tmp_path)


@pytest.mark.parametrize("change", ["draft.num_layers=1", "draft.block=3", "draft.target_layer_ids=[-1,1,2]"])
def test_run_of_another_draft_is_not_gone_on_with_and_keeps_its_recipe(scene, change):
    """Other layers leave the weights' shapes as they are: the run went on, on other features."""
    kept = scene / "runs" / "tiny-dspark" / "recipe.yaml"
    before = kept.read_bytes()
    said = refused("train", scene / "dspark.yaml", change, "--runs", scene / "runs")
    assert "cannot continue with this recipe" in said and change.partition("=")[0] in said
    assert kept.read_bytes() == before


@pytest.mark.parametrize("key", ["data.train", "data.select"])
def test_data_that_is_not_there_is_refused_before_the_target_loads(scene, tmp_path, monkeypatch, key):
    monkeypatch.setattr(Target, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"messages": 7}\n', "utf-8")
    for name, said in (("missing.jsonl", "missing.jsonl"), ("bad.jsonl", "bad.jsonl:1")):
        words = ("train", scene / "dspark.yaml", f"{key}={tmp_path / name}", "--runs", tmp_path / "runs")
        assert said in refused(*words)


def test_fresh_keeps_the_earlier_run_aside(scene, tmp_path):
    words = ["train", scene / "dflash.yaml", "optim.max_steps=1", "--runs", tmp_path]
    shutil.copytree(scene / "runs/tiny-dflash", tmp_path / "tiny-dflash")
    first = (tmp_path / "tiny-dflash/metrics.jsonl").read_bytes()
    result = good(*words, "--fresh")
    assert "resuming" not in result.stderr
    assert (tmp_path / "tiny-dflash.old-1/metrics.jsonl").read_bytes() == first
    assert "resuming" in good(*words).stderr


# ── compare and report ────────────────────────────────────────────────────────────────────────────────


def thinking_copy(results: Path, path: Path) -> Path:
    found = json.loads(results.read_text())
    found["conditions"]["thinking"] = True
    path.write_text(json.dumps(found))
    return path


def test_compare_refuses_another_thinking_mode_unless_told_otherwise(results, tmp_path):
    other = thinking_copy(results, tmp_path / "other.json")
    text = refused("compare", results, other)
    assert "file 1 was measured without thinking, but file 2 with thinking" in text
    allowed = good("compare", results, other, "--allow-mismatch", "--json")
    assert "warning: file 1 was measured without thinking" in allowed.stderr
    assert json.loads(allowed.stdout)["refusals"]


def test_compare_prints_paired_differences_by_domain(results):
    text = good("compare", results).stdout
    assert "tiny-dspark" in text
    assert "- tiny-dflash" in text
    assert " math " in text


def test_compare_accepts_what_eval_json_prints_for_several_temperatures(results, tmp_path):
    array = tmp_path / "two.json"
    array.write_text(json.dumps(read_results(results) * 2))
    assert len(read_results(array)) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '{"format": "other"}', None])
def test_file_that_holds_no_results_is_named(tmp_path, content):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert f"where: {path}" in refused("compare", path)
    with pytest.raises(DataError):
        read_results(path)


def test_report_holds_results_and_training_curves(scene, results, tmp_path):
    curve = f"tiny-dspark={scene / 'runs/tiny-dspark/metrics.jsonl'}"
    good("report", results, "--metrics", curve, "--out", tmp_path / "r.html")
    assert "DSpark" in (tmp_path / "r.html").read_text("utf-8")
    assert "NAME=FILE" in refused("report", results, "--metrics", "nowhere", "--out", tmp_path / "s.html")


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────


def test_malformed_training_data_names_file_and_line(scene, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [("q", "a")])
    with path.open("a") as file:
        file.write('{"messages": [\n')
    text = refused("train", scene / "dflash.yaml", "--answers", path, "--runs", tmp_path / "runs")
    assert "malformed JSON" in text
    assert f"where: {path}:2" in text


def test_conversation_without_an_assistant_turn_is_named(scene, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [("q", "a"), ("nobody answers", None)])
    text = refused("train", scene / "dflash.yaml", "--answers", path, "--runs", tmp_path / "runs")
    assert "conversation without an assistant turn" in text
    assert f"where: {path}:2 (id r1)" in text


def test_all_zero_loss_mask_is_refused(scene, tmp_path):
    words = ["train", scene / "dflash.yaml", "data.max_length=6", "--runs", tmp_path]
    assert "all-zero loss mask: truncated before the answer" in refused(*words)


def test_draft_of_another_target_names_both_sides(scene, target_dirs):
    words = eval_words(scene, "dspark")
    words[words.index(scene / "target")] = target_dirs["qwen3"]
    text = refused(*words)
    assert "does not fit" in text
    assert "its hidden width is 32, and the target's is 48" in text


def test_unknown_recipe_key_gives_the_nearest_name(scene, tmp_path):
    text = refused(
        "train", scene / "dflash.yaml", "optim.learning_rte=1", "optim.warmupp=0.1", "--runs", tmp_path
    )
    assert "unknown key `optim.warmupp`; did you mean `optim.warmup`?" in text


def test_unknown_recipe_gives_the_nearest_name(tmp_path):
    assert "did you mean pocket-dspark?" in refused("train", "pocket-dsprak", "--runs", tmp_path)


@pytest.mark.parametrize("words", [["eval"], ["eval", "--draft", "pocket-dsprak"]])
def test_missing_draft_lists_the_built_in_ones(words):
    text = refused(*words)
    assert all(name in text for name in ("pocket-eagle3", "pocket-dflash", "pocket-dspark"))


def test_another_target_needs_prompts_of_its_own(scene):
    text = refused(*eval_words(scene, "dspark", prompts=False))
    assert "--prompts FILE.jsonl" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--top-p", "0"], "top_p"),
        (["--temperature", "-1"], "--temperature"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--dtype", "float12"], "--dtype"),
        (["--prompts", "pocket:nope"], "pocket:test"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_option_out_of_range_is_refused(scene, words, expected):
    assert expected in refused(*eval_words(scene, "dflash"), *words)


def test_target_that_is_not_there_says_what_one_may_be(tmp_path):
    text = refused("data", "regenerate", "pocket:test", "--target", tmp_path, "--out", tmp_path / "o.jsonl")
    assert "not a model that transformers can load" in text
    assert not (tmp_path / "o.jsonl").exists()


def test_same_draft_twice_is_refused_and_namesakes_get_their_paths():
    assert draft_labels(["runs/a", "runs/b/checkpoints/best", "pocket-dspark"]) == ["a", "b", "pocket-dspark"]
    assert draft_labels(["x/a", "y/a"]) == ["x/a", "y/a"]
    with pytest.raises(UserError, match="given twice"):
        draft_labels(["x/a", "x/a"])


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_place_that_cannot_be_written_is_refused_before_the_measurement(
    scene, results, tmp_path, monkeypatch, option
):
    """An hour of measuring ended in a traceback, and nothing was kept."""
    monkeypatch.setattr("deepspec.cli.eval.load_target", lambda *a: pytest.fail("went to work"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "r.json"):
        assert "cannot be written" in refused(*eval_words(scene, "dspark"), option, place)
        assert "cannot be written" in refused("report", results, "--out", place)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("number, code", [(errno.EISDIR, 2), (errno.EACCES, 2), (errno.ENOSPC, 1)])
def test_what_the_system_says_of_a_path_is_no_traceback(results, monkeypatch, number, code):
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number), "some/place")

    monkeypatch.setattr("deepspec.report.compare.compare_results", fail)
    result = call("compare", results)
    assert result.exit_code == code
    assert f"some/place: {os.strerror(number)}" in result.stderr


# ── exit codes of what is nobody's input ──────────────────────────────────────────────────────────────


def test_our_own_failures_keep_their_traceback(results, monkeypatch):
    monkeypatch.setattr("deepspec.report.compare.compare_results", lambda *args: 1 / 0)
    result = call("compare", results)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_interrupted_command_says_what_is_kept(scene, tmp_path, monkeypatch):
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepspec.answers.in_process.regenerate", interrupt)
    words = ["--target", scene / "target", "--out", tmp_path / "o.jsonl"]
    result = call("data", "regenerate", scene / "prompts.jsonl", *words)
    assert result.exit_code == 130
    assert "answers finished so far are kept" in result.stderr


def test_ctrl_c_in_one_draft_does_not_start_the_next(tmp_path, monkeypatch):
    from tools.pocket import __main__ as commands
    from tools.pocket import drafts as workflow

    trained = []

    def train_draft(recipe: Any, *args: Any, **options: Any) -> Any:
        trained.append(recipe.algorithm)
        return SimpleNamespace(interrupted=True)

    monkeypatch.setattr(workflow, "train_draft", train_draft)
    monkeypatch.setattr(workflow, "regenerate", lambda *args, **options: 0)
    words = ["drafts", "--out", str(tmp_path), "--samples", "1"]
    assert CliRunner().invoke(commands.pocket_app, words).exit_code == 130
    assert trained == ["eagle3"]


# ── pocket check ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\ndef f():\n    return 1\n```", True),
        ("```python\ndef f(:\n    return 1\n```", False),
        ("```python\ndef f():\n    return 1", False),  # cut at the budget
        ("```python\n\n```", False),
        ("def f(): return 1", False),
    ],
)
def test_code_counts_as_parsing_only_as_a_whole_block(answer, expected):
    assert check.parses(answer) is expected


def test_arithmetic_is_right_only_by_its_last_number():
    right = ["Ada has 4. The answer is 7."]
    assert check._correct(["The answer is 7."], right) == [True]
    assert check._correct(["The answer is 7. The answer is 8."], right) == [False]
    assert check._correct(["no idea"], right) == [False]


@pytest.mark.parametrize("thinking", [False, True])
def test_loss_is_the_mean_over_answer_tokens_alone(scene, thinking):
    target = Target.from_pretrained(scene / "target")
    tokenizer: Any = target.tokenizer
    examples = [Example("chat", "k", "q" * n, "yes" * n, "hm", "yes") for n in (1, 4)]
    nats = []
    for e in examples:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": e.question}], thinking)
        text = "hm\n</think>\n\nyes" if thinking else e.answer
        answer = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = target.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        nats += [-float(row[token]) for row, token in zip(rows, answer, strict=True)]
    expected = math.fsum(nats) / len(nats)
    assert check.loss(target, examples, thinking=thinking) == pytest.approx(expected, rel=1e-5)

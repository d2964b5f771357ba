"""What can be refused is refused before anything expensive: weights that are loaded, a machine measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from talking import recipe_tree, save_talking_llama, write_data, write_recipe, write_rows


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A talking target, its data, a recipe and a draft."""
    folder = tmp_path_factory.mktemp("scene")
    write_data(folder)
    tree = recipe_tree(save_talking_llama(folder / "target"), folder, "dflash", max_steps=1)
    write_recipe(folder / "recipe.yaml", tree)
    result = call("train", folder / "recipe.yaml", "--runs", folder / "runs")
    assert result.exit_code == 0, result.output
    plain = folder / "plain"
    plain.mkdir()
    for file in (folder / "target").iterdir():
        (plain / file.name).symlink_to(file)
    template = (plain / "chat_template.jinja").read_text("utf-8")
    (plain / "chat_template.jinja").unlink()
    (plain / "chat_template.jinja").write_text(template.replace("enable_thinking", "other"), "utf-8")
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics.jsonl").write_text("{\n", "utf-8")
    for file in (folder / "runs/tiny-dflash/checkpoints/best").iterdir():
        (folder / "metrics" / file.name).symlink_to(file)
    write_rows(folder / "prompts.jsonl", [("one?", None), ("two?", None)])
    (folder / "late.jsonl").write_text((folder / "answers.jsonl").read_text("utf-8") + "{\n", "utf-8")
    (folder / "file").write_text("", "utf-8")
    (folder / "made.jsonl").write_text(json.dumps({"id": "r0", "thinking": True}) + "\n", "utf-8")
    return folder


@pytest.fixture(autouse=True)
def nothing_expensive(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expensive(*words: Any, **options: Any) -> Any:
        raise AssertionError("weights were loaded, or the machine was measured, before the refusal")

    monkeypatch.setattr("deepspec.targets.loading.AutoModelForCausalLM.from_pretrained", expensive)
    monkeypatch.setattr("deepspec.planning.measure", expensive)
    monkeypatch.setattr("deepspec.planning.kept_speeds", lambda target: None)
    monkeypatch.chdir(scene)


TRAIN = ["train", "recipe.yaml", "--runs", "other"]
EVAL = ["eval", "--target", "target", "--draft", "runs/tiny-dflash", "--prompts", "prompts.jsonl"]
TASK = ["--target", "target", "--prompts", "prompts.jsonl"]
CALIBRATE = ["calibrate", "runs/tiny-dflash", *TASK]
VERIFY = ["verify", "runs/tiny-dflash", *TASK]
ASK = ["data", "regenerate", "prompts.jsonl", "--target", "target", "--out", "new.jsonl"]
CACHE = ["data", "cache", "recipe.yaml", "--out", "cache"]
EXPORT = ["export", "runs/tiny-dflash", "--to", "vllm", "--target", "target", "--out", "exported"]
PLAN = ["plan", "recipe.yaml", "--machine", "here"]
GENERATE = ["generate", "hello", "--target", "target"]
DEAD = "http://127.0.0.1:9"
NO_SWITCH = "template has no switch for it"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*PLAN, "data.train=missing.jsonl"], "No such file or directory\n  where: missing.jsonl"),
        ([*PLAN, "data.train=late.jsonl"], "malformed JSON"),
        ([*PLAN, "--machine", "h100", "--measure"], "--measure measures this machine"),
        ([*PLAN, "draft.target_layer_ids=[99]"], "99"),
        ([*TRAIN, "data.train=missing.jsonl"], "data.train names a file that does not exist: missing.jsonl"),
        (
            [*TRAIN, "data.select=missing.jsonl"],
            "data.select names a file that does not exist",
        ),
        ([*TRAIN, "data.features=cache:missing"], "missing"),
        ([*TRAIN, "data.features=vllm:http://x:99999"], "is not a server's address"),
        ([*TRAIN, "data.features=vllm:me:hush@x:8000"], "'vllm:x:8000' is not a feature source"),
        ([*TRAIN, "trackers=[wandb]"], "the tracker 'wandb' is not installed"),
        ([*TRAIN, "draft.target_layer_ids=[99]"], "99"),
        ([*TRAIN, "target=plain", "thinking=true"], NO_SWITCH),
        ([*TRAIN, "--from", "pocket-dspark"], "pocket-dspark does not fit"),
        ([*TRAIN, "--from", "missing"], "no draft named 'missing' was found"),
        (["train", "recipe.yaml", "--runs", "file"], "file"),
        ([*EVAL, "--out", "file/eval.json"], "is not a folder"),
        ([*EVAL, "--report", "target"], "it is a folder"),
        ([*EVAL, "--draft", "pocket-dspark"], "pocket-dspark does not fit target"),
        ([*EVAL, "--prompts", "late.jsonl"], "malformed JSON"),
        ([*EVAL, "--draft", "metrics"], "malformed JSON"),
        ([*EVAL, "--target", "plain", "--thinking"], NO_SWITCH),
        ([*CALIBRATE, "--out", "file/calibration.json"], "is not a folder"),
        ([*CALIBRATE, "--prompts", "late.jsonl"], "malformed JSON"),
        (["calibrate", "pocket-dspark"], "its calibration needs a place"),
        ([*CALIBRATE, "--to", "sglang"], "has no confidence head, whose temperatures sglang would read"),
        (["verify", "pocket-dspark", *TASK], "pocket-dspark does not fit target"),
        ([*VERIFY, "--policy", "fixed:-1"], "'fixed:-1' is not a policy"),
        ([*VERIFY, "--temperature", "0"], "temperature 0 has one answer to a prompt"),
        ([*ASK, "--out", "file/new.jsonl"], "is not a folder"),
        ([*ASK, "--out", "made.jsonl"], "was made with thinking True, but now it is False"),
        ([*ASK, "--target", "plain", "--thinking"], NO_SWITCH),
        (["data", "regenerate", "late.jsonl", *ASK[3:]], "malformed JSON"),
        ([*ASK, "--out", "made.jsonl", "--server", DEAD], "was made with thinking True, but now it is False"),
        ([*ASK[:3], "--out", "made.jsonl", "--server", DEAD], "was made with thinking True"),
        ([*CACHE, "--out", "file/cache"], "is not a folder"),
        ([*CACHE, "data.train=missing.jsonl"], "data.train names a file that does not exist"),
        ([*CACHE, "target=plain", "thinking=true"], NO_SWITCH),
        ([*EXPORT, "--out", "target"], "the output folder holds something else"),
        ([*EXPORT, "--out", "file/new"], "is not a folder"),
        (["export", "pocket-dspark", *EXPORT[2:]], "pocket-dspark does not fit target"),
        ([*GENERATE, "--draft", "pocket-dspark"], "pocket-dspark does not fit target"),
        (["generate", "hello", "--target", "plain", "--plain", "--thinking"], NO_SWITCH),
        (["data", "split", "answers.jsonl", "--out", "file/sets"], "is not a folder"),
        (["data", "download", "answers.jsonl", "--out", "file/new.jsonl"], "is not a folder"),
        (["quickstart", "--out", "file/all"], "is not a folder"),
        (["report", "missing.json", "--out", "file/page.html"], "is not a folder"),
    ],
)
def test_is_refused_at_once(
    scene: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = sorted(scene.rglob("*"))
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "hush" not in result.stderr
    assert result.stdout == ""
    assert sorted(scene.rglob("*")) == before


SOCKS = {"ALL_PROXY": "socks://me:hush@127.0.0.1:1080/"}


@pytest.mark.parametrize("words", [["inspect", "org/draft"], [*EVAL, "--target", "org/target"]])
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (SOCKS, "ALL_PROXY names a proxy of socks:// that cannot be used here"),
        ({"HTTPS_PROXY": "http://me:hush@x:port"}, "HTTPS_PROXY names a proxy"),
        ({"NO_PROXY": "gpu1,[::1]"}, "NO_PROXY has an entry with which the Hub cannot be asked"),
        ({"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE names '/nowhere.pem'"),
        ({"HF_TOKEN": "hf_hush\u0435"}, "HF_TOKEN holds characters that no token has"),
    ],
)
def test_an_environment_in_which_the_hub_cannot_be_asked(
    words: list[str], variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspec.connections.constants.HF_HUB_OFFLINE", False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "hush" not in result.output
    assert result.stderr.count("\n") == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where nothing can be made")
@pytest.mark.parametrize(
    "words",
    [
        [*EVAL, "--out", "/proc/none/eval.json"],
        [*ASK, "--out", "/proc/none/new.jsonl"],
        [*CACHE, "--out", "/proc/none"],
        [*EXPORT, "--out", "/proc/none"],
        ["data", "split", "answers.jsonl", "--out", "/proc/none"],
        ["data", "download", "answers.jsonl", "--out", "/proc/none.jsonl"],
        ["train", "recipe.yaml", "--runs", "/proc/none"],
        ["report", "missing.json", "--out", "/proc/none/page.html"],
    ],
)
def test_a_place_where_nothing_can_be_made_is_no_traceback(scene: Path, words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "/proc/none" in result.stderr and "No such file or directory" in result.stderr

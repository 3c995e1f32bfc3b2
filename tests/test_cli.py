"""The command line: readable help, one line for bad input, exit status 0, 1 or 2."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from companion import __main__ as cli
from companion import checkpoints, recipes, train
from companion.recipes import RECIPES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands write below the current folder."""
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The one line that a command with bad input says."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse's way
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def test_help_reads_well(capsys):
    for arguments, words in (
        (["--help"], ("From Noise to Pictures", "train", "check")),
        (["train", "--help"], ("--resume", "metadata.jsonl", "Ctrl-C", "accelerate launch")),
        (["check", "--help"], ("default: the weights shipped",)),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        said = capsys.readouterr().out
        assert stop.value.code == 0 and all(word in said for word in words)


def test_every_recipe_is_listed(capsys):
    assert cli.main(["train", "--list"]) == 0
    said = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name} " in said and recipe.about in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "which recipe? One of: "),
        (["train", "digit-clasifier"], "Did you mean 'digit-classifier'?"),
        (["train", "digit"], "Did you mean 'digits'?"),
        (["train", "digit-classifier", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["train", "digit-classifier", "--steps", "0"], "steps is 0"),
        (["train", "digit-classifier", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["train", "digit-classifier", "--data", "nowhere"], "nowhere does not exist"),
        (["train", "digit-classifier", "--data", "."], ". has no pictures"),
        (["train", "digit-classifier", "--dta", "."], "unrecognized arguments: --dta ."),
        (["check", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, arguments, said):
    assert said in refused(capsys, *arguments)
    assert not (tmp_path / "runs").exists()


def test_train_then_resume_then_check(capsys, tmp_path):
    command = ["train", "digit-classifier", "--steps", "3", "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    where = Path("runs") / "digit-classifier" / "final"
    assert said.out == f"Done. The weights are in {where}.\n"
    assert "digit-classifier: 100%" in said.err and "loss" in said.err, "the bar"
    assert (tmp_path / where / "model.safetensors").is_file()
    assert "--resume" in refused(capsys, *command, "--quiet")
    assert cli.main([*command, "--resume", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("This run has already ended (step 3 of 3)") and said.err == ""
    assert cli.main(["check", "runs"]) == 0
    assert capsys.readouterr().out == "runs: all is well\n"
    raw = bytearray((where / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (where / "model.safetensors").write_bytes(raw)
    assert cli.main(["check", "runs"]) == 1
    said = capsys.readouterr().out
    assert "truncated or altered" in said and "runs: 1 findings" in said


def test_options_reach_the_run(monkeypatch, capsys):
    seen = {}

    def fake(recipe, out, **options):
        seen.update(options, recipe=recipe.name, out=out)
        return train.Result(Path("x"), 4, 5, False, 0, "Stopped.")

    monkeypatch.setattr(train, "train", fake)
    words = "train digit-classifier --data d --out o --resume --steps 5 --batch-size 6 --seed 7"
    words += " --precision bf16 --threads 2 --workers 3 --device cpu --save-every 8 --quiet"
    assert cli.main(words.split()) == 1, "stopped before the end"
    assert capsys.readouterr().out == "Stopped.\n"
    assert seen == {
        "recipe": "digit-classifier", "out": "o", "data": "d", "resume": True, "steps": 5,
        "batch_size": 6, "seed": 7, "precision": "bf16", "threads": 2, "workers": 3,
        "device": "cpu", "save_every": 8, "quiet": True,
    }  # fmt: skip


def test_check_without_a_folder_looks_at_what_is_shipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    checkpoints.write_tensors(tmp_path / "weights" / "a" / "model.safetensors", {})
    assert cli.main(["check"]) == 1
    assert "no card.json" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_status_1(monkeypatch, capsys):
    recipe = RECIPES["digit-classifier"]

    def broken(model, batch, data):
        value, metrics = recipe.loss(model, batch, data)
        return value * float("nan"), metrics

    monkeypatch.setitem(recipes.RECIPES, recipe.name, replace(recipe, loss=broken))
    assert cli.main(["train", recipe.name, "--quiet", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: The loss of recipe digit-classifier is nan") and "\n" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("fault", [TypeError("ours"), ZeroDivisionError("ours"), RuntimeError("x")])
def test_our_own_faults_keep_their_traceback(monkeypatch, fault):
    def faulty(*_args, **_options):
        raise fault

    monkeypatch.setattr(train, "train", faulty)
    with pytest.raises(type(fault)):
        cli.main(["train", "digit-classifier"])


def test_a_type_error_of_our_checks_is_bad_input(monkeypatch, capsys):
    from companion import errors

    def checked(*_args, **_options):
        errors.tensor("x", 3)

    monkeypatch.setattr(train, "train", checked)
    assert "x is int; expected a torch.Tensor" in refused(capsys, "train", "digit-classifier")


def test_ctrl_c_before_the_loop_is_quiet(monkeypatch, capsys):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert cli.main(["train", "digit-classifier"]) == 1
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.slow  # a process that imports torch
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_a_real_process_saves_and_says_how_to_go_on(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "companion", "train", "digit-classifier"]
    command += ["--steps", "100000", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) as process:
        log = tmp_path / "runs" / "digit-classifier" / "log.jsonl"
        end = time.monotonic() + 120
        while time.monotonic() < end and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert out.startswith("Stopped by SIGINT at step ") and "of 100000; saved." in out
    assert out.endswith("python -m companion train digit-classifier --steps 100000 --resume\n")
    state = checkpoints.load_state(tmp_path / "runs" / "digit-classifier" / "state.safetensors")
    step = int(out.split("at step ")[1].split()[0])
    assert step > 0 and state["optimiser.step.out.bias"] == torch.tensor(float(step))


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from companion import __main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'accelerate', 'tqdm', 'sklearn', 'PIL', 'matplotlib', 'safetensors'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )

"""The study's protocol, its file of lines, its statistics, and a study that is killed and resumed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import cifar
from locks import occupied
from reproduction import ledger
from reproduction.arms import ARMS
from reproduction.experiments import Experiment
from reproduction.pool import require_same_images, run_missing
from reproduction.presets import PRESETS
from reproduction.protocol import Case, Lines, Study
from reproduction.runs import Run, execute
from reproduction.statistics import paired
from reproduction.tables import comparison_table
from study_lines import line

REPRODUCE = Path(__file__).parent.parent / "examples" / "reproduce.py"
TASK = PRESETS["smoke"].tasks[0]
CASE = Case(TASK, "irnet")


def study(seeds: int = 2, arms: tuple[str, ...] = ("bare", "HBNN")) -> Study:
    return Study([CASE], {arm: ARMS[arm] for arm in arms}, seeds, compiled=False)


def test_tuning_sees_the_whole_grid_then_the_best_with_further_seeds_and_never_the_test_set() -> None:
    s, done = study(), []
    rounds = []
    while missing := s.missing(Lines(done)):
        rounds.append(missing)
        done += [line(run, run.recipe.lr if run.arm == "bare" else 1 - run.recipe.lr) for run in missing]
    first, second, fresh = rounds
    tuning = (*first, *second)
    assert {run.split for run in tuning} == {"validation"}
    assert {run.recipe.epochs for run in (*tuning, *fresh)} == {TASK.epochs}
    everything = {(arm, lr) for arm in s.arms for lr in TASK.learning_rates}  # there are as many finalists
    assert {(run.arm, run.recipe.lr) for run in first} == {(run.arm, run.recipe.lr) for run in second} == everything
    assert [{run.recipe.seed for run in round_} for round_ in (first, second)] == [{1000}, {1001}]
    assert [(run.arm, run.recipe.seed) for run in fresh] == [("bare", 0), ("HBNN", 0), ("bare", 1), ("HBNN", 1)]
    assert {run.recipe.lr for run in fresh if run.arm == "bare"} == {0.3}
    assert {run.recipe.lr for run in fresh if run.arm == "HBNN"} == {0.1}
    assert {run.split for run in fresh} == {"test"}
    assert s.epochs_left(Lines(done)) == 0


def test_an_ablation_tunes_one_arm_and_gives_all_others_its_settings() -> None:
    experiment = Experiment("", (), (), ("Euclidean", "HBNN"), seeds=2, ablated="HBNN")
    s = experiment.study(PRESETS["smoke"], [CASE])
    assert s.reference == "HBNN"
    done: list[dict[str, Any]] = []
    while missing := s.missing(Lines(done)):
        left = s.epochs_left(Lines(done))
        done += [line(run, 1 - run.recipe.lr) for run in missing]
        assert s.epochs_left(Lines(done)) >= left - sum(run.recipe.epochs for run in missing)  # neighbours come on top
    tuning = [d["config"] for d in done if d["config"]["split"] == "validation"]
    assert {config["arm"] for config in tuning} == {"HBNN"}
    fresh = [d["config"] for d in done if d["config"]["split"] == "test"]
    assert [(c["arm"], c["recipe"]["lr"]) for c in fresh] == [("Euclidean", 0.1), ("HBNN", 0.1)] * 2
    assert s.epochs_left(Lines(done)) == 0


def test_at_a_given_setting_nothing_is_tuned() -> None:
    s = Experiment("", (), (), ("bare", "HBNN"), seeds=2).study(PRESETS["smoke"], [CASE], given=(0.2, 3e-4))
    runs = s.missing(Lines([]))
    assert {(run.recipe.lr, run.recipe.weight_decay, run.split) for run in runs} == {(0.2, 3e-4, "test")}
    assert [(run.arm, run.recipe.seed) for run in runs] == [("bare", 0), ("HBNN", 0), ("bare", 1), ("HBNN", 1)]
    assert s.epochs_left(Lines([])) == 4 * TASK.epochs
    done = Lines([line(run, 0.5) for run in runs])
    assert s.missing(done) == []
    assert "| 0.2, 0.0003, given | 50.00 ± 0.00 (2) |" in comparison_table(s, done)


def test_an_arm_may_take_the_settings_of_another_which_need_not_be_compared() -> None:
    arm, other = "HBNN, r = 1", ARMS["HBNN, r = 1"].tuned_as
    s = Study([CASE], {arm: ARMS[arm]}, 1, compiled=False)
    done: list[dict[str, Any]] = []
    while missing := s.missing(Lines(done)):
        left = s.epochs_left(Lines(done))
        done += [line(run, 1 - run.recipe.lr) for run in missing]
        assert s.epochs_left(Lines(done)) >= left - sum(run.recipe.epochs for run in missing)  # neighbours come on top
    assert {d["config"]["arm"] for d in done if d["config"]["split"] == "validation"} == {other}
    (fresh,) = (d["config"] for d in done if d["config"]["split"] == "test")
    assert (fresh["arm"], fresh["options"], fresh["recipe"]["lr"]) == (arm, ARMS[arm].options, 0.1)
    assert s.epochs_left(Lines(done)) == 0


def test_a_diverged_run_loses_the_tuning() -> None:
    s = study()
    done = [line(run, 0.5) for run in s.first_round(CASE, "bare", Lines([]))]
    done[0] = {"config": done[0]["config"], "diverged": "The training loss is nan"}
    assert s.setting(CASE, "bare", Lines(done)) == (TASK.learning_rates[1], 5e-4)


WIDE = replace(
    TASK,
    learning_rates=(0.1, 0.3),
    weight_decays=(1e-4, 5e-4),
    wider=((0.03, 0.6), (1e-3,)),
    finalists=2,
    tuning_seeds=3,
)


def test_the_winner_walks_beyond_the_grid_to_where_no_neighbour_is_better() -> None:
    s = Study([Case(WIDE, CASE.host)], {"bare": ARMS["bare"]}, 1, compiled=False)
    done: list[dict[str, Any]] = []
    rounds = []
    assert s.setting(s.cases[0], "bare", Lines(done)) is None
    while missing := [run for run in s.first_round(s.cases[0], "bare", Lines(done)) if run not in Lines(done)]:
        rounds.append({(run.recipe.lr, run.recipe.weight_decay) for run in missing})
        assert not s.is_tuned(s.cases[0], "bare", Lines(done))
        assert s.missing(Lines(done)) == missing, "no further seeds yet"
        done += [line(run, 0.5 - abs(run.recipe.lr - 0.03) - abs(run.recipe.weight_decay - 1e-3)) for run in missing]
    assert rounds == [
        {(0.1, 1e-4), (0.1, 5e-4), (0.3, 1e-4), (0.3, 5e-4)},
        {(0.03, 5e-4), (0.1, 1e-3)},
        {(0.03, 1e-4), (0.03, 1e-3)},
    ]
    assert s.setting(s.cases[0], "bare", Lines(done)) == (0.03, 1e-3)
    finalists = {(run.recipe.lr, run.recipe.weight_decay) for run in s.missing(Lines(done))}
    assert finalists == {(0.03, 1e-3), (0.03, 5e-4)}


def test_the_mean_over_all_tuning_seeds_decides_between_the_finalists() -> None:
    s = Study([Case(WIDE, CASE.host)], {"bare": ARMS["bare"]}, 1, compiled=False)
    accuracy = {  # by setting: with the first seed, and with each of the others
        (0.1, 1e-4): (0.60, 0.50),
        (0.3, 1e-4): (0.59, 0.58),
        (0.1, 5e-4): (0.58, 0.70),
    }

    def reading(run: Run) -> float:
        first, others = accuracy.get((run.recipe.lr, run.recipe.weight_decay), (0.5, 0.5))
        return first if run.recipe.seed == 1000 else others

    done: list[dict[str, Any]] = []
    while (missing := s.missing(Lines(done))) and missing[0].split == "validation":
        done += [line(run, reading(run)) for run in missing]
    assert s.is_tuned(s.cases[0], "bare", Lines(done))
    assert s.setting(s.cases[0], "bare", Lines(done)) == (0.3, 1e-4)
    found = s.readings(s.cases[0], "bare", Lines(done))
    assert found[0.1, 1e-4] == pytest.approx([0.6, 0.5, 0.5])
    assert found[0.1, 5e-4] == pytest.approx([0.58]), "it was no finalist"
    assert {run.recipe.weight_decay for run in missing} == {1e-4}


def test_a_name_changes_no_configuration_and_every_option_does() -> None:
    first = study().first_round(CASE, "HBNN", Lines([]))[0]
    renamed = Run(**{**vars(first), "arm": "another name"})
    other = Run(**{**vars(first), "options": {**(first.options or {}), "radius": 0.1}})
    assert first.key == renamed.key != other.key


def test_a_line_from_before_the_recipe_named_an_optimizer_was_of_sgd() -> None:
    sgd, muon = study(arms=("bare", "bare, Muon")).missing(Lines([]))[:: len(TASK.grid)]
    old = line(sgd, 0.5)
    del old["config"]["recipe"]["optimizer"]
    assert sgd in Lines([old])
    assert muon not in Lines([old])


def test_a_grid_of_one_point_is_not_tuned_and_the_readout_is_a_mean() -> None:
    case = Case(PRESETS["smoke"].tasks[1], "irnet")
    s = Study([case], {"bare": ARMS["bare"]}, 1, compiled=False)
    (run,) = s.missing(Lines([]))
    assert (run.split, run.recipe.lr) == ("test", case.task.learning_rates[0])
    done = {**line(run, 0), "accuracy": [0.1, 0.3, 0.5]}
    assert Lines([done]).accuracy(run, case.task.readout) == pytest.approx(0.4)
    assert s.epochs_left(Lines([done])) == 0


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12))
def test_intervals_agree_with_the_t_test(pairs: list[tuple[float, float]]) -> None:
    mine, other = zip(*pairs, strict=True)
    found = paired(mine, other)
    assert found.count == len(pairs)
    if found.std < 1e-6:
        return
    interval = stats.ttest_rel(mine, other).confidence_interval(0.95)
    assert np.allclose([found.low, found.high], [interval.low, interval.high], atol=1e-9)
    assert found.bootstrap_low <= found.mean <= found.bootstrap_high


def test_one_seed_has_no_interval_and_more_seeds_are_asked_for_smaller_effects() -> None:
    assert math.isnan(paired([1.0], [0.5]).low)
    noise = np.random.default_rng(0).normal(size=8)
    needed = [paired(noise - noise.mean() + effect, np.zeros(8)).seeds_needed for effect in (3.0, 0.5)]
    assert needed[0] is not None
    assert needed[1] is not None
    # 1 standard deviation: the textbook's 10 pairs; half of one: 34
    assert paired([1 + x for x in (-1, 1, -1, 1, 0)], [0] * 5).seeds_needed == 10
    assert needed[0] < needed[1]


def test_the_ledger_survives_a_torn_last_line_and_names_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    ledger.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')  # a kill in the middle of a line
    assert ledger.read(path) == [{"a": 1}]
    ledger.append(path, {"c": 3})
    assert ledger.read(path) == [{"a": 1}, {"c": 3}]
    path.write_text(path.read_text().rstrip())  # as an editor may leave it
    ledger.append(path, {"d": 4})
    assert ledger.read(path) == [{"a": 1}, {"c": 3}, {"d": 4}]
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        ledger.read(path)


def test_lines_that_several_processes_add_at_once_all_stay(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = "import sys, pathlib\nfrom reproduction import ledger\n"
    code += "for i in range(100): ledger.append(pathlib.Path(sys.argv[1]), {'of': sys.argv[2], 'i': i})"
    environment = {**os.environ, "PYTHONPATH": str(REPRODUCE.parent)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), name], env=environment) for name in "ab"]
    assert [process.wait(120) for process in started] == [0, 0]
    assert sorted((entry["of"], entry["i"]) for entry in ledger.read(path)) == [
        (n, i) for n in "ab" for i in range(100)
    ]


def test_two_studies_do_not_train_in_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=r"another process is training in .*runs: .*--runs")
    with occupied(tmp_path / "runs"), refused:
        run_missing(study(), tmp_path, tmp_path / "lines.jsonl", tmp_path / "runs", 1)
    with occupied(tmp_path / "runs"):
        pass


def test_a_run_that_fails_is_told_and_the_error_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin"):
        run_missing(study(), tmp_path / "nowhere", tmp_path / "lines.jsonl", tmp_path / "runs", 1)
    assert (
        "cifar10 resnet8 irnet, bare, lr 0.1, decay 0.0005, 2 epochs, seed 1000, validation: "
        in capsys.readouterr().out
    )
    assert not (tmp_path / "lines.jsonl").exists()


def test_a_run_is_not_continued_on_other_images(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for path in other.rglob("*.bin"):  # as another copy of the images would differ
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    run = study().run(CASE, "HBNN", 0.1, 5e-4, 3, 0, "test")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run, data, tmp_path / "runs", stop)
    there, alone = (execute(run, other, tmp_path / folder) for folder in ("runs", "alone"))
    assert {**there, "seconds": 0} == {**alone, "seconds": 0}


def test_lines_from_another_copy_of_the_images_are_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    run = study().missing(Lines([]))[0]
    require_same_images(path, ["cifar10"], data)  # no lines yet
    ledger.append(path, {**line(run, 0.5), "dataset_crc32": cifar.checksum(data)})
    require_same_images(path, ["cifar10"], data)
    ledger.append(path, {**line(run, 0.5), "dataset_crc32": "0badc0de"})
    with pytest.raises(ValueError, match=r"another copy of cifar10 .*0badc0de.*--results"):
        require_same_images(path, ["cifar10"], data)


def test_a_run_stopped_after_an_epoch_leaves_the_same_line(data: Path, tmp_path: Path) -> None:
    run = study().run(CASE, "HBNN", 0.1, 5e-4, 3, 0, "test")
    whole = execute(run, data, tmp_path / "whole")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run, data, tmp_path / "stopped", stop)
    epochs: list[int] = []
    resumed = execute(run, data, tmp_path / "stopped", lambda: epochs.append(1))
    assert len(epochs) == 3  # the one before the stop counts as done
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


def test_a_study_killed_and_repeated_ends_with_the_lines_of_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    options = ["--preset", "smoke", "--archs", "resnet8", "--hosts", "irnet", "--arms", "HBNN", "--seeds", "1"]
    folders = ["--data", str(data), "--results", str(tmp_path), "--runs", str(tmp_path / "killed")]
    command = [sys.executable, str(REPRODUCE), "table5", *options, "--jobs", "1", *folders]

    def lines() -> list[dict[str, Any]]:
        return [{**line, "seconds": 0} for line in ledger.read(tmp_path / "reproduce-smoke.jsonl")]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(lines()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)  # its workers notice
    killed_after = len(lines())
    subprocess.run(command, check=True, capture_output=True)
    undisturbed, s = [], study(1, ("HBNN",))
    while missing := s.missing(Lines(undisturbed)):
        undisturbed.append({**execute(missing[0], data, tmp_path / "undisturbed"), "seconds": 0})
    assert killed_after < len(undisturbed)
    assert lines() == undisturbed

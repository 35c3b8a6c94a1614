"""Tables and pictures of the paper's experiments, from lines alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scipy import stats

from reproduction import ledger, plots
from reproduction.arms import ARMS, BARE
from reproduction.experiments import EXPERIMENTS
from reproduction.presets import PRESETS
from reproduction.protocol import Lines
from reproduction.report import write_report
from reproduction.surfaces import missing_surfaces
from reproduction.tables import comparison_table, difference, search_table, tuning_table
from study_lines import finish, line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reproduction.protocol import Study
    from reproduction.runs import Run

SMOKE = PRESETS["smoke"]
CASES = EXPERIMENTS["table5"].cases(SMOKE, ["irnet"], ["resnet8"])


def test_the_tuning_table_says_what_diverged() -> None:
    study = EXPERIMENTS["table5"].study(SMOKE, CASES, [BARE])
    first, second = study.missing(Lines([]))
    table = tuning_table(study, Lines([{"config": first.config, "diverged": "nan"}, line(second, 0.25)]))
    assert table.splitlines()[2:] == ["| 0.1, 0.0005 | diverged |", "| 0.3, 0.0005 | **25.0** |"]


def test_the_tuning_table_compares_the_settings_at_which_neither_arm_diverged() -> None:
    study = EXPERIMENTS["table5"].study(SMOKE, CASES, [BARE, "HBNN"])
    bare, hbnn = (study.first_round(CASES[0], arm, Lines([])) for arm in study.arms)
    diverged = {"config": hbnn[1].config, "diverged": "nan"}
    done = [line(bare[0], 0.25), line(bare[1], 0.3), line(hbnn[0], 0.35), diverged]
    table = tuning_table(study, Lines(done))
    assert table.splitlines()[-1] == "| mean difference from bare at the same settings |  | +10.0, 1 of 1 above |"


def test_seeds_are_paired() -> None:
    study = EXPERIMENTS["table5"].study(SMOKE, CASES, [BARE, "HBNN"], seeds=3)

    def accuracy(run: Run) -> float:
        return 0.6 + 0.01 * run.recipe.seed + 0.02 * (run.arm == "HBNN")

    lines = Lines(finish(study, accuracy))
    found = difference(study, CASES[0], "HBNN", lines)
    assert found is not None
    assert (found.count, round(found.mean, 9)) == (3, 2.0)
    table = comparison_table(study, lines)
    assert "| 61.00 ± 1.00 (3) |" in table
    assert "+2.00 (3)" in table


def three_seeds(*hosts: str) -> tuple[Study, Lines]:
    """Of 40 epochs: each host ends at 60, 61 and 62 %, HBNN on it at 62, 63 and 65 %; by default IR-Net alone."""
    small, table5 = PRESETS["small"], EXPERIMENTS["table5"]
    study = table5.study(small, table5.cases(small, hosts or ["irnet"]), [BARE, "HBNN"], seeds=3)

    def accuracy(run: Run) -> float:
        if run.split == "validation":
            return 0.5 + 0.1 * (run.recipe.lr == 0.1)
        return {BARE: (0.6, 0.61, 0.62), "HBNN": (0.62, 0.63, 0.65)}[run.arm][run.recipe.seed]

    return study, Lines(finish(study, accuracy))


def test_a_row_of_the_table_in_full() -> None:
    study, lines = three_seeds()
    bare, hbnn = ([60.0, 61.0, 62.0], [62.0, 63.0, 65.0])
    last, steadier = (
        stats.ttest_rel([share * x for x in hbnn], [share * x for x in bare]).confidence_interval()
        for share in (1, 0.95)  # accuracy grows in proportion to the epochs: the last five have 38 / 40 of the last
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in comparison_table(study, lines).splitlines()[:4]]
    assert dict(zip(rows[0], rows[3], strict=True)) == {
        "task, host": "cifar10 resnet8, irnet",
        "arm": "HBNN",
        "lr, decay": "0.1, 0.0001",
        "test accuracy, % (seeds)": "63.33 ± 1.53 (3)",
        "seed by seed": "62.00, 63.00, 65.00",
        "difference from bare, points": "+2.33 (3)",
        "95 % t interval": f"{last.low:+.2f} … {last.high:+.2f}",
        "95 % bootstrap": "+2.00 … +3.00",
        "seeds that would decide": "decided",
        "mean of the last 5 epochs, 95 % t interval": f"+2.22 (3), {steadier.low:+.2f} … {steadier.high:+.2f}",
        "training loss": "1.600",
        "flipped": "40.0 %",
        "oscillating late": f"{10 * sum(1 / epoch for epoch in range(31, 41)) / 10:.2f} %",
        "reach": "0.250",
    }
    assert rows[2][4:10] == ["60.00, 61.00, 62.00", "", "", "", "", ""]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would be written to files."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_a_difference_is_drawn_with_its_interval_beside_a_line_at_zero(drawn: list[Figure], tmp_path: Path) -> None:
    study, lines = three_seeds()
    found = difference(study, study.cases[0], "HBNN", lines)
    assert found
    plots.draw_differences(study, lines, tmp_path)
    zero, interval, mean = drawn[0].axes[0].lines
    assert list(zero.get_xdata()) == [0, 0]
    assert list(interval.get_xdata()) == [found.low, found.high]
    assert list(mean.get_xdata()) == [found.mean]


def test_curves_are_means_over_seeds_and_flips_those_of_the_last_epoch(drawn: list[Figure], tmp_path: Path) -> None:
    study, lines = three_seeds()
    plots.draw_curves(study, lines, tmp_path)
    plots.draw_flips(study, lines, tmp_path)
    bare, hbnn = (curve.get_ydata() for curve in drawn[0].axes[0].lines)
    assert [bare[-1], hbnn[-1]] == pytest.approx([61, 190 / 3])
    assert hbnn[19] == pytest.approx(95 / 3)
    by_layer, by_epoch = drawn[1].axes
    assert list(by_layer.lines[0].get_ydata()) == pytest.approx([40, 50])  # after the last epoch
    assert list(by_epoch.lines[0].get_ydata()) == pytest.approx(range(1, 41))


def test_of_two_hosts_there_is_an_interval_for_both_together() -> None:
    header, _, _, row, *_ = comparison_table(*three_seeds("irnet", "recu")).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    both = stats.ttest_rel([62, 63, 65], [60, 61, 62]).confidence_interval(1 - 0.05 / 2)
    assert cells["for all hosts together (Bonferroni)"] == f"{both.low:+.2f} … {both.high:+.2f}"


@pytest.mark.parametrize("name", ["ablation", "table1", "table2", "table5", "fig3", "fig4"])
def test_every_experiment_has_its_picture_and_a_table_its_text(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    cases = experiment.cases(SMOKE, archs=["resnet8"])
    study = experiment.study(SMOKE, cases)
    lines = Lines(finish(study, lambda run: 0.5 + 0.01 * run.recipe.seed))
    write_report(name, study, Lines([]), tmp_path / "empty")
    write_report(name, study, lines, tmp_path / name)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"{name}.png").stat().st_size > (tmp_path / "empty.png").stat().st_size
    if name.startswith("fig"):
        assert not (tmp_path / f"{name}.md").exists()
        return
    text = (tmp_path / f"{name}.md").read_text()
    assert all(f"| {arm} |" in text for arm in experiment.arms)


def test_surfaces_are_drawn_side_by_side(tmp_path: Path) -> None:
    study = EXPERIMENTS["fig5"].study(SMOKE, CASES)
    path = tmp_path / "fig5.jsonl"
    lines = Lines(finish(study, lambda run: run.recipe.lr))
    for arm in study.arms:
        (run,) = study.fresh(CASES[0], arm, lines)
        surface = [[2.0, 1.0], [1.5, 3.0]]
        ledger.append(path, {"config": run.config, "axis": [-1.0, 1.0], "surface": surface})
    assert not missing_surfaces(study, lines, path)
    write_report("fig5", study, lines, tmp_path / "fig5", path)
    assert (tmp_path / "fig5.png").read_bytes().startswith(b"\x89PNG")
    tuned_anew = Lines(finish(study, lambda run: 1 - run.recipe.lr))
    assert missing_surfaces(study, tuned_anew, path) == study.pairs


def test_the_search_halves_by_the_gain_over_both_hosts_and_trains_where_the_bare_host_is_best() -> None:
    experiment = EXPERIMENTS["search"]
    cases = experiment.cases(SMOKE, archs=["resnet8"])
    assert {case.host for case in cases} == {"irnet", "recu"}
    search = experiment.search(SMOKE, cases, ["HBNN", "per layer", "point_lr 3"])
    gains = {"HBNN": 0.01, "per layer": -0.02, "point_lr 3": 0.03}

    def accuracy(run: Run) -> float:
        best = run.recipe.lr == (0.1 if run.host == "irnet" else 0.3)
        return 0.5 + 0.1 * best + gains.get(run.arm, 0.0)

    done = finish(search, accuracy)
    lines = Lines(done)
    first, second = SMOKE.rungs
    assert search.survivors(1, lines) == ["point_lr 3"]
    trained = {(d["config"]["arm"], d["config"]["recipe"]["epochs"]) for d in done}
    assert {arm for arm, epochs in trained if epochs == first} == {BARE, *gains}
    assert {arm for arm, epochs in trained if epochs == second} == {BARE, "point_lr 3"}
    for d in done:
        if d["config"]["arm"] != BARE:
            assert d["config"]["recipe"]["lr"] == (0.1 if d["config"]["host"] == "irnet" else 0.3)
            assert d["config"]["split"] == "validation"
    assert "| point_lr 3 | +3.00 |" in search_table(search, lines)


def test_arms_share_runs_under_whatever_name() -> None:
    """What Table I calls "HBNN, r = 0.05" is Table V's HBNN: one run serves both."""
    table1 = EXPERIMENTS["table1"].study(SMOKE, EXPERIMENTS["table1"].cases(SMOKE, archs=["resnet8"]))
    case = table1.cases[0]
    study = EXPERIMENTS["table5"].study(SMOKE, [case])
    mine, theirs = (s.run(case, a, 0.1, 0.0, 1, 0, "test") for s, a in ((table1, "HBNN, r = 0.05"), (study, "HBNN")))
    assert mine.key == theirs.key
    assert mine in Lines([line(theirs, 0.5)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_made_of_known_parts(name: str, preset: str) -> None:
    experiment = EXPERIMENTS[name]
    assert set(experiment.arms) <= ARMS.keys()
    cases = experiment.cases(PRESETS[preset])
    assert experiment.study(PRESETS[preset], cases).missing(Lines([]))


def test_what_a_preset_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="no vgg_small in this experiment, which has cifar10 resnet8"):
        EXPERIMENTS["table5"].cases(PRESETS["small"], archs=["vgg_small"])
    with pytest.raises(ValueError, match="take small or medium"):
        EXPERIMENTS["search"].search(PRESETS["paper"], CASES)


def test_surfaces_that_have_yet_to_be_worked_out_are_told_of(tmp_path: Path) -> None:
    experiment, preset = EXPERIMENTS["fig5"], PRESETS["smoke"]
    study = experiment.study(preset, experiment.cases(preset, ["plain"], ["resnet8"]))
    with pytest.raises(ValueError, match=r"fig5-smoke\.jsonl has no surface of these networks"):
        write_report("fig5", study, Lines([]), tmp_path / "fig5-smoke", tmp_path / "fig5-smoke.jsonl")

"""The races' harness: statistics, equal results first, what is stored, missing peers; no peer needs to be installed."""

import json
import math
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.harness import Heat, Race, ResultsDiffer, outcome, ratio_statistics, relative_difference, run_heat, run_race


def lane(value, calls=None):
    """A lane that gives a value and writes down when it was run."""

    def make():
        def run():
            if calls is not None:
                calls.append(value)
            return torch.as_tensor(value, dtype=torch.float64)

        return run

    return make


def missing():
    raise ModuleNotFoundError("No module named 'nothing_of_the_kind'")


def a_race(*heats, name="tiny"):
    return Race(name, "Ours against theirs", "They are the same.", lambda quick: iter(heats))


def quiet(_line):
    pass


# ---- statistics


def test_ratios_are_paired_by_round_with_median_and_quartiles():
    found = ratio_statistics([1.0, 4.0, 3.0, 4.0, 10.0], [1.0, 2.0, 1.0, 1.0, 2.0])  # 1, 2, 3, 4, 5
    assert found == {"ratio": 3.0, "low": 2.0, "high": 4.0}
    assert ratio_statistics([1.0], [2.0]) == {"ratio": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(
    ("low", "ratio", "high", "limit", "word"),
    [
        (0.7, 0.8, 0.9, None, "faster"),
        (1.1, 1.2, 1.3, None, "slower"),
        (0.9, 0.95, 1.01, None, "even"),
        (0.975, 0.985, 0.99, None, "even"),
        (1.005, 1.015, 1.03, None, "even"),
        (0.003, 0.004, 0.005, 0.01, "within the limit"),
        (0.009, 0.011, 0.012, 0.01, "above the limit"),
    ],
)
def test_outcomes(low, ratio, high, limit, word):
    assert outcome({"low": low, "ratio": ratio, "high": high}, limit) == word


def test_differences_are_relative_to_the_largest_value():
    assert relative_difference([torch.tensor([1.0, 2.0]), 4.0], [torch.tensor([1.0, 2.0]), 5.0]) == pytest.approx(0.2)
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == math.inf


def test_rounds_are_interleaved_and_the_first_one_warms_up():
    calls = []
    runs = {name: lane(i, calls)() for i, name in enumerate(("ours", "a", "b"))}
    seconds = harness.time_lanes(runs, 2)
    assert calls == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert all(len(s) == 2 and min(s) > 0 for s in seconds.values())


def test_the_cpu_clock_does_not_count_waiting():
    assert harness.time_lanes({"sfumato": lambda: time.sleep(0.02)}, 1, "cpu")["sfumato"][0] < 0.01


def test_peak_counts_what_is_held_at_once():
    def large():
        held = torch.zeros(2**20)

        def run():
            for _ in range(3):
                held.clone()

        return run

    assert 8 * 2**20 <= harness.peak_allocation(large) < 9 * 2**20


# ---- equality


def test_a_heat_whose_results_differ_is_not_timed():
    calls = []
    heat = Heat("sums", {"sfumato": lane(1.0, calls), "peer": lane(1.001, calls)}, tolerance=1e-4)
    with pytest.raises(ResultsDiffer, match=r"sums: peer differs from sfumato by 9.99e-04, allowed is 1e-04"):
        run_heat(heat, 5, {})
    assert calls == [1.0, 1.001]


def test_a_result_that_is_not_a_number_differs():
    with pytest.raises(ResultsDiffer, match="nan"):
        run_heat(Heat("sums", {"sfumato": lane(1.0), "peer": lane(math.nan)}), 1, {})


def test_lanes_may_be_free_and_may_be_checked_by_others():
    heat = Heat(
        "sums",
        {"sfumato": lane(1.0), "peer": lane(2.0), "other": lane(3.0)},
        free=("other",),
        checks={"sfumato": lane(7.0), "peer": lane(7.0), "other": lane(0.0)},
        memory=False,
    )
    lanes = run_heat(heat, 2, {})["lanes"]
    assert (lanes["peer"]["difference"], lanes["other"]["difference"]) == (0.0, None)
    assert not any("peak_mb" in found for found in lanes.values())


# ---- results


def test_a_missing_peer_is_skipped_with_a_line_and_the_rest_is_stored(tmp_path):
    said = []
    first = Heat("sums", {"sfumato": lane(1.0), "peer": lane(1.0), "curvlinops": missing})
    second = Heat("nobody there", {"sfumato": lane(1.0), "curvlinops": missing})
    result = run_race(a_race(first, second), rounds=2, say=said.append)
    told = "curvlinops: No module named 'nothing_of_the_kind'; pip install curvlinops-for-pytorch"
    assert result["skipped"] == {"curvlinops": told}
    assert said[-1] == f"  skipped {told}"
    stored = json.loads(harness.store(result, tmp_path / "results").read_text())
    assert stored == result
    assert set(stored) == {"race", "title", "why", "date", "machine", "processes", "rounds", "clock", "heats", "skipped"}
    assert set(stored["machine"]) == {"cpu", "cores", "threads", "load", "python", "versions"}
    assert "torch" in stored["machine"]["versions"]
    (heat,) = stored["heats"]
    assert set(heat) == {"name", "limit", "tolerance", "lanes"}
    assert set(heat["lanes"]["sfumato"]) == {"ms", "peak_mb"}
    assert set(heat["lanes"]["peer"]) == {"ms", "peak_mb", "ratio", "low", "high", "outcome", "difference"}


def test_our_own_lane_must_be_there():
    with pytest.raises(RuntimeError, match="our own lane"):
        run_heat(Heat("sums", {"sfumato": missing, "peer": lane(1.0)}), 1, {})


# ---- the command


@pytest.fixture
def races(monkeypatch, tmp_path):
    """Two races, one of which fails, and a folder for the results."""
    equal = Heat("equal", {"sfumato": lane(1.0), "peer": lane(1.0)}, memory=False)
    unequal = Heat("unequal", {"sfumato": lane(1.0), "peer": lane(2.0)})
    found = {"differs": a_race(unequal, name="differs"), "fine": a_race(equal, name="fine")}
    monkeypatch.setattr(harness, "load_races", lambda: found)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_a_race_that_fails_is_loud_and_the_others_still_run(races, capsys):
    assert command.main(["--all", "--rounds", "2"]) == 1
    assert "FAILED differs: ResultsDiffer: unequal: peer differs from sfumato by 5.00e-01" in capsys.readouterr().err
    assert [path.name for path in races.iterdir()] == ["fine.json"]
    assert json.loads((races / "fine.json").read_text())["rounds"] == 2


def test_quick_stores_nothing(races):
    assert command.main(["fine", "--quick"]) == 0
    assert not list(races.iterdir())


def test_unknown_and_missing_names(races, capsys):
    assert command.main(["fina"]) == 2
    assert command.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "no race 'fina'; there are differs, fine",
        "name a race, or say --all; there are differs, fine",
    ]


def test_list_names_every_race_without_its_peers(capsys):
    assert command.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(harness.load_races())
    assert {"adahessian", "mae", "color_masks", "curvature", "sampling", "cbsn", "engine_bare", "engine_processes"} <= set(names)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        *("color_masks", "hard_masks", "frequencies", "sampling", "sampling_overhead", "encoder_once"),
        *("information_bins", "information_kde"),
        *(pytest.param(name, marks=SLOW) for name in ("adahessian", "cbsn", "engine_bare")),
    ],
)
def test_races_whose_peers_are_dependencies_agree(name):
    """The small sizes, one round: results are compared, times are not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_race(harness.load_races()[name], rounds=1, quick=True, say=quiet)
    torch.set_num_threads(threads)
    assert result["heats"]
    assert set(result["skipped"]) <= {"pytorch_optimizer", "k-diffusion"}


@pytest.mark.slow
def test_two_processes_are_two():
    result = run_race(harness.load_races()["engine_processes"], rounds=1, quick=True, say=quiet)
    assert result["processes"] == 2
    assert result["heats"][0]["lanes"]["accelerate"]["difference"] < 1e-3

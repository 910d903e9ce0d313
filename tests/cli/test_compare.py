"""`sfumato compare`: in real processes, from the words to the page; what it refuses in one line."""

import json

import pytest

ARMS = ["adam=classifier:optimizer=adam,lr=1e-2", "sgd=classifier:optimizer=sgd,lr=1e-2"]
WORDS = ["compare", *ARMS, "--data", "sample:digits", "--device", "cpu", "--set", "batch_size=16"]


def test_from_the_words_to_the_page_and_on(sfumato, tmp_path):
    done = sfumato(*WORDS, "--steps", "3", "--seeds", "2")
    assert done.code == 0, done.err
    folder = tmp_path / "compared" / "adam-sgd"
    record = json.loads((folder / "record.json").read_text())
    assert set(record["figures"]) == {"0", "1"}
    assert all(c["memory"] > c["resting_memory"] > 0 for seed in record["costs"].values() for c in seed.values())
    assert "accuracy" in done.out
    assert "no verdict: fewer than 5 seeds" in done.out
    assert "adam, seed 0 took" in done.err
    assert (folder / "report.html").stat().st_size > 10_000
    assert f"report: {folder.relative_to(tmp_path) / 'report.html'}" in done.out
    again = sfumato(*WORDS, "--steps", "3", "--seeds", "2", "--json")
    found = json.loads(again.out)
    assert found["kept"] == 4
    assert found["figures"] == record["figures"]
    assert [row["arm"] for row in found["table"]] == ["adam", "sgd"]
    assert "took" not in again.err
    assert found["command"].startswith(f"sfumato compare {ARMS[0]} {ARMS[1]} --data sample:digits --seeds 2 --steps 3")


def test_a_dry_run_tells_the_cost_and_writes_nothing(sfumato, tmp_path):
    done = sfumato(*WORDS, "--minutes", "0.01", "--dry-run")
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("adam:", "sgd:", "s a step", "GiB at the peak", "in all: 10 trainings"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mae", "--data", "sample:digits"], "two arms or more"),
        (["mae", "colourmae", "--data", "sample:digits"], "colormae"),
        (["mae", "classifier", "--data", "sample:digits"], "same kind of batch"),
        (["mae", "cbsn", "--data", "sample:photos"], "same thing"),
        (["mae", "adahessian", "--data", "sample:digits"], "sfumato train classifier"),
        (["mae", "simmim", "--data", "nowhere/"], "nowhere"),
        (["mae", "simmim", "--data", "sample:digits", "--steps", "1", "--minutes", "1"], "not both"),
        (["mae", "simmim", "--data", "sample:digits", "--minutes", "0"], "positive"),
        (["mae", "simmim", "--data", "sample:digits", "--set", "nonsense"], "NAME=VALUE"),
        (["mae", "simmim", "--data", "sample:digits", "--set", "depht=2"], "depth"),
        (["classifier:loss=comp_sum", "classifier", "--data", "sample:photos"], "needs a label"),
    ],
)
def test_refusals_are_one_line(sfumato, tmp_path, words, told):
    done = sfumato("compare", *words, "--device", "cpu")
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("sfumato: ")]
    assert told in line
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_stop_says_how_to_go_on(sfumato, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sfumato.cli.compare.run_trials", stop)
    done = sfumato(*WORDS)
    assert done.code == 130
    assert "the same command goes on" in done.err

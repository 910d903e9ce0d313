"""The catalogue: all papers, with facts that agree with the code, and answers that help."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from pydantic import Field

from sfumato import catalogue
from sfumato.catalogue import FAMILIES, KINDS, NoMethod, Setting
from sfumato.claim import Claim
from sfumato.errors import NotBuilt, UnknownName
from sfumato.method import Method, MethodConfig

ROWS = catalogue.load()
PAPERS = [row for row in ROWS.values() if row.kind != "base"]
BUILT = [row for row in ROWS.values() if row.built]
BATCHES = {"images", "labelled", "pairs", "video", "boxes", "multiview", "arrays", "generated", "anything"}


def test_all_papers_and_bases_are_there():
    assert len(PAPERS) == 63
    assert set(ROWS) - {row.slug for row in PAPERS} == {"mae", "simmim", "ddpm", "classifier", "regressor"}
    assert {row.family for row in PAPERS} == set(FAMILIES)
    assert len({row.title for row in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_row_is_complete(row):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug)
    assert row.kind in KINDS
    assert row.batch in BATCHES
    module, _, name = row.module.partition(":")
    assert module == f"sfumato.papers.{row.family}.{row.slug.replace('-', '_')}"
    assert bool(name) == (row.kind in {"method", "base"})
    assert row.summary.endswith(".")
    assert len(row.summary) <= 85
    assert "\n" not in row.summary + row.claim + row.scale
    assert row.title
    assert row.scale
    assert row.code_licence
    assert row.authors or row.authors_note
    assert 2 <= len(row.tags) <= 8
    assert row.run or row.trains, "a part or study says what to run"


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row.slug)
def test_paper_has_its_facts(row):
    assert row.year is not None
    assert 2015 <= row.year <= 2026
    assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.claim
    assert row.fidelity
    assert row.parts


def test_parts_name_their_room():
    rooms = {"masks", "physics", "nn", "losses", "optim", "attacks", "diffusion", "metrics", "sparsity", "probes", "data"}
    parts = [part for row in ROWS.values() for part in row.parts]
    assert all(re.fullmatch(r"[a-z]+\.\w+", part) and part.split(".")[0] in rooms for part in parts)


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.slug)
def test_built_row_agrees_with_the_code(row):
    package = Path(catalogue.__file__).parent
    for part in row.parts:
        room, name = part.split(".")
        assert f" as {name}\n" in (package / room / "__init__.pyi").read_text(), f"{part} is not public"
    if row.trains:
        method = catalogue.load_method(row.slug)
        assert issubclass(method, Method)
        assert list(row.settings) == catalogue.settings_of(method.Config), "run: python -m sfumato.catalogue --write"
        assert all(setting.help for setting in row.settings), "every setting says what it is"
    if row.kind != "base":
        claims = catalogue.load_claim(row.slug)
        assert claims
        assert all(isinstance(claim, Claim) for claim in claims.values())


# finding


def test_find_names_the_nearest():
    assert catalogue.find("cbsn").year == 2023
    with pytest.raises(UnknownName, match="colormae"):
        catalogue.find("colourmae")
    with pytest.raises(UnknownName, match="lazy-to-rich"):
        catalogue.find("grokking")  # no such slug, but a word that two papers are about
    with pytest.raises(UnknownName, match="lists all"):
        catalogue.find("qqqq")


def test_search_needs_every_word_and_ranks():
    assert len(catalogue.search()) == len(ROWS)
    assert catalogue.search(["adahessian"])[0].slug == "adahessian"
    assert catalogue.search(["masked", "autoencoder"])[0].slug == "mae"
    both = catalogue.search(["grokking", "softmax"])
    assert [row.slug for row in both] == ["stablemax-perpgrad"]
    assert catalogue.search(["grokking", "qqqq"]) == []
    assert {row.family for row in catalogue.search(["diffusion"], family="diffusion")} == {"diffusion"}
    with pytest.raises(UnknownName, match="masking"):
        catalogue.search(family="maskin")


def test_search_ignores_case_and_accents():
    for word in ("Schölkopf", "schölkopf", "Scholkopf"):
        assert [row.slug for row in catalogue.search([word])] == ["mode-connectivity"]


def test_related_papers_share_a_family_or_parts():
    row = catalogue.find("m-fac")
    near = catalogue.related(row, built=False)
    assert row not in near
    assert all(other.family == row.family for other in near[:3])
    assert all(other.built for other in catalogue.related(row))


@pytest.fixture
def unbuilt(monkeypatch):
    """The catalogue with one paper taken out again."""
    rows = {**ROWS, "hpm": dataclasses.replace(ROWS["hpm"], built=False)}
    monkeypatch.setattr(catalogue, "load", lambda: rows)


@pytest.mark.usefixtures("unbuilt")
def test_what_is_not_built_says_what_is():
    with pytest.raises(NotBuilt, match=r"hpm is not built yet \(method: .*nearest: .*mae.*sfumato show hpm"):
        catalogue.load_method("hpm")
    with pytest.raises(NotBuilt, match="not built yet"):
        catalogue.load_claim("hpm")
    with pytest.raises(NoMethod, match="sfumato train classifier --data WHERE --set optimizer=adahessian"):
        catalogue.load_method("adahessian")


# records


def test_verdict_comes_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path)
    assert catalogue.record("cbsn") is None
    assert catalogue.verdict(ROWS["cbsn"]) == "not run yet"
    assert catalogue.verdict(dataclasses.replace(ROWS["hpm"], built=False)) == "not yet"

    def store(*verdicts):
        (tmp_path / "cbsn.json").write_text(json.dumps({"slug": "cbsn", "claims": [{"verdict": v} for v in verdicts]}))

    store("inconclusive")
    assert catalogue.verdict(ROWS["cbsn"]) == "inconclusive"
    store("reproduced", "reproduced")
    assert catalogue.verdict(ROWS["cbsn"]) == "reproduced"
    store("reproduced", "not reproduced")
    assert catalogue.verdict(ROWS["cbsn"]) == "1 of 2 reproduced"


# settings


class Config(MethodConfig):
    """A small example."""

    lr: float | None = Field(1e-3, description='the "rate"')
    widths: tuple[int, ...] = Field((8, 16), description="channels")
    shuffle: bool = Field(True, description="mix samples")
    channels: int | None = Field(None, description="from the data")

    @classmethod
    def small(cls, **over):
        return cls(**{"widths": (4,), **over})


def test_settings_of_a_config():
    rows = {row.name: row for row in catalogue.settings_of(Config)}
    assert list(rows) == ["steps", "batch_size", "clip_norm", "lr", "widths", "shuffle", "channels"]
    assert rows["lr"] == Setting("lr", "float | None", 'the "rate"', 1e-3)
    assert rows["widths"] == Setting("widths", "tuple[int, ...]", "channels", [8, 16], [4])
    assert rows["channels"].default is None
    assert rows["shuffle"].default is True


def test_writing_settings_keeps_every_other_byte():
    head, tail = "# a comment\n\n[one]\nx = 1\nsettings = []\ny = [\n  2,\n]\n", "\n[two]\nsettings = []\nz = 'é'\n"
    settings = catalogue.settings_of(Config)
    written = catalogue._with_settings(head + tail, "one", settings)
    assert written.startswith(head.split("settings")[0])
    assert written.endswith("y = [\n  2,\n]\n" + tail)
    assert catalogue._with_settings(written, "one", settings) == written
    assert catalogue._with_settings(written, "one", []) == head + tail
    if catalogue.sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    assert [Setting(**row) for row in tomllib.loads(written)["one"]["settings"]] == settings
    with pytest.raises(ValueError, match="three"):
        catalogue._with_settings(written, "three", settings)


def test_refresh_writes_only_what_changed(tmp_path, monkeypatch):
    file = tmp_path / "catalogue.toml"
    text = catalogue.FILE.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(catalogue, "FILE", file)
    monkeypatch.setattr(catalogue, "load_method", lambda slug: type("M", (), {"Config": Config}))
    catalogue.load.cache_clear()
    try:
        trains = [row.slug for row in BUILT if row.trains]
        assert catalogue.refresh_settings(write=False) == trains
        assert file.read_text(encoding="utf-8") == text
        assert catalogue.refresh_settings() == trains
        assert catalogue.refresh_settings() == []
        assert list(catalogue.load()[trains[0]].settings) == catalogue.settings_of(Config)
        assert catalogue.load()["adahessian"] == ROWS["adahessian"]
    finally:
        catalogue.load.cache_clear()


@pytest.mark.parametrize("slug", [slug for slug, row in catalogue.load().items() if row.built and catalogue.record(slug)])
def test_a_record_is_of_the_claims_as_they_are_now(slug):
    claims, stored = catalogue.load_claim(slug), catalogue.record(slug)["claims"]
    assert set(claims) == {c["name"] for c in stored}
    for c in stored:
        claim = claims[c["name"]]
        assert (claim.statement, claim.note) == (c["statement"], c["note"])
        assert [str(condition) for condition in claim.conditions] == [f["condition"] for f in c["findings"]]
        assert set(c["figures"]) == {str(seed) for seed in claim.seeds}

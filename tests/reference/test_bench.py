"""``make bench``: both sides of a row do the same, and a planted slowdown or fault is seen.

No test here says how fast anything is.
"""

import json

import pytest
import torch

from reference import bench
from reference.systems import quiet

ROWS = [name for name, entry in bench.SUBJECTS.items() if entry.size == bench.BOOK]


@pytest.fixture(autouse=True)
def hushed():
    with quiet():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_both_sides_do_the_same(name):
    two = bench.SUBJECTS[name].build()
    ours, theirs = two.ours(), two.theirs()
    assert ours.shape == theirs.shape and ours.std() > 0.01
    # float32; DALL·E 2's many steps of networks that know nothing amplify its rounding.
    assert (ours - theirs).abs().max() < (1e-2 if name == "dalle2" else 1e-4)


def test_the_sides_share_their_memory():
    ours, theirs = bench.unet(bench.BOOK_UNET)
    places = {name: p.data_ptr() for name, p in ours.named_parameters()}
    assert places == {name: p.data_ptr() for name, p in theirs.named_parameters()}
    assert 2e6 < sum(p.numel() for p in ours.parameters()) < 8e6


def work(seed: int = 0) -> bench.Two:
    x = torch.randn(192, 192, generator=torch.Generator().manual_seed(seed))

    def once() -> torch.Tensor:
        for _ in range(20):
            y = x @ x
        return y

    return bench.Two(once, once)


@pytest.fixture
def planted(monkeypatch):
    def plant(build):
        entry = bench.Subject(build, bench.BOOK, "planted", share=True)
        monkeypatch.setitem(bench.SUBJECTS, "planted", entry)
        return bench.measure("planted", 15)

    return plant


def test_work_done_twice_by_ours_is_a_missed_bar(planted):
    def build():
        once = work().ours
        return bench.Two(lambda: (once(), once())[1], once)

    row = planted(build)
    assert 0.4 < row["ratio"]["median"] < 0.6 and row["ratio"]["high"] < 0.8
    assert "bar 1.0 missed, aim 1.3 missed" in bench.line(row)
    # the same arithmetic counted once by hand: twenty products, twice
    assert row["flops"] == 2 * 20 * 2 * 192**3
    assert 0 < row["share_of_product"]["median"] < 1.5


def test_work_done_twice_by_theirs_is_a_met_bar(planted):
    def build():
        once = work().ours
        return bench.Two(once, lambda: (once(), once())[1])

    row = planted(build)
    assert 1.7 < row["ratio"]["median"] < 2.5
    assert "bar 1.0 met, aim 1.3 met" in bench.line(row)


def test_other_outputs_show(planted):
    def build():
        return bench.Two(work(0).ours, lambda: work(0).ours() + 0.5)

    row = planted(build)
    assert row["greatest_difference"] == pytest.approx(0.5, rel=1e-4)
    assert "5.0e-01" in bench.line(row)


def test_memory_held_twice_shows(planted):
    """Theirs keeps two large tensors where ours keeps one."""
    mega = 2**20

    def build():
        def ours() -> torch.Tensor:
            return torch.ones(4 * mega).sum()

        def theirs() -> torch.Tensor:
            both = torch.ones(4 * mega), torch.ones(4 * mega)
            return both[0].sum() + 0 * both[1][0]

        return bench.Two(ours, theirs)

    row = planted(build)
    if "memory_ratio" not in row:
        pytest.skip("this system does not tell how much memory a process holds")
    assert 1.7 < row["memory_ratio"]["low"] <= row["memory_ratio"]["high"] < 2.3
    assert 15 * mega < row["ours_bytes"]["median"] < 20 * mega
    assert f"{row['ours_bytes']['median'] / 1e6:.1f} MB" in bench.line(row)


@pytest.mark.parametrize(
    ("options", "why"),
    [(["speed"], "there is no row 'speed'"), (["unet", "--store"], "name none")],
)
def test_options_that_make_no_sense(options, why, capsys):
    with pytest.raises(SystemExit):
        bench.main(options)
    assert why in capsys.readouterr().err


def test_counts_of_pairs(monkeypatch, capsys):
    """A plain run leaves out what takes hours; what is named is done; --whole does thirty."""
    asked = []
    monkeypatch.setattr(bench, "rows", lambda pairs: asked.append(dict(pairs)) or iter(()))
    monkeypatch.setattr(bench.bench, "main", lambda names: 0)
    bench.main([])
    bench.main(["life-unet-512", "life-picture-512"])
    bench.main(["--whole"])
    plain, named, full = asked
    assert plain.keys() < full.keys() == bench.SUBJECTS.keys()
    assert set(full.values()) == {30} and plain["unet"] == 30 and plain["life-unet-512"] == 6
    assert named == {"life-unet-512": 6, "life-picture-512": 6}


# --- the stored result ---------------------------------------------------------------------------


def test_the_stored_result_is_whole_and_of_these_rows():
    found = json.loads(bench.STORED.read_text("utf-8"))
    assert found["command"].startswith("python make.py bench --store")
    assert all(found[key] for key in ("date", "machine", "torch", "diffusers", "transformers"))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() >= {n for n, entry in bench.SUBJECTS.items() if entry.pairs}
    for name, row in rows.items():
        assert (row["what"], row["size"]) == (bench.SUBJECTS[name].what, bench.SUBJECTS[name].size)
        assert row["pairs"] >= 6
        for key in ("ratio", "ratio_by_the_clock", "ours_seconds", "ours_bytes", "memory_ratio"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
            assert row[key]["confidence"] >= 0.95
        assert row["greatest_difference"] < 1e-2 * max(1.0, row["greatest_value"])
    two = bench.SUBJECTS["unet"].build()
    with torch.no_grad():
        assert rows["unet"]["flops"] == bench.bench.flops(two.ours)

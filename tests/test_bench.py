"""The table of speeds: it names what it cannot find, and every row has measurements."""

import pytest

from companion import bench


def test_a_registered_benchmark_gets_its_row(monkeypatch, capsys):
    monkeypatch.setattr(bench, "BENCHMARKS", {})
    bench.benchmark("a thing", "things", "≥ 2")(lambda: [3.0, 1.0, 2.5])
    (name,) = bench.BENCHMARKS
    assert bench.main([name]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["a", "thing", "2.5", "1", "…", "3", "things", "≥", "2"]


def test_an_unknown_name_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "import_time" in capsys.readouterr().err

"""The benchmark of waiting threads: both environments, in turn, quiet and beside a neighbour."""

from helpers.checkout import benchmarks

waiting = benchmarks("waiting")


def test_the_sides_differ_in_the_policy_alone(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    spinning, passive = map(waiting.environment, waiting.SIDES)
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"} & spinning.keys()
    assert passive == spinning | {"OMP_WAIT_POLICY": "PASSIVE"}


def test_every_cell_is_measured_and_the_neighbours_end(monkeypatch, capsys):
    times, started = iter([0.005, 0.006, 0.006, 0.005, 0.060, 0.009, 0.009, 0.060]), []
    monkeypatch.setattr(waiting, "measure", lambda side, seconds: next(times))
    popen = waiting.subprocess.Popen
    monkeypatch.setattr(waiting.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    waiting.main(["--rounds", "2"])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].split() == ["quiet", "5.00", "6.00", "1.20x"]
    assert rows[1].split() == ["1", "busy", "neighbour", "60.00", "9.00", "0.15x"]
    assert len(started) == 1 and started[0].poll() is not None


def test_the_worker_measures():
    assert 0 < waiting.measure("PASSIVE", 0.05) < 60

"""`dev.py test`: which tests it runs, and the memory that it tells at its end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import psutil
import pytest

from tools import commands
from tools.check import checks, usage

SIZE = 256 << 20
HOLDER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
touched = sum(mapped[place] for place in range(0, len(mapped), 4096))
own = bytearray(b"1") * int(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("words", "everything"), [(["--all", "-k", "some"], True), (["-k", "some"], False)])
def test_all_is_for_us_and_the_rest_for_pytest(words: list[str], everything: bool) -> None:
    options, further = commands.parser("test").parse_known_args(words)
    assert (options.all, further) == (everything, ["-k", "some"])


def test_without_all_the_nightly_tests_are_left_out() -> None:
    """Asked of pytest with the arguments that `dev.py test` gives it."""

    def collected(everything: bool) -> str:
        listing = ["--numprocesses=0", "--collect-only", "-q", "tests/dev/test_testhost.py"]
        command = [sys.executable, "-m", "pytest", *checks.arguments(everything), *listing]
        done = subprocess.run(command, cwd=checks.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert "test_an_environment_is_built_once" in collected(everything=True)
    by_day = collected(everything=False)
    assert "test_an_environment_is_built_once" not in by_day
    assert "test_only_comfyui_is_unpacked" in by_day


@pytest.fixture
def holders() -> Iterator[list[psutil.Process]]:
    """Two processes that hold the same memory, and one of them as much of its own."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # of which nothing is written to a disk meanwhile
        file.write(b"1" * SIZE)
        file.flush()
        command = [sys.executable, "-c", HOLDER, file.name]
        started = [
            subprocess.Popen([*command, str(own)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for own in (0, SIZE)
        ]
        try:
            assert [holder.stdout.readline() for holder in started if holder.stdout] == ["ready\n"] * 2
            yield [psutil.Process(holder.pid) for holder in started]
        finally:
            for holder in started:
                holder.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's share of shared pages is not known")
def test_the_memory_of_every_process_counts_and_what_they_share_counts_once(
    holders: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(holders) < set(usage.processes())
    monkeypatch.setattr(usage, "processes", lambda: holders)
    assert 2 * SIZE < sum(usage.own_share()) < 2.5 * SIZE
    assert 3 * SIZE < sum(usage.resident()) < 3.5 * SIZE

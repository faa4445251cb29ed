"""Compiled code in files: what is not used for longest goes, and what goes is made again."""

import os
import threading

import pytest

from ppvae.staging import artifacts
from ppvae.staging.artifacts import compiled, folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A compiler of no time: a file has a megabyte, and its first byte is that of the graph."""
    place = tmp_path / "kept"
    monkeypatch.setenv("PPVAE_CACHE", f"{place}")
    monkeypatch.setattr(artifacts, "_compile", lambda graph, inputs: graph)

    def pack(files, path):
        path.write_bytes(bytes([files]) * 10**6)
        return path

    monkeypatch.setattr(artifacts, "_pack", pack)
    monkeypatch.setattr(artifacts, "_loaded", lambda path: path.read_bytes()[0])
    return place


def make(number, made=None):
    """What `compiled` returns for a graph of that number; notes whether it is made."""

    def graph():
        if made is not None:
            made.append(number)
        return number, []

    return compiled([f"{number}"], graph)


def age(place):
    """Makes all files there an hour older."""
    for path in place.iterdir():
        told = path.stat()
        os.utime(path, (told.st_atime - 3600, told.st_mtime - 3600))


def test_what_was_not_used_for_longest_is_removed(cache, monkeypatch):
    monkeypatch.setenv("PPVAE_CACHE_MB", "3")
    made = []
    for number in (1, 2, 3):
        assert make(number, made) == number
        age(cache)
    (cache / "notes.txt").write_text("mine")
    (cache / "mine.pt2").write_bytes(b"0" * 10**7)
    assert make(1, made) == 1 and made == [1, 2, 3]  # used now
    age(cache)
    assert make(4, made) == 4 and len([*cache.iterdir()]) == 5
    for number in (1, 3, 4):  # the second one has gone
        assert make(number, made) == number
    assert made == [1, 2, 3, 4]
    assert make(2, made) == 2 and made == [1, 2, 3, 4, 2]
    assert (cache / "notes.txt").exists() and (cache / "mine.pt2").exists()


@pytest.mark.parametrize("told", ["0", "2"])
def test_the_file_that_was_just_made_stays(told, cache, monkeypatch):
    monkeypatch.setenv("PPVAE_CACHE_MB", told)
    for number in (1, 2, 3):
        make(number)
        age(cache)
    assert len([*cache.iterdir()]) == max(1, int(told))
    assert make(3, made := []) == 3 and not made


def test_the_bound_is_256_megabytes_and_a_wrong_one_is_refused(cache, monkeypatch):
    assert artifacts._bound() == 256 * 10**6
    for told in ("-1", "many", "1.5"):
        monkeypatch.setenv("PPVAE_CACHE_MB", told)
        with pytest.raises(ValueError, match="PPVAE_CACHE_MB: expected a number of meg"):
            make(1)


def test_what_a_killed_process_left_goes_after_a_day(cache, monkeypatch):
    make(1)
    old, new = (cache / f".{'a' * 32}.pt2.{number}.0.part" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    make(2)
    assert new.exists() and not old.exists()


def test_a_file_that_is_gone_when_it_is_to_be_loaded_is_made_elsewhere(cache, monkeypatch):
    """As where another process removes it, before or after it was written."""
    make(1)
    (path,) = cache.iterdir()

    def gone(path):
        path.unlink()
        raise RuntimeError("no such file")

    monkeypatch.setattr(artifacts, "_loaded", gone)
    with pytest.raises(RuntimeError):  # nor can it be loaded elsewhere
        make(1)
    read, tried = (lambda path: path.read_bytes()[0]), []

    def once(path):
        tried.append(path)
        return gone(path) if len(tried) <= 1 else read(path)

    monkeypatch.setattr(artifacts, "_loaded", once)
    assert make(1) == 1 and len({*tried}) == 2 and tried[-1].parent != folder()


def test_several_at_a_time_leave_whole_files(cache, monkeypatch):
    monkeypatch.setenv("PPVAE_CACHE_MB", "2")
    wrong = []

    def work(start):
        for number in range(start, start + 20):
            if make(number % 7) != number % 7:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(path.stat().st_size == 10**6 for path in cache.iterdir())

"""What workers write is kept to the byte, and shown in whole lines."""

import os
import random

import pytest

from distloop.launcher.logs import Console, Lines, Log, next_attempt, tail

STREAMS = [
    (b"one\ntwo\n", ["one", "two"]),
    (b"", []),
    (b"\n\n", ["", ""]),
    (b"no newline", ["no newline"]),
    (b"windows\r\n", ["windows"]),
    (b"10%\r50%\r100%\ndone\n", ["100%", "done"]),
    (b"10%\r50%\r", ["50%"]),
    (b"caf\xc3\xa9 \xff\xfe\n", ["café \ufffd\ufffd"]),
    (b"x" * 200_000 + b"\ny\n", ["x" * 65536, "x" * 65536, "x" * 65536, "x" * 3392, "y"]),
    (b"".join(b"%5d/99999\r" % number for number in range(20_000)) + b"end\n", ["end"]),
]


@pytest.mark.parametrize(("stream", "lines"), STREAMS, ids=range(len(STREAMS)))
def test_lines_are_those_that_a_terminal_shows_at_last_however_the_bytes_come(stream, lines):
    for seed in range(3):
        generator, splitter, found, rest = random.Random(seed), Lines(), [], stream
        while rest:
            size = generator.choice([1, 7, 4096, 65536]) if len(stream) < 1000 else 65536
            found += splitter.feed(rest[:size])
            rest = rest[size:]
        assert found + splitter.end() == lines


@pytest.mark.parametrize(("stream", "lines"), STREAMS, ids=range(len(STREAMS)))
def test_the_log_has_every_byte_and_the_console_whole_lines_with_the_rank(tmp_path, capfdbinary, stream, lines):
    reader, writer = os.pipe()
    log = Log(tmp_path / "rank_3/attempt_0.log", reader, Console({}), rank=3)
    for begin in range(0, len(stream), 50_000):
        os.write(writer, stream[begin : begin + 50_000])
        while log.pump() and os.fstat(log.descriptor) and _readable(reader):
            pass
    os.close(writer)
    log.close()
    assert (tmp_path / "rank_3/attempt_0.log").read_bytes() == stream
    assert capfdbinary.readouterr().out.decode() == "".join(f"[rank 3] {line}\n" for line in lines)


def _readable(descriptor):
    import select

    return select.select([descriptor], [], [], 0)[0]


def test_attempts_are_numbered_on_and_the_end_of_a_log_is_found(tmp_path):
    assert next_attempt(tmp_path / "rank_0") == 0
    (tmp_path / "attempt_0.log").touch()
    (tmp_path / "attempt_10.log").write_text("".join(f"line {number}\n\n" for number in range(10_000)))
    assert next_attempt(tmp_path) == 11
    assert tail(tmp_path / "attempt_10.log", 2) == ["line 9998", "line 9999"]

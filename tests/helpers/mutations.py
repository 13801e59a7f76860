"""Random changes of files, and a check of what a reader returns for a changed file."""

import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

EXTREMES = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
TEXTS = [b"NaN", b"-Infinity", b"1e999", b"null", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"[" * 5000, b"{"]
TEXTS += [b"\n", b"\r", b"../../etc/passwd", b"file:///etc/passwd", b"http://x/", b"1" * 5000, b"\\ud800", b"," * 50]
TEXTS += [b"\x1b[2J"]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 7, 20_000, 2**31, 2**63, 10**30, 0.5, -1.5, 1e-300, 1e308]
VALUES += ["", "x", "../x", "/etc/passwd", "a\n\x1b[2J", "1/0", "nan", [], {}, [[]], {"a": {}}, [0] * 1000, ["x", None]]


def mutated(data: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    """Flip, overwrite, insert, repeat or cut bytes; the first bytes of the file are changed most often."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        end = max(1, len(changed))
        place = rng.randrange(min(end, 100)) if rng.random() < 0.6 else rng.randrange(end)
        kind = rng.randrange(6)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[place : place + 4] = rng.choice(EXTREMES).to_bytes(4, rng.choice(["little", "big"]))  # type: ignore[arg-type]
        elif kind == 2:
            changed[place:place] = rng.choice(words)
        elif kind == 3:
            changed[place:place] = changed[place : place + rng.randrange(200)]
        elif kind == 4:
            del changed[place : place + rng.randrange(1, 50)]
        else:
            del changed[rng.randrange(end) :]
    return bytes(changed)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """Return a copy of a dict of JSON values with other values, types, keys or nesting at one to three places.

    Texts that are dicts in JSON themselves are changed inside.
    """
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(changed))
        if not places:
            break
        parent, key = rng.choice(places)
        old, kind = parent[key], rng.randrange(8)
        if isinstance(old, str) and old.startswith("{") and kind < 6:
            parent[key] = json.dumps(mutated_json(json.loads(old), rng))
        elif kind == 0 and isinstance(parent, dict):
            parent[rng.choice([f"{key}x", key.upper(), "class", "config"])] = parent.pop(key)
        elif kind == 1:
            del parent[key]
        elif kind == 2 and isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = rng.choice([-old, old + 1, old * 1000, old * 10**9, old / 2, str(old)])
        elif kind == 3:
            other_parent, other_key = rng.choice(places)
            parent[key] = json.loads(json.dumps(other_parent[other_key]))
        elif kind == 4:
            for _ in range(rng.choice([1, 2, 250])):
                parent[key] = {"class": "KMeansTokenizer", "config": {"encoder": parent[key]}}
        elif kind == 5:
            for _ in range(rng.choice([1, 300])):
                parent[key] = [parent[key]]
        else:
            parent[key] = rng.choice(VALUES)
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers of a JSON value with each of their keys or indices."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, or its ValueError; check computing time, memory and the form of the message."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        result = call(*arguments)
    except ValueError as error:
        result = error
        assert str(error) and "\n" not in str(error) and len(str(error)) < 20_000
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
    return result

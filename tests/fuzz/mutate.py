"""Damage bytes, plain values and folders at random: the same random numbers give the same damage."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-40, 1e308, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30),
    *("", " ", "x", "0", "-1", "null", "nan", "a\0b", "\ud800", "\u202e", "é", "../../x", "/etc/passwd", "x" * 300),
    *(".", "..", "auto", "none", "{", "{question}", "${name}", "${oc.env:HOME}", "http://[::1", "data:,", "x\ny"),
    *(float("nan"), float("inf"), -float("inf"), [], {}, [None], [[]], {"a": 1}, {"": {}}, ["x", "x"], {"type": "x"}),
]
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
CONTENTS = (b"", b"null", b"[]", b"{}", b"1", b"[" * 100_000, b"\xff\xfe{\0}\0", b"\0" * 100, b"\x80" * 50)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return bytes after one to four changes."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_BYTES)(data, chance)
    return data


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if changed:
            changed[_place(len(changed), chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _number(data: bytes, chance: random.Random) -> bytes:
    """Write a number that is a limit of its type, in either order of bytes, over some bytes."""
    form = chance.choice(("<I", ">I", "<H", ">H", "B"))
    packed = struct.pack(form, chance.choice(NUMBERS) & (256 ** struct.calcsize(form) - 1))
    start = _place(len(data), chance)
    return data[:start] + packed + data[start + len(packed) :]


def _remove(data: bytes, chance: random.Random) -> bytes:
    start, length = _place(len(data), chance), chance.choice((1, 2, 7, 100))
    return data[:start] + data[start + length :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    start = _place(len(data), chance)
    return data[:start] + chance.randbytes(chance.choice((1, 3, 50))) + data[start:]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start, length = _place(len(data), chance), chance.choice((1, 8, 200))
    return data[: start + length] + data[start:]


def _blank(data: bytes, chance: random.Random) -> bytes:
    start, length = _place(len(data), chance), chance.choice((4, 40, 400))
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


def _mark(data: bytes, chance: random.Random) -> bytes:
    """Write a character that delimits something in text formats over one byte."""
    start = _place(len(data), chance)
    return data[:start] + chance.choice((b'"', b"{", b"[", b"]", b":", b",", b"\n", b"\r", b"\t", b"\0", b"\xff", b"'",
                                         b"-", b"9", b"&", b"*", b"#", b"$", b"!")) + data[start + 1 :]  # fmt: skip


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_cut, _flip, _flip, _number, _number, _remove, _insert, _repeat, _blank, _mark, _mark),
)


def _place(length: int, chance: random.Random) -> int:
    """Return a position, in half of the cases one near the beginning, where headers are."""
    return chance.randrange(min(length, 64) if chance.random() < 0.5 else length) if length else 0


def changed(value: Any, chance: random.Random) -> Any:
    """Return a copy of a value of dictionaries, lists and scalars after one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        nodes = list(_nodes(value))
        if nodes:
            container, key = chance.choice(nodes)
            chance.choice(_VALUES)(container, key, chance)
    return value


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place inside a value: a container, and a key or index of it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _nodes(inner)


def _odd(container: Any, key: Any, chance: random.Random) -> None:
    container[key] = copy.deepcopy(chance.choice(ODD))


def _lose(container: Any, key: Any, chance: random.Random) -> None:
    del container[key]


def _rename(container: Any, key: Any, chance: random.Random) -> None:
    if isinstance(container, dict):
        container[chance.choice((f"{key}x", key[:-1], key.upper(), "type", "name", "extends"))] = container.pop(key)


def _wrap(container: Any, key: Any, chance: random.Random) -> None:
    container[key] = chance.choice(([container[key]], {"type": container[key]}, str(container[key])))


def _double(container: Any, key: Any, chance: random.Random) -> None:
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))


def _swap(container: Any, key: Any, chance: random.Random) -> None:
    other = chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _scale(container: Any, key: Any, chance: random.Random) -> None:
    value = container[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = chance.choice((-value, value * 1000, value + 1, value / 7, -1 - value, 0))


def _add(container: Any, key: Any, chance: random.Random) -> None:
    if isinstance(container, dict):
        container[chance.choice(("x", "type", "model", "", "name", "a.b", "weight", "__class__"))] = chance.choice(ODD)
    else:
        container.append(copy.deepcopy(chance.choice(ODD)))


_VALUES: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    *(_odd, _odd, _odd, _odd, _lose, _lose, _rename, _wrap, _double, _swap, _scale, _scale, _add),
)


def difference(before: Any, after: Any, path: str = "") -> str:
    """Return where two values differ, as ``path: before -> after``."""
    if type(before) is type(after) and isinstance(before, dict | list):
        pairs = [dict(value if isinstance(value, dict) else enumerate(value)) for value in (before, after)]
        keys = [*pairs[0], *(key for key in pairs[1] if key not in pairs[0])]
        missing = "nothing"
        parts = (difference(pairs[0].get(key, missing), pairs[1].get(key, missing), f"{path}.{key}") for key in keys)
        return "; ".join(filter(None, parts))
    same = type(before) is type(after) and repr(before) == repr(after)
    return "" if same else f"{path[1:]}: {str(before)[:60]!r} -> {repr(after)[:200]}"


def damage_file(file: Path, chance: random.Random, others: list[Path]) -> str:
    """Damage one file of a folder, and return how; ``others`` are files that may replace it."""
    kinds: dict[str, Callable[[], Any]] = {
        "missing": file.unlink,
        "replaced": lambda: file.write_bytes(chance.choice(CONTENTS)),
        "swapped": lambda: shutil.copy(chance.choice(others), file),
        "a folder": lambda: _put(file, Path.mkdir),
        "a pipe": lambda: _put(file, os.mkfifo),
        "a link to itself": lambda: _put(file, lambda path: path.symlink_to(path)),
        "a pickle": lambda: file.write_bytes(pickle.dumps(print)),
    }
    kinds |= {f"bytes {number}": lambda: file.write_bytes(damaged(file.read_bytes(), chance)) for number in range(6)}
    if file.suffix == ".json":
        kinds |= {f"values {number}": lambda: damage_json(file, chance) for number in range(12)}
    if file.suffix == ".safetensors":
        kinds |= {f"tensors {number}": lambda: damage_tensors(file, chance) for number in range(12)}
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return f"{file.name}: {kind}"


def _put(file: Path, make: Callable[[Path], Any]) -> None:
    """Put something else in a file's place."""
    file.unlink()
    make(file)


def damage_json(file: Path, chance: random.Random) -> None:
    """Change values of a JSON file, which stays JSON."""
    file.write_text(json.dumps(changed(json.loads(file.read_text()), chance)))


def damage_tensors(file: Path, chance: random.Random) -> None:
    """Change a safetensors file, which stays one: a tensor missing, new, of another shape or dtype, or NaN."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    kind = chance.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}.x"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor.flatten()[: max(0, tensor.numel() - 1)].clone()
    elif kind == 3:
        tensors[name] = torch.zeros(chance.choice(((0,), (), (1, 1, 1), (3, 7))), dtype=tensor.dtype)
    elif kind == 4:
        kinds = (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
        tensors[name] = tensor.to(chance.choice(kinds))
    elif kind == 5:
        tensors[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor * 0 - 1
    else:
        metadata = chance.choice((None, {}, {"format": "tf"}, {"state": "[", "sha256": "x"}))
    save_file(tensors, file, metadata=metadata)

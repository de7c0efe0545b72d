"""The rows of the feature cache: bit for bit, within their limits, and never a damaged one."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mllm.encoders.feature_rows import FeatureRows
from mllm.hub.verified import save_verified

SHAPE = (7, 13)  # no other test has tensors of it
ROW = 7 * 13 * 2  # bytes
GROUP = 4


def same(read: Tensor | None, number: int) -> bool:
    return read is not None and read.dtype == torch.bfloat16 and torch.equal(read, row(number))


def row(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).bfloat16()


def group(number: int) -> dict[str, Tensor]:
    """Rows that are computed together, as views of one tensor."""
    numbers = range(GROUP * number, GROUP * (number + 1))
    return dict(zip(map(str, numbers), torch.stack([row(each) for each in numbers]), strict=True))


def rows_in(folder: Path | None, *, limit: int | None = None, memory: int = 2**30, writers: int = 1) -> FeatureRows:
    return FeatureRows(folder, fits=lambda read: read.shape == SHAPE, limit=limit, memory=memory, writers=writers)


def filled(folder: Path, groups: int, **limits: Any) -> FeatureRows:
    rows = rows_in(folder, **limits)
    for number in range(groups):
        rows.put(group(number))
    rows.flush()
    return rows


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("memory", [0, 4096, 2**30])
@pytest.mark.parametrize("again", [True, False])
def test_rows_are_read_bit_for_bit_in_any_order(tmp_path, quiet, memory, again):
    rows = filled(tmp_path, 16, memory=memory)
    rows = rows_in(tmp_path, memory=memory) if again else rows
    for number in torch.randperm(16 * GROUP, generator=torch.Generator().manual_seed(0)).tolist():
        assert same(rows.get(str(number)), number)
    assert rows.get("64") is None and "64" not in rows and "63" in rows


def living() -> int:
    """Bytes of all rows that are in memory."""
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.shape == SHAPE]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("folder", [True, False])
def test_memory_stays_within_its_bound(tmp_path, quiet, folder):
    memory = 100 * ROW
    rows = rows_in(tmp_path if folder else None, memory=memory)
    most = 0
    for number in range(100):
        rows.put(group(number))
        most = max(most, living()) if number in (5, 40, 97, 98, 99) else most
    for number in range(0, 400, 3):
        rows.get(str(number))
    most = max(most, living())
    assert memory / 3 < most <= memory
    if not folder:  # those that were used last
        assert same(rows.get("399"), 399) and "0" not in rows
    rows.get("300")
    rows.put(group(200))
    assert "300" in rows


def test_rows_are_written_as_they_come_all_of_a_group_or_none(tmp_path, quiet):
    rows = rows_in(tmp_path, memory=8 * 4000)  # shards of 4,000 bytes
    for number in range(20):
        rows.put(group(number))
    left = rows_in(tmp_path)  # as after a kill
    there = [{str(GROUP * number + index) in left for index in range(GROUP)} for number in range(20)]
    assert all(len(each) == 1 for each in there)
    kept = [each == {True} for each in there]
    assert kept == sorted(kept, reverse=True) and sum(kept) >= 14  # the last shards may be missing
    assert all(path.stat().st_size < 4000 for path in tmp_path.iterdir())
    assert all(len(load_file(path)) % GROUP == 0 for path in tmp_path.glob("*.safetensors"))


def test_one_damaged_row_is_found_and_the_others_are_read(tmp_path):
    filled(tmp_path, 2)
    (shard,) = tmp_path.iterdir()
    with safe_open(shard, framework="pt") as file:
        last = list(file.offset_keys())[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    rows = rows_in(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2 * GROUP):
            if str(number) != last:
                assert same(rows.get(str(number)), number)
    with pytest.warns(UserWarning, match=rf"{shard} cannot be used: .*checksum.*computed again"):
        assert rows.get(last) is None
    assert last not in rows and not shard.exists()


@pytest.mark.filterwarnings("ignore:The cached features")
@pytest.mark.parametrize(
    "write", [lambda folder: filled(folder, 1), lambda folder: former(folder)], ids=["now", "former"]
)
def test_every_changed_byte_gives_the_row_or_none(tmp_path, write: Callable[[Path], Any]):
    write(tmp_path)
    (shard,) = tmp_path.iterdir()
    intact = shard.read_bytes()
    for position in range(0, len(intact), 3):
        shard.write_bytes(intact[:position] + bytes([intact[position] ^ 1 << position % 8]) + intact[position + 1 :])
        rows = rows_in(tmp_path)
        for number in range(GROUP):
            assert (read := rows.get(str(number))) is None or torch.equal(read, row(number))
    for length in (0, 7, 100, len(intact) - 1):
        shard.write_bytes(intact[:length])
        assert rows_in(tmp_path).get("0") is None


def former(folder: Path) -> None:
    """Write a shard in the format of earlier versions."""
    save_verified(folder / "former.safetensors", {key: each.clone() for key, each in group(0).items()})


def test_shards_of_earlier_versions_are_read(tmp_path, quiet):
    former(tmp_path)
    rows = rows_in(tmp_path)
    assert all(same(rows.get(str(number)), number) for number in range(GROUP))


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_the_folder_stays_within_its_limit(tmp_path, quiet, writers):
    limit = 40_000
    each = [rows_in(tmp_path, limit=limit, memory=2**20, writers=writers) for _ in range(writers)]
    for number in range(60):
        each[number % writers].put(group(number))
    for rows in each:
        rows.flush()
    assert 0.4 * limit < sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    again = rows_in(tmp_path, limit=limit)
    kept = [number for number in range(60 * GROUP) if str(number) in again]
    assert all(rows.full for rows in each) and len(kept) % GROUP == 0
    if writers == 1:  # what did not fit before does not now
        again.put(group(59))
        again.flush()
        assert "239" not in rows_in(tmp_path)
    assert all(same(again.get(str(number)), number) for number in kept)


def test_rows_that_cannot_be_written_wait(tmp_path):
    (tmp_path / "folder").write_text("a file")
    rows = rows_in(tmp_path / "folder")
    rows.put(group(0))
    with pytest.raises(Exception, match=f"not be written to {tmp_path}/folder"):
        rows.flush()
    assert same(rows.get("3"), 3)
    (tmp_path / "folder").unlink()
    rows.flush()
    assert same(rows_in(tmp_path / "folder").get("3"), 3)


def test_threads_read_while_rows_are_written(tmp_path, quiet):
    rows = rows_in(tmp_path, memory=8 * 4000)

    def check(number: int) -> bool:
        read = rows.get(str(number))
        return read is None or torch.equal(read, row(number))

    with ThreadPoolExecutor(4) as threads:
        checked: list[Any] = []
        for number in range(30):
            rows.put(group(number))
            checked += [threads.submit(check, each) for each in range(0, GROUP * number, 5)]
        assert all(each.result() for each in checked)

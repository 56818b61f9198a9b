"""Tables: rows are absent or whole, whoever else writes them, and whatever happened to the file."""

import multiprocessing
import os
import pickle

import pytest
import torch

from sdnb.errors import CacheError
from sdnb.models.encoding_cache import EncodingCache

MIB = 2**20


def table(folder, key="a key", rows=5, shape=(3, 4), dtype=torch.float16, limit=MIB):
    return EncodingCache(folder, "moments", key, rows, shape, dtype, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_comes_back_as_it_was_also_for_others(tmp_path, dtype):
    one, values = table(tmp_path, dtype=dtype), torch.randn(3, 4).to(dtype)
    assert one.read(2) is None and 2 not in one
    one.write(2, values)
    for other in (one, table(tmp_path, dtype=dtype), pickle.loads(pickle.dumps(one))):
        assert 2 in other and 1 not in other
        assert torch.equal(other.read(2), values) and other.read(2).dtype == dtype
    assert len(list(tmp_path.iterdir())) == 1


def test_a_row_of_zeros_is_there(tmp_path):
    table(tmp_path).write(0, torch.zeros(3, 4, dtype=torch.float16))
    assert torch.equal(table(tmp_path).read(0), torch.zeros(3, 4, dtype=torch.float16))


def test_what_another_process_writes_is_seen(tmp_path):
    here, sevens = table(tmp_path, dtype=torch.float32), torch.full((3, 4), 7.0)
    another = multiprocessing.get_context("fork").Process(
        target=lambda: table(tmp_path, dtype=torch.float32).write(4, sevens)
    )
    another.start()
    another.join(60)
    assert another.exitcode == 0 and torch.equal(here.read(4), sevens)


@pytest.mark.parametrize("change", [dict(key="another"), dict(rows=6), dict(shape=(4, 3)), dict(dtype=torch.bfloat16)])
def test_another_key_or_form_is_another_table(tmp_path, change):
    table(tmp_path).write(0, torch.ones(3, 4, dtype=torch.float16))
    assert 0 not in table(tmp_path, **change)
    assert 0 in table(tmp_path)


def test_a_torn_row_counts_as_absent(tmp_path):
    one = table(tmp_path)
    for row in (0, 1):
        one.write(row, torch.ones(3, 4, dtype=torch.float16))
    content = bytearray(one.path.read_bytes())
    content[-1 - 3 * 24] ^= 1  # the last byte of row 1 of 5
    one.path.write_bytes(content)
    again = table(tmp_path)
    assert 1 in again and again.read(1) is None and again.read(0) is not None
    again.write(1, torch.ones(3, 4, dtype=torch.float16))
    assert again.read(1) is not None


def cut_short(path):
    os.truncate(path, 100)


def foreign(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, foreign, emptied])
def test_a_file_that_is_no_such_table_is_made_anew(tmp_path, damage):
    one = table(tmp_path)
    one.write(0, torch.ones(3, 4, dtype=torch.float16))
    damage(one.path)
    again = table(tmp_path)
    assert all(again.read(row) is None for row in range(5))
    again.write(0, torch.ones(3, 4, dtype=torch.float16))
    assert table(tmp_path).read(0) is not None


def test_a_file_that_is_cut_short_while_it_is_open(tmp_path):
    one = table(tmp_path)
    one.write(4, torch.ones(3, 4, dtype=torch.float16))
    os.truncate(one.path, 0)
    assert 4 not in one and one.read(4) is None
    one.write(4, torch.ones(3, 4, dtype=torch.float16))
    assert one.read(4) is not None
    assert 4 not in table(tmp_path), "of the file nobody knows what else is lost"


def test_those_not_used_for_the_longest_make_room(tmp_path):
    size = table(tmp_path, key="0").path.stat().st_size
    for age, key in enumerate("0123"):
        path = table(tmp_path, key=key, limit=3 * size).path
        os.utime(path, (1000 + age, 1000 + age))
    assert len(list(tmp_path.iterdir())) == 3
    kept = table(tmp_path, key="1", limit=3 * size)  # which makes it the one used last
    kept.write(0, torch.ones(3, 4, dtype=torch.float16))
    table(tmp_path, key="4", limit=3 * size)
    assert len(list(tmp_path.iterdir())) == 3
    assert 0 in table(tmp_path, key="1", limit=3 * size)


def test_one_that_was_removed_serves_those_who_have_it(tmp_path):
    one = table(tmp_path)
    one.path.unlink()
    one.write(0, torch.ones(3, 4, dtype=torch.float16))
    assert one.read(0) is not None


def test_more_than_the_limit_is_refused(tmp_path):
    with pytest.raises(CacheError, match="limit"):
        table(tmp_path, rows=50_000)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be made"):
        table(tmp_path / "file")

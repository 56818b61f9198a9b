import pytest

from sdnb.cache import cache_root, computed_once, made_once
from sdnb.errors import CacheError


def test_it_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        made_once(tmp_path / "thing", lambda folder: (made.append(1), (folder / "file").write_text("x")))
    assert made == [1]
    assert (tmp_path / "thing" / "file").read_text() == "x"


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "thing", lambda folder: ((folder / "half").touch(), 1 / 0))
    assert not list(tmp_path.iterdir())


def test_another_process_may_be_first(tmp_path):
    def slow(folder):
        (folder / "file").write_text("ours")
        (tmp_path / "thing").mkdir()
        (tmp_path / "thing" / "file").write_text("theirs")

    assert (made_once(tmp_path / "thing", slow) / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="set cache_dir"):
        made_once(tmp_path / "file" / "data" / "thing", lambda folder: None)


def test_where_it_is(tmp_path, monkeypatch):
    assert cache_root(str(tmp_path)) == tmp_path / "sdnb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "sdnb"


def test_what_is_computed_is_computed_once(tmp_path):
    computed = []

    def compute():
        computed.append(1)
        return {"answer": [1.5, 2]}

    for key in (1, 1, 2):
        assert computed_once("kind", key, compute, str(tmp_path)) == {"answer": [1.5, 2]}
    assert len(computed) == 2
    for path in tmp_path.rglob("*.json"):
        path.write_text('{"answer": [1.')
    assert computed_once("kind", 1, compute, str(tmp_path)) == {"answer": [1.5, 2]}, "a torn file is none"
    assert len(computed) == 3
    (tmp_path / "file").touch()
    for _ in range(2):
        computed_once("kind", 1, compute, str(tmp_path / "file"))
    assert len(computed) == 5, "and where nothing can be written it goes on"

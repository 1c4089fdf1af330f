"""How much memory there is and is left, by what systems and containers tell."""

import pytest
import torch

from vggfeat import devices

CPU = torch.device("cpu")


def written(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_this_machine_has_some():
    assert 1 << 20 < devices.free_memory(CPU) < devices.total_memory(CPU) < 1 << 60


def test_containers_tell_what_they_leave(tmp_path):
    none = (devices.NO_LIMIT, 0)
    assert devices._cgroup_memory(tmp_path / "nowhere") == none
    assert devices._cgroup_memory(written(tmp_path / "a", memory__max="max\n", memory__current="2000\n")) == none
    assert devices._cgroup_memory(written(tmp_path / "b", memory__max="5000\n", memory__current="2000\n")) == (
        5000,
        2000,
    )
    old = {"memory__limit_in_bytes": "700\n", "memory__usage_in_bytes": "900\n"}
    (tmp_path / "c").mkdir()
    written(tmp_path / "c" / "memory", **old)
    assert devices._cgroup_memory(tmp_path / "c") == (700, 900)


def test_files_that_are_only_cached_take_no_memory(tmp_path):
    told = "anon 1500\ninactive_file 400\nactive_file 100\n"
    new = written(tmp_path / "a", memory__max="5000\n", memory__current="2000\n", memory__stat=told)
    assert devices._cgroup_memory(new) == (5000, 1600)
    (tmp_path / "b").mkdir()
    old = {"memory__limit_in_bytes": "700\n", "memory__usage_in_bytes": "600\n"}
    written(tmp_path / "b" / "memory", **old, memory__stat="inactive_file 1\ntotal_inactive_file 250\n")
    assert devices._cgroup_memory(tmp_path / "b") == (700, 350)


@pytest.mark.parametrize(("limit", "used", "free"), [(5000, 2000, 3000), (700, 900, 0)])
def test_a_container_s_limit_is_the_limit(monkeypatch, limit, used, free):
    monkeypatch.setattr(devices, "_cgroup_memory", lambda: (limit, used))
    assert (devices.free_memory(CPU), devices.total_memory(CPU)) == (free, limit)

# SPDX-License-Identifier: Apache-2.0
"""K3s's data on disks of its own: a mount point cannot be renamed, so what is in it is moved."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Action, Datastore
from k3sagentd.k3s import change_role, data, dropin, forget, mounts
from k3sagentd.k3s.data import Marker, datastore, has_content, put_aside, read_marker, write_marker
from k3sagentd.upkeep import repair_steps
from tests.unit.rooted import (
    AGENT,
    AS_AGENT,
    AS_SERVER,
    INIT,
    JOIN,
    JOIN_AGENT,
    NODE,
    SERVER,
    STATE,
    TOKEN,
    WAL,
    Machine,
)

STAND_DOWN = replace(INIT, action=Action.STAND_DOWN, epoch=2)
ROOT = Path(__file__).parents[2]
ASIDE = "k3s.abandoned-2"
MORE = ("agent/containerd/x", "data/current/k3s", "storage/pvc", "server/token", "lost+found/x")


class Killed(BaseException):
    """The power went."""


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


Mount = Callable[..., None]


@pytest.fixture
def mount(m: Machine, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """``mount(".", "server")``: disks there, for whoever asks, and for rename(2)."""
    there: set[Path] = set()

    def mount_points(path: Path) -> frozenset[Path]:
        return frozenset(each for each in there if path in (each, *each.parents))

    def device(path: Path) -> Path | None:
        around = [each for each in there if each in (path, *path.parents)]
        return max(around, key=lambda each: len(each.parts), default=None)

    really = Path.rename

    def rename(path: Path, to: Path) -> None:
        if path in there:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        if device(path.parent) != device(to.parent):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
        really(path, to)

    for module in (data, change_role):
        monkeypatch.setattr(module, "mount_points", mount_points)
    monkeypatch.setattr(Path, "rename", rename)
    return lambda *names: there.update(m.paths.k3s_data / name for name in names)


def abandoned(m: Machine, *data: str) -> None:
    """What an init order of epoch 2 made."""
    m.put(*data, *MORE)
    write_marker(m.paths.k3s_data, Marker(epoch=2, node=NODE))
    m.ours(SERVER)
    m.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))


def files(m: Machine) -> set[str]:
    top = m.paths.k3s_data
    return {str(each.relative_to(top)) for each in top.rglob("*") if not each.is_dir()}


LAYOUTS = [(".",), ("server", "agent"), ("server/db",), (".", "server/db/etcd"), ("agent",)]


@pytest.mark.parametrize("layout", [("server/db/etcd",), ("server/db",), ()], ids=" ".join)
def test_repair_moves_etcd_aside(m: Machine, mount: Mount, layout: tuple) -> None:
    m.put(*AS_SERVER, WAL)
    mount(*layout)
    before = len(files(m))
    for _ in range(2):  # again after a kill
        repair_steps.move_aside(m.paths)
        assert datastore(m.paths.k3s_data) is not Datastore.ETCD
    assert len(files(m)) == before
    assert len([*m.paths.k3s_data.rglob("etcd.before-repair/member/wal")]) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_standing_down_leaves_k3s_nothing(m: Machine, mount: Mount, layout: tuple) -> None:
    abandoned(m, *AS_SERVER, WAL)
    mount(*layout)
    before = files(m)
    assert has_content(m.paths.k3s_data)
    m.does(STAND_DOWN, "stop")
    assert not has_content(m.paths.k3s_data), "nothing for a reset to move"
    assert datastore(m.paths.k3s_data) is Datastore.NONE
    assert read_marker(m.paths.k3s_data) is None
    assert not m.paths.dropin.exists()
    left = {each for each in files(m) if ".abandoned-2/" not in each}
    assert left == {"lost+found/x"}
    assert len(files(m)) == len(before), "no file is lost"
    for point in layout:
        assert (m.paths.k3s_data / point).is_dir(), "where the disk is mounted at the next boot"
    m.does(STAND_DOWN, "stop")
    m.does(JOIN_AGENT, "install agent", "start agent")


def test_all_of_it_is_in_one_place(m: Machine, mount: Mount) -> None:
    abandoned(m, *AS_SERVER, WAL)
    mount(".")
    before = files(m)
    m.does(STAND_DOWN, "stop")
    assert files(m) == {each if "lost" in each else f"{ASIDE}/{each}" for each in before}
    assert (m.paths.k3s_data / ASIDE / WAL).is_dir()
    assert (m.paths.k3s_data / ASIDE).stat().st_mode & 0o777 == 0o700
    abandoned(m, *AS_SERVER, WAL)
    m.does(STAND_DOWN, "stop")
    assert (m.paths.k3s_data / f"{ASIDE}-2" / WAL).is_dir(), "nothing is overwritten"
    assert not (m.paths.k3s_data / f"{ASIDE}-2" / ASIDE).exists(), "what was aside stays there"


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
@pytest.mark.parametrize("kind", [WAL, STATE, None])
def test_killed_at_any_instant_it_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, m: Machine, mount: Mount, layout, kind
) -> None:
    abandoned(m, *AS_SERVER, *([kind] if kind else []))
    mount(*layout)
    kept = tmp_path / "kept"
    shutil.copytree(m.paths.root / "var", kept)
    original = m.paths.dropin.read_bytes()
    wanted = None
    for instant in range(100):
        shutil.rmtree(m.paths.root / "var")
        shutil.copytree(kept, m.paths.root / "var")
        m.paths.dropin.write_bytes(original)
        m.k3s.role = SERVER
        with monkeypatch.context() as patch:
            killed = kill_at(patch, m.paths.k3s_data, instant)
            try:
                m.apply(STAND_DOWN)
            except Killed:
                known = read_marker(m.paths.k3s_data)
                pieces = {each.split("/")[0] for each in files(m) if ".abandoned-" not in each}
                assert known is not None or pieces <= {"lost+found"}, f"at instant {instant}"
                if kind:
                    tells = {Datastore.ETCD, Datastore.SQLITE, Datastore.NONE}
                    assert datastore(m.paths.k3s_data) in tells, "an agent it never was"
        m.does(STAND_DOWN, "stop")
        wanted = wanted or files(m)
        assert datastore(m.paths.k3s_data) is Datastore.NONE
        if not killed:
            break
    assert instant > 4
    assert {each for each in files(m) if ".abandoned-2-" in each} == set(), "split in two"
    assert files(m) == wanted


def kill_at(patch: pytest.MonkeyPatch, top: Path, instant: int) -> list[str]:
    """The change of K3s's data with that number does not happen; says whether there was one."""
    left, killed = [instant], []

    def stopping(real: Callable) -> Callable:
        def call(path: Path, *args: object, **kwargs: object) -> object:
            if top in (path, *path.parents):
                if left[0] == 0:
                    killed.append(str(path))
                    raise Killed
                left[0] -= 1
            return real(path, *args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (data, "fsync_directory")):
        patch.setattr(owner, name, stopping(getattr(owner, name)))
    return killed


# --- the other ways in which data goes aside ------------------------------------------------


@pytest.mark.parametrize("layout", [(".",), ("server", "agent"), ("server/db",)], ids=" ".join)
def test_there_and_back(m: Machine, mount: Mount, layout: tuple) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    (m.paths.k3s_data / "server").mkdir()
    mount(*layout)
    m.does(JOIN, "install server", "stop", "start server")
    assert "agent/images/all.tar" in files(m), "a server reads them too"
    assert "agent/client-kubelet.crt" not in files(m)
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / "server/token").write_text(f"K10{'a' * 64}::server:{TOKEN}\n")
    write_marker(m.paths.k3s_data, Marker(epoch=0, node=NODE))
    m.k3s.role = SERVER
    m.does(JOIN_AGENT, "install agent", "stop", "start agent")
    assert datastore(m.paths.k3s_data) is Datastore.NONE
    assert read_marker(m.paths.k3s_data) is None
    assert "agent/images/all.tar" in files(m)
    asides = {each for each in files(m) if ".before-" in each}
    assert len(asides) >= 5, "no file is lost"


def test_of_a_removed_member_the_tombstone_goes_last(
    m: Machine, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd = m.paths.k3s_data / data.ETCD
    m.put(WAL, "server/db/etcd/tombstone", "server/db/etcd/name")
    mount(data.ETCD)
    moved: list[str] = []
    real = data.move

    def move(path: Path, to: Path) -> None:
        moved.append(path.name)
        real(path, to)

    monkeypatch.setattr(data, "move", move)
    assert put_aside(etcd, "etcd.removed") == etcd / "etcd.removed"
    assert moved == ["member", "name", "tombstone"]
    assert put_aside(etcd, "etcd.removed") == etcd / "etcd.removed", "there is nothing to move"
    assert [each.name for each in etcd.iterdir()] == ["etcd.removed"]


def test_a_file_that_is_mounted_stays(m: Machine, mount: Mount) -> None:
    abandoned(m, *AS_SERVER, WAL)
    mount("server/token")
    m.does(STAND_DOWN, "stop")
    assert {each for each in files(m) if ".abandoned-2/" not in each} == {
        "lost+found/x",
        "server/token",
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_token_in_what_went_aside_is_found(m: Machine, mount: Mount, layout: tuple) -> None:
    """By who is told to forget it (``forget-token``)."""
    abandoned(m, *AS_SERVER, WAL)
    (m.paths.k3s_data / "server/token").write_text(TOKEN)
    mount(*layout)
    m.does(STAND_DOWN, "stop")
    assert [each for each in forget._keepers(m.paths) if TOKEN in each.read_text()]


# --- what is mounted ------------------------------------------------------------------------

LINES = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 8:1 / /a\040b/k3s rw,relatime shared:1 - ext4 /dev/sda1 rw
31 30 8:2 / /a\040b/k3s/server rw - btrfs /dev/sda2 rw
32 30 8:4 / /a\040b/k3s/agent/containerd rw - ext4 /dev/sda4 rw
33 30 0:50 / /a\040b/k3s/agent/containerd/7/fs rw - overlay overlay rw
34 30 0:51 / /a\040b/k3s/agent/containerd/stargz rw master:2 - fuse.rawBridge stargz rw
35 27 8:3 / /a\040b/k3s-other rw - ext4 /dev/sda3 rw
"""


def test_what_the_kernel_says_is_understood(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mountinfo").write_text(LINES.lstrip())
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    k3s = Path("/a b/k3s")
    agent = k3s / "agent"
    assert mounts.mount_points(k3s) == {k3s, k3s / "server", agent / "containerd"}
    assert mounts.mount_points(agent) == {agent / "containerd"}, "no container's"
    assert mounts.mount_points(Path("/a b/k3")) == frozenset()


def test_a_link_to_a_disk_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "k3s").symlink_to("/proc")
    assert mounts.mount_points(Path("/proc")) >= {Path("/proc")}
    assert mounts.mount_points(tmp_path / "k3s") == frozenset()


REAL = """
import pathlib, subprocess, sys
from k3sagentd.k3s.data import put_aside
top = pathlib.Path(sys.argv[1])
for each in (top, top / "server"):
    each.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", each], check=True)
    (each / "x").touch()
    (each / "y").mkdir()
print(put_aside(top, "k3s.reset"))
print(*sorted(str(each.relative_to(top)) for each in top.rglob("*")))
"""


@pytest.fixture
def unshare() -> Iterator[list[str]]:
    command = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False).returncode
    ):
        pytest.skip("no mount namespaces here")
    return command


def test_real_mounts(tmp_path: Path, unshare: list[str]) -> None:
    top = tmp_path / "k3s"
    done = subprocess.run(
        [*unshare, sys.executable, "-c", REAL, str(top)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    where, found = done.stdout.splitlines()
    assert where == str(top / "k3s.reset")
    inside = ["", "/x", "/y"]
    assert found.split() == sorted(
        [f"k3s.reset{each}" for each in inside]
        + ["server"]
        + [f"server/server.reset{each}" for each in inside]
    )

# SPDX-License-Identifier: Apache-2.0
"""``virtual-ip``: what keepalived is told, when it is not touched, and what is refused."""

import hashlib
import re
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Order, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.k3s import keepalived
from k3sagentd.paths import Paths

AT = Attachment("eth0", 2, "10.0.0.7")
SITE = "3c0ec501fac8bdb1"
ORDER = Order(
    action=Action.INIT, epoch=0, role=ServerOrAgent.SERVER, node_name="n1", node="ab" * 16
)
SERVER, AGENT = ServerOrAgent.SERVER, ServerOrAgent.AGENT


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A machine at 10.0.0.7/24 without systemd, where the packages are installed."""
    found = Paths(tmp_path)
    found.config.parent.mkdir(parents=True)
    for program in keepalived.PROGRAMS.values():
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch()
    here(monkeypatch, "10.0.0.7/24")
    configure(found)
    return found


def here(monkeypatch: pytest.MonkeyPatch, *interfaces: str) -> None:
    found = [IPv4Interface(each) for each in interfaces]
    monkeypatch.setattr(keepalived, "interfaces_v4", lambda name: found)


def configure(paths: Paths, text: str = "virtual-ip: 10.0.0.100/24\n") -> None:
    paths.config.write_text(f"nodes: 3\ninstall: {{method: exec}}\n{text}")


def keep(paths: Paths) -> str:
    keepalived.keep(load_config(paths), paths, AT, SITE, ORDER)
    return paths.keepalived.read_text()


def test_what_keepalived_is_told(paths: Paths) -> None:
    text = keep(paths)
    assert text.startswith(keepalived.HEADER)
    for line in (
        "state BACKUP",
        "nopreempt",
        "interface eth0",
        "10.0.0.100/24 dev eth0",
        "script_user nobody nogroup",
        "enable_script_security",
        "init_fail",
        f"virtual_router_id {keepalived.router_id(SITE)}",
        f"auth_pass {SITE[8:]}",
    ):
        assert re.search(rf"^ +{re.escape(line)}$", text, re.M), line
    assert "/usr/bin/curl -q --silent --fail --insecure" in text
    assert "https://127.0.0.1:6443/ping" in text
    assert text.count("{") == text.count("}")


def test_all_servers_of_a_site_agree_and_their_ranks_differ() -> None:
    sites = [hashlib.sha256(bytes([each])).hexdigest()[:16] for each in range(200)]
    ids = [keepalived.router_id(each) for each in sites]
    assert all(1 <= each <= 255 for each in ids)
    assert len(set(ids)) > 100
    ranks = [keepalived.priority(each) for each in sites]
    assert all(1 <= each <= 254 for each in ranks)
    assert len(set(ranks)) > 80


def test_the_router_id_can_be_set(paths: Paths) -> None:
    configure(paths, "virtual-ip: 10.0.0.100/24\nvirtual-router-id: 7\n")
    assert "virtual_router_id 7\n" in keep(paths)


def test_once_it_is_ours_it_follows_and_goes(paths: Paths, monkeypatch) -> None:
    first = keep(paths)
    inode = paths.keepalived.stat().st_ino
    here(monkeypatch, "10.0.0.7/24", "10.0.0.100/24")  # this machine holds it now
    assert keep(paths) == first
    assert paths.keepalived.stat().st_ino == inode, "the same was written again"
    configure(paths, "virtual-ip: 10.0.0.101/24\n")
    assert "10.0.0.101/24" in keep(paths)
    keepalived.withdraw(load_config(paths), paths)
    assert not paths.keepalived.exists()
    keepalived.withdraw(load_config(paths), paths)


def test_somebody_elses_file_is_never_touched(paths: Paths) -> None:
    paths.keepalived.parent.mkdir(parents=True)
    paths.keepalived.write_text("vrrp_instance mine {\n}\n")
    with pytest.raises(ConfigError, match=r"keepalived.conf: it was not written by k3sagentd"):
        keep(paths)
    with pytest.raises(ConfigError, match="set registration-address instead"):
        keepalived.check(load_config(paths), paths, SERVER)
    keepalived.withdraw(load_config(paths), paths)
    assert paths.keepalived.read_text() == "vrrp_instance mine {\n}\n"


@pytest.mark.parametrize("package", keepalived.PROGRAMS)
def test_a_missing_package_is_named_before_k3s_is_installed(paths: Paths, package: str) -> None:
    (paths.root / keepalived.PROGRAMS[package]).unlink()
    with pytest.raises(MachineError, match=f"{package} is not installed .*; apt install {package}"):
        keepalived.check(load_config(paths), paths, SERVER)
    keepalived.check(load_config(paths), paths, AGENT)
    configure(paths, "")
    keepalived.check(load_config(paths), paths, SERVER)


@pytest.mark.parametrize(
    ("interfaces", "said"),
    [
        (["10.0.1.7/24"], "but eth0 is in 10.0.1.0/24; set a free address of that network"),
        (["10.0.0.7/16"], "but eth0 is in 10.0.0.0/16; set a free address"),
        ([], "but eth0 is in none"),
        (["10.0.0.7/24", "10.0.0.100/24"], "but eth0 has that address already; set a free one"),
    ],
)
def test_an_address_out_of_place_is_refused(
    paths: Paths, monkeypatch, interfaces: list[str], said: str
) -> None:
    here(monkeypatch, *interfaces)
    with pytest.raises(MachineError, match=re.escape(said)):
        keep(paths)
    assert not paths.keepalived.exists()


def test_under_systemd_the_unit_follows(paths: Paths, monkeypatch) -> None:
    done: list[tuple[str, ...]] = []
    active = [False]
    monkeypatch.setattr(keepalived, "_systemctl", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(keepalived, "_active", lambda: active[0])
    paths.config.write_text("nodes: 3\nvirtual-ip: 10.0.0.100/24\n")
    keep(paths)
    assert done == [("enable", keepalived.UNIT), ("start", keepalived.UNIT)]
    active[0] = True
    keep(paths)
    assert ("kill", "--kill-whom=main", "--signal=HUP", keepalived.UNIT) not in done
    paths.config.write_text("nodes: 3\nvirtual-ip: 10.0.0.101/24\n")
    keep(paths)
    assert done[-1] == ("kill", "--kill-whom=main", "--signal=HUP", keepalived.UNIT)
    keepalived.withdraw(load_config(paths), paths)
    assert done[-1] == ("stop", keepalived.UNIT)

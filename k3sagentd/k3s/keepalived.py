# SPDX-License-Identifier: Apache-2.0
"""``virtual-ip``: the configuration of Debian's keepalived on this machine, while it is a server.

keepalived decides which server has the address (VRRP, RFC 3768). Owns its configuration file as
long as our first line stands in it; a file of somebody else is never touched. Where systemd does
not run (install method ``exec``), whoever starts the machine's programs follows the file.
"""

from __future__ import annotations

import hashlib
import ipaddress
import subprocess

from k3sagentd.config import Config
from k3sagentd.core.k3s import Order, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment, interfaces_v4
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.files import fsync_directory, write_atomically
from k3sagentd.k3s.install import PATH, SYSTEMCTL_TIMEOUT_S, run
from k3sagentd.paths import Paths

UNIT = "keepalived.service"
HEADER = "# Written by k3sagentd for this server; changes here are overwritten.\n"
PROGRAMS = {"keepalived": "usr/sbin/keepalived", "curl": "usr/bin/curl"}
"""By package: what must be there. curl asks K3s whether it is well."""
CHECK_EVERY_S = 2
CHECK_TIMEOUT_S = 2
FALL, RISE = 3, 2
"""A K3s that is gone refuses at once and is given up after 4 to 6 s; one that is merely slow, as
on a Pi whose disk is busy, has three times 2 s."""
ADVERT_S = 1
"""A holder that lost its power is replaced after three of these and its heir's skew (below 1 s)."""
REFRESH_S = 60
"""The holder repeats its gratuitous ARP: a switch or host may have missed the first ones."""


# --- what is written ------------------------------------------------------------------------


def router_id(site_id: str) -> int:
    """The VRRP router id of a site, 1 to 255: the same on all its servers, mostly not another's."""
    return 1 + int(site_id[:8], 16) % 255


def priority(node: str) -> int:
    """A server's own rank, 50 to 199, so that two seldom take over in the same instant; with
    ``nopreempt`` it moves nothing that is well placed."""
    return 50 + int(hashlib.sha256(node.encode()).hexdigest()[:8], 16) % 150


def render(
    virtual: ipaddress.IPv4Interface,
    *,
    interface: str,
    site_id: str,
    router: int,
    name: str,
    node: str,
) -> bytes:
    """The file's bytes, the same for equal values.

    The password is no secret (VRRP sends it in the clear): it keeps sites apart whose router ids
    happen to be equal.
    """
    check = (
        f"/{PROGRAMS['curl']} -q --silent --fail --insecure --noproxy 127.0.0.1 "
        f"--max-time {CHECK_TIMEOUT_S} --output /dev/null https://127.0.0.1:6443/ping"
    )
    text = f"""\
global_defs {{
    router_id {name}
    enable_script_security
    script_user nobody nogroup
}}

vrrp_script k3s {{
    script "{check}"
    interval {CHECK_EVERY_S}
    timeout {CHECK_TIMEOUT_S + 1}
    fall {FALL}
    rise {RISE}
    init_fail
}}

vrrp_instance k3s {{
    state BACKUP
    nopreempt
    interface {interface}
    virtual_router_id {router}
    priority {priority(node)}
    advert_int {ADVERT_S}
    garp_master_refresh {REFRESH_S}
    authentication {{
        auth_type PASS
        auth_pass {site_id[-8:]}
    }}
    virtual_ipaddress {{
        {virtual.with_prefixlen} dev {interface}
    }}
    track_script {{
        k3s
    }}
}}
"""
    return (HEADER + text).encode()


# --- on this machine ------------------------------------------------------------------------


def check(config: Config, paths: Paths, role: ServerOrAgent) -> None:
    """Before K3s is installed: raise where a server of this site could not have the address."""
    if config.virtual_ip is None or role is not ServerOrAgent.SERVER:
        return
    missing = [package for package, path in PROGRAMS.items() if not (paths.root / path).exists()]
    if missing:
        raise MachineError(
            f"virtual-ip is {config.virtual_ip}, but {' and '.join(missing)} is not installed on "
            f"this machine; apt install {' '.join(missing)}"
        )
    if paths.keepalived.exists() and not is_ours(paths):
        raise ConfigError(
            f"{paths.keepalived}: it was not written by k3sagentd, but virtual-ip is set; allowed: "
            "no such file; move it away, or set registration-address instead of virtual-ip and "
            "keep the address yourself"
        )


def is_ours(paths: Paths) -> bool:
    """Whether keepalived's configuration is there and was written by us."""
    try:
        with paths.keepalived.open("rb") as file:
            return file.readline() == HEADER.encode()
    except FileNotFoundError:
        return False


def keep(config: Config, paths: Paths, at: Attachment | None, site_id: str, order: Order) -> None:
    """Make keepalived of this server share ``virtual-ip``; raises MachineError, ConfigError."""
    check(config, paths, ServerOrAgent.SERVER)
    virtual = config.virtual_ip
    assert virtual is not None, "asked for only where it is configured"
    if at is None:
        raise MachineError("there is no address on the network interface")
    _check_place(virtual, at.interface, ours=is_ours(paths))
    router = config.virtual_router_id or router_id(site_id)
    node = order.node or order.node_name
    data = render(
        virtual,
        interface=at.interface,
        site_id=site_id,
        router=router,
        name=order.node_name,
        node=node,
    )
    changed = not paths.keepalived.exists() or paths.keepalived.read_bytes() != data
    if changed:
        paths.keepalived.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomically(paths.keepalived, data, mode=0o600)
    if config.install.method == "exec":
        return
    _systemctl("enable", UNIT)
    if changed and _active():
        # Not ``reload``: the unit's ExecReload needs /bin/kill, which minimal images lack.
        _systemctl("kill", "--kill-whom=main", "--signal=HUP", UNIT)
    else:
        _systemctl("start", UNIT)


def withdraw(config: Config, paths: Paths) -> None:
    """End our part in the virtual address, if we have one: keepalived gives it up and stops."""
    if not is_ours(paths):
        return
    if config.install.method != "exec":
        _systemctl("stop", UNIT)  # the file goes after it: a power cut in between is made good
    paths.keepalived.unlink()
    fsync_directory(paths.keepalived.parent)


def _check_place(virtual: ipaddress.IPv4Interface, interface: str, *, ours: bool) -> None:
    """It must lie in a network that is here, and be nobody's own."""
    here = interfaces_v4(interface)
    if not ours and virtual.ip in [each.ip for each in here]:
        raise MachineError(
            f"virtual-ip is {virtual}, but {interface} has that address already; set a free one"
        )
    networks = sorted({str(each.network) for each in here if each.ip != virtual.ip})
    if str(virtual.network) not in networks:
        raise MachineError(
            f"virtual-ip is {virtual}, but {interface} is in {' and '.join(networks) or 'none'}; "
            "set a free address of that network, with its prefix"
        )


def _active() -> bool:
    try:
        done = subprocess.run(
            ["systemctl", "is-active", "--quiet", UNIT],
            env={"PATH": PATH},
            check=False,
            timeout=SYSTEMCTL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"systemctl took longer than {SYSTEMCTL_TIMEOUT_S:.0f} s") from error
    return done.returncode == 0


def _systemctl(*arguments: str) -> None:
    run(["systemctl", *arguments], timeout_s=SYSTEMCTL_TIMEOUT_S, what=f"systemctl {arguments[0]}")

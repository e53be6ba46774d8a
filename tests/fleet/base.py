# SPDX-License-Identifier: Apache-2.0
"""What the fleet is made from, once each run: the packages, their repository, a base a release."""

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from k3sagentd.lab import network
from tests.fleet import serve
from tests.fleet.machine import FLEET

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "ca-certificates,curl,dbus,etcd-server,iproute2,keepalived,libnss-myhostname,nftables,openssl,procps,"
    "python3-aiohttp,python3-cryptography,python3-ifaddr,python3-systemd,python3-yaml,"
    "python3-zeroconf,systemd-sysv,udev"
)
"""Debian's own packages: what a machine of the fleet would else get from a mirror."""
UNWANTED = (
    "etcd.service",  # Debian's own, of the package that the stand-in needs
    "nftables.service",  # may not in a network namespace that it was given
    "systemd-firstboot.service",  # has no terminal
    "systemd-networkd.service",  # the wire gives each machine its address
    "systemd-networkd-wait-online.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
)
BAKE = """
set -eu
mount -t overlay overlay -o lowerdir={base},upperdir={baked},workdir={fleet}/work {fleet}/root
cp {debs}/*.deb {fleet}/root/tmp
cd {fleet}/root/tmp
export DEBIAN_FRONTEND=noninteractive
chroot {fleet}/root sh -c 'cd /tmp && apt-get install -q -y ./*.deb'
rm -f *.deb
"""
SOURCES = """Types: deb
URIs: https://{host}/apt
Suites: stable
Components: main
Signed-By: /usr/share/keyrings/k3sagentd-archive-keyring.asc
"""


@dataclass(frozen=True)
class Base:
    """Layers of a machine's disk, top first, as overlayfs takes them."""

    plain: str
    baked: str
    """With k3sagentd installed, as an image builder would."""


def make(releases: tuple[str, ...]) -> dict[str, Base]:
    """Build all; returns the bases of each release."""
    shutil.rmtree(FLEET, ignore_errors=True)
    FLEET.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        # The chroot that the packages are built in, and the bases: each waits for the network.
        package = pool.submit(_package)
        bases = dict(zip(releases, pool.map(_debian, releases), strict=True))
        package.result()
    _web()
    # K3s has its etcd inside, the same on every Debian; the stand-in's must be the same as well.
    etcd = (bases[releases[0]] / "usr/bin/etcd").read_bytes()
    for base in bases.values():
        (base / "usr/local/bin/etcd").write_bytes(etcd)
        (base / "usr/local/bin/etcd").chmod(0o755)
    return {release: _prepare(base) for release, base in bases.items()}


def run(*command: str | Path, **environment: str) -> None:
    """Run to the end, or fail with what it said."""
    done = subprocess.run(
        [str(each) for each in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"


def _package() -> None:
    run(ROOT / "packaging/build/deb")
    # A key for this run: a fleet's own is nothing for tests.
    run(ROOT / "packaging/build/apt-repo", APT_KEY_HOME=str(FLEET / "apt-key"), APT_KEY_ID="")


def _debian(release: str) -> Path:
    base = FLEET / f"base-{release}"
    mirror = [os.environ["DEBIAN_MIRROR"]] if os.environ.get("DEBIAN_MIRROR") else []
    run("mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", release, base, *mirror)
    return base


def _web() -> None:
    serve.make_certificate(FLEET)
    www = FLEET / "www"
    shutil.copytree(ROOT / "build/apt-repo", www / "apt")
    binary = (ROOT / "tests/fleet/site/k3s").read_bytes()
    (www / "k3s").write_bytes(binary)
    (www / "sha256sum.txt").write_text(f"{hashlib.sha256(binary).hexdigest()}  k3s\n")
    shutil.copy(ROOT / "tests/fleet/site/install.sh", www / "install.sh")


def _prepare(base: Path) -> Base:
    """As an image builder would: no network of Debian's, our repository, the fleet's CA."""
    for file in (base / "etc/apt").glob("sources.list*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (base / "etc/apt/sources.list.d").mkdir()
    (base / "etc/apt/sources.list.d/k3sagentd.sources").write_text(SOURCES.format(host=serve.HOST))
    key = ROOT / "build/apt-repo/k3sagentd-archive-keyring.asc"
    shutil.copy(key, base / "usr/share/keyrings")
    authorities = base / "usr/local/share/ca-certificates"
    authorities.mkdir(parents=True, exist_ok=True)
    shutil.copy(FLEET / "fleet.crt", authorities / "fleet.crt")
    with (base / "etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 localhost\n{network.GATEWAY} {serve.HOST}\n")
    (base / "etc/hostname").write_text("raspberrypi\n")  # on every machine
    (base / "etc/machine-id").write_text("uninitialized\n")  # as Raspberry Pi images have it
    (base / "var/log/journal").mkdir(exist_ok=True)
    (base / "boot/firmware").mkdir(exist_ok=True)
    run("chroot", base, "update-ca-certificates")
    for unit in UNWANTED:
        run("chroot", base, "systemctl", "mask", "--quiet", unit)
    (base / "etc/k3s-standin.yaml").write_text("promote_s: 2\n")
    baked = base.with_name(f"{base.name}-baked")
    for each in (baked, FLEET / "work", FLEET / "root"):
        each.mkdir(exist_ok=True)
    script = BAKE.format(base=base, baked=baked, fleet=FLEET, debs=ROOT / "build/deb")
    run("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
    shutil.rmtree(FLEET / "work")
    return Base(plain=str(base), baked=f"{baked}:{base}")


def remove() -> None:
    """Everything goes."""
    shutil.rmtree(FLEET, ignore_errors=True)

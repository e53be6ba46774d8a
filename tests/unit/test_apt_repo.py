# SPDX-License-Identifier: Apache-2.0
"""The repository's key: where it lives, and which one signs."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTROL = """Package: k3sagentd
Version: 1
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: nothing
"""


@pytest.fixture
def checkout() -> Iterator[Path]:
    """With a package that was built. Below /tmp itself: the path of a socket has 108 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="k3") as directory:
        top = Path(directory)
        script = top / "packaging/build/apt-repo"
        script.parent.mkdir(parents=True)
        shutil.copy(ROOT / "packaging/build/apt-repo", script)
        package = top / "package/DEBIAN"
        package.mkdir(parents=True)
        (package / "control").write_text(CONTROL + "Section: admin\nPriority: optional\n")
        (top / "build/deb").mkdir(parents=True)
        command = ["dpkg-deb", "-b", top / "package", top / "build/deb/k3sagentd_1_all.deb"]
        subprocess.run(command, check=True, capture_output=True)
        yield top


def make(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "packaging/build/apt-repo"],
        env={"PATH": os.environ["PATH"], "HOME": str(checkout / "h"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def keys(home: Path) -> list[str]:
    """Fingerprints of its secret keys."""
    command = ["gpg", "--homedir", home, "--batch", "--with-colons", "--list-secret-keys"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split(":")[9] for line in said.splitlines() if line.startswith("fpr:")]


def signer(checkout: Path) -> str:
    """The key that machines are to trust, for which the repository must be good."""
    repository = checkout / "build/apt-repo"
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="k3") as home:
        gpg = ["gpg", "--homedir", home, "--batch", "--status-fd=1"]
        key = repository / "k3sagentd-archive-keyring.asc"
        subprocess.run([*gpg, "--import", key], check=True, capture_output=True)
        command = [*gpg, "--verify", repository / "dists/stable/InRelease"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
    return next(line.split()[2] for line in said.splitlines() if " VALIDSIG " in line)


def test_the_key_outlives_make_clean(checkout: Path) -> None:
    done = make(checkout)
    assert done.returncode == 0, done.stderr
    home = checkout / "h/.local/share/k3sagentd/apt-key"
    assert f"made a key in {home}: keep it" in done.stderr
    first = signer(checkout)
    assert keys(home) == [first]
    shutil.rmtree(checkout / "build/apt-repo")
    done = make(checkout)
    assert done.returncode == 0, done.stderr
    assert signer(checkout) == first
    releases = (checkout / "build/apt-repo/dists/stable/InRelease").read_text()
    for architecture in ("amd64", "arm64", "armel", "armhf", "i386", "riscv64"):
        assert architecture in releases


def test_of_several_keys_one_is_named(checkout: Path) -> None:
    home = checkout / "keys"
    home.mkdir(mode=0o700)
    for name in ("one", "two"):
        command = ["gpg", "--homedir", home, "--batch", "--passphrase", ""]
        subprocess.run(
            [*command, "--quick-generate-key", name, "ed25519"], check=True, capture_output=True
        )
    done = make(checkout, APT_KEY_HOME=str(home))
    assert done.returncode == 1
    assert "has 2 secret keys that match ''; name one in APT_KEY_ID" in done.stderr
    second = keys(home)[1]
    assert second in done.stderr
    done = make(checkout, APT_KEY_HOME=str(home), APT_KEY_ID="nobody")
    assert "has 0 secret keys that match 'nobody'" in done.stderr
    assert done.returncode == 1
    done = make(checkout, APT_KEY_HOME=str(home), APT_KEY_ID=second)
    assert done.returncode == 0, done.stderr
    assert signer(checkout) == second

# SPDX-License-Identifier: Apache-2.0
"""What K3s is told by others than us, in K3s's own order of precedence."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.k3s import settings, units
from k3sagentd.paths import Paths

UNIT = r"""
[Service]
EnvironmentFile=-/etc/systemd/system/k3s.service.env
ExecStart=/usr/local/bin/k3s \
    server \
	'--node-name' \
	'From-Unit' \
	'--disable=traefik' \
	'--disable' \
	'servicelb' \
	'--with-node-id' \

"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    for each in ("etc/systemd/system", "etc/rancher/node", "etc/rancher/k3s/config.yaml.d"):
        (tmp_path / each).mkdir(parents=True)
    return found


def test_the_command_line_goes_before_files_and_files_before_the_environment(paths: Paths) -> None:
    system = paths.root / "etc/systemd/system"
    (system / "k3s.service.env").write_text("K3S_TOKEN='a'\nK3S_NODE_NAME=env\nHOME=/x\n")
    assert settings.told(paths, ServerOrAgent.SERVER) == {"token": "a", "node-name": "env"}
    paths.k3s_config.write_text("node-name: file\ndisable: [metrics-server]\n")
    paths.dropin.write_text("node-ip: 10.0.0.1\n")
    assert settings.told(paths, ServerOrAgent.SERVER)["node-name"] == "file"
    (system / "k3s.service").write_text(UNIT)
    assert settings.told(paths, ServerOrAgent.SERVER, ours=False) == {
        "token": "a",
        "node-name": "From-Unit",
        "disable": ["metrics-server", "traefik", "servicelb"],
        "with-node-id": True,
    }
    assert "token" not in settings.told(paths, ServerOrAgent.AGENT)


def test_a_unit_of_another_name_is_heard_too(paths: Paths) -> None:
    """INSTALL_K3S_NAME=shop."""
    system = paths.root / "etc/systemd/system"
    (system / "k3s-shop.service").write_text(UNIT)
    (system / "k3s-shop.service.env").write_text("K3S_TOKEN='a'\n")
    (system / "k3s-backup.service").write_text("[Service]\nExecStart=/usr/bin/backup agent\n")
    (system / "k3s-edge.service").write_text("[Service]\nExecStart=-/opt/bin/k3s agent\n")
    (system / "k3s-broken.service").write_text("[Service]\nExecStart=/usr/local/bin/k3s 'x\n")
    found = settings.told(paths, ServerOrAgent.SERVER)
    assert (found["token"], found["node-name"]) == ("a", "From-Unit")
    assert units.find(paths) == {
        "k3s-shop.service": ServerOrAgent.SERVER,
        "k3s-edge.service": ServerOrAgent.AGENT,
    }
    assert units.name_of(paths, ServerOrAgent.AGENT) == "k3s-edge.service"
    (system / "k3s-agent.service").touch()
    assert units.name_of(paths, ServerOrAgent.AGENT) == "k3s-agent.service"


def test_a_nodes_name_is_as_certified_else_as_told_else_the_hosts(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Pi")
    assert settings.node_name(paths, {}) == "pi"
    assert settings.node_name(paths, {"node-name": "From-Unit"}) == "from-unit"
    (paths.root / "etc/rancher/node/id").write_text("0badcafe\n")
    assert settings.node_name(paths, {"with-node-id": True}) == "pi-0badcafe"
    certificate = paths.k3s_data / "agent/client-kubelet.crt"
    certificate.parent.mkdir(parents=True)
    certificate.write_bytes(_certificate("k3s-server-ca@1"))
    assert settings.node_name(paths, {}) == "pi"
    certificate.write_bytes(_certificate("system:node:pi.shop-0badcafe"))
    assert settings.node_name(paths, {"node-name": "later"}) == "pi.shop-0badcafe"


def _certificate(name: str) -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    day = datetime.datetime(2026, 1, 1)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    made = made.public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(day).not_valid_after(day)
    return made.sign(key, None).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), ("10.0.0.1", "10.0.0.1"), ("10.0.0.1,fd00::1", "10.0.0.1"),
     (["10.0.0.2", "fd00::1"], "10.0.0.2"), ([], None), ("", None), ("FD00:0::1", "fd00::1"),
     ("10.0.0", None)],
)  # fmt: skip
def test_etcd_knows_the_first_address(given: object, found: str | None) -> None:
    assert settings.node_ip({"node-ip": given}) == found

# SPDX-License-Identifier: Apache-2.0
"""Every bad input of the configuration: which file, which key, what was found, what is allowed."""

import re
import traceback
from pathlib import Path

import pytest
import yaml

from k3sagentd.config import load_config
from k3sagentd.core.words import Role
from k3sagentd.errors import ConfigError
from k3sagentd.paths import Paths

BAD = {
    "nodes: five": "nodes is 'five'; allowed: a number from 1 to 99",
    "nodes: 0": "nodes is 0; allowed: a number from 1 to 99",
    "nodes: true": "nodes is True; allowed: a number from 1 to 99",
    "role: auto": "nodes is missing; allowed: the number of machines",
    "nodes: 5\nservers: 2": "servers is 2; allowed: an odd number",
    "nodes: 3\nservers: 5": "servers is 5; allowed: at most nodes, which is 3",
    "nodes: 5\nnode: 4": "node is not a setting; allowed: abandon-after, allow-reboot, fix-cmdline",
    "nodes: 5\nnodes: 7": "key nodes stands twice in line 2",
    "nodes: 5\nrole: master": "role is 'master'; allowed: auto, server, agent",
    "nodes: 5\nsettle: 3": "settle is 3; allowed: a duration",
    "nodes: 5\nport: 70000": "port is 70000; allowed: a number from 1 to 65535",
    "nodes: 5\ntoken-file: token": "token-file is a text; allowed: an absolute path",
    "nodes: 5\nregistration-address: {a: b}": "registration-address is a mapping; allowed: an IP",
    "nodes: 5\nseeds: [a:b]": "seeds is ['a:b']; allowed: a list of host[:port]",
    "nodes: 5\nseeds: a": "seeds is 'a'; allowed: a list of host[:port]",
    "nodes: 5\nregistration-address: 'https://a'": "registration-address is 'https://a'; allowed: ",
    "nodes: 5\nregistration-address: a..b": "registration-address is 'a..b'; allowed: ",
    "nodes: 5\nregistration-address: -a.b": "registration-address is '-a.b'; allowed: ",
    "nodes: 5\nregistration-address: 'a:b'": "registration-address is 'a:b'; allowed: ",
    "nodes: 5\nvirtual-ip: 10.0.0.100": "virtual-ip is '10.0.0.100'; allowed: an IPv4 address with",
    "nodes: 5\nvirtual-ip: fd00::1/64": "virtual-ip is 'fd00::1/64'; allowed: an IPv4 address with",
    "nodes: 5\nvirtual-ip: 10.0.0.1/32": "virtual-ip is '10.0.0.1/32'; allowed: an IPv4 address",
    "nodes: 5\nvirtual-ip: 10.0.0.255/24": "that is the network's own or its broadcast address",
    "nodes: 5\nvirtual-ip: 127.0.0.2/8": "that is no address of a machine on a network",
    "nodes: 5\nvirtual-ip: 10": "virtual-ip is 10; allowed: an IPv4 address with",
    "nodes: 5\nvirtual-router-id: 256": "virtual-router-id is 256; allowed: a number from 1 to 255",
    "nodes: 5\ninstall: {method: curl}": "install.method is 'curl'; allowed: script, exec",
    "nodes: 5\ninstall: {script: 'http://x/y'}": "install.script is 'http://x/y'; allowed: https",
    "nodes: 5\ninstall: {script-sha256: ab}": "install.script-sha256 is 'ab'; allowed: 64 hex",
    "nodes: 5\ninstall: {version: latest}": "install.version is 'latest'; allowed: a K3s version",
    "nodes: 5\ninstall: {url: x}": "install.url is not a setting; allowed: binary, channel",
    "nodes: 5\nk3s: {cluster-init: true}": "allowed: any K3s option but cluster-init",
    "nodes: 5\nk3s: {server: 'https://a'}": "allowed: any K3s option but server",
    "nodes: 5\nk3s: {token: x}": "k3s.token is set; allowed: any K3s option but token",
    "nodes: 5\nk3s: {K3S_URL: x}": "allowed: K3s options in kebab-case, each with",
    "nodes: 5\nk3s: [debug]": "k3s is a list; allowed: a mapping",
    "nodes: 2001-99-99": "a value has the form of a date or a number and is none; allowed",
    "nodes: 5\nk3s: {node-label: {zone: a}}": "k3s.node-label is a mapping; allowed: a text, a",
    "nodes: 5\nk3s: {node-label+: [{zone: a}]}": "k3s.node-label+ is a list; allowed: ",
    "nodes: 5\nk3s: {kubelet-arg: [[a]]}": "k3s.kubelet-arg is a list; allowed: a text, a number,",
    "nodes: 5\nk3s: {debug: }": "k3s.debug is no text; allowed: a text, a number, true or false",
    "nodes: 5\nk3s: {pause-image: 2025-01-01}": "k3s.pause-image is no text; allowed: a text, a",
    "nodes: [": "allowed: valid YAML",
    "- 5": "the file is list; allowed: a mapping",
}


SECRET = "hunter2"
WITH_SECRET = [
    "k3s: {token: hunter2}",
    "k3s: {agent-token: hunter2, debug: true}",
    "k3s: {datastore-endpoint: 'mysql://k3s:hunter2@tcp(10.0.0.1)/k3s'}",
    "k3s: {vpn-auth: 'joinKey=hunter2', server: x}",
    "k3s: {token=hunter2}",
    "k3s: token=hunter2",
    "k3s: [token, hunter2]",
    "token-file: hunter2",
    "token-file: [hunter2]",
    "servers: {k3s: {token: hunter2}}",
    "install: {script: 'http://me:hunter2@mirror/k3s.sh'}",
    "install: {k3s: {token: hunter2}}",
    "k3s: {agent-token: *hunter2}",
    "k3s: {agent-token: !hunter2 }",
    "k3s: {agent-token: !hunter2! x}",
    "k3s: {agent-token: !!int hunter2}",
    "k3s: {agent-token: !!bool hunter2}",
    "k3s: {? [hunter2]}",
    "k3s: {12: hunter2}",
]


@pytest.mark.parametrize("text", WITH_SECRET)
def test_no_message_has_a_secret(tmp_path: Path, text: str) -> None:
    """It goes to the journal, and onto the boot partition of a card."""
    path = write(tmp_path, f"nodes: 5\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Paths(tmp_path))
    assert str(caught.value).startswith(f"{path}: ")
    assert SECRET not in "".join(traceback.format_exception_only(caught.value))
    assert SECRET not in " ".join(caught.value.args)


def write(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    path = tmp_path / "etc/k3sagentd" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Paths(tmp_path))
    assert str(caught.value).startswith(f"{path}: ")
    assert BAD[text] in str(caught.value)
    assert caught.value.exit_code == 78


def test_all_mistakes_are_found_and_the_first_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "node: 5\nservers: 2\ninstall: {chanel: x}\nk3s: {token: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Paths(tmp_path))
    keys = [each.removeprefix(f"{path}: ").partition(" is ")[0] for each in caught.value.args]
    assert keys == ["node", "servers", "install.chanel", "nodes", "k3s.token"]
    assert str(caught.value).startswith(f"{path}: node is not a setting")
    assert str(caught.value).endswith(" (and 4 more: k3sagentd config check)")


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml: no such file; allowed: a YAML file"):
        load_config(Paths(tmp_path))


def test_defaults_and_units(tmp_path: Path) -> None:
    write(tmp_path, "nodes: 2\nabandon-after: 500ms\nrole: agent\nseeds: ['h', '[fd00::1]:7']\n")
    config = load_config(Paths(tmp_path))
    assert (config.nodes, config.servers, config.role) == (2, 1, Role.AGENT)
    assert config.abandon_after_s == 0.5
    assert config.token_file == tmp_path / "etc/k3sagentd/token"


def test_fixed_addresses_are_somebody_elses_first(tmp_path: Path) -> None:
    write(tmp_path, "nodes: 2\nregistration-address: k3s.lan\nvirtual-ip: 10.0.0.100/24\n")
    assert load_config(Paths(tmp_path)).fixed_addresses == ("k3s.lan", "10.0.0.100")
    write(tmp_path, "nodes: 2\nvirtual-ip: 10.0.0.100/24\n")
    assert load_config(Paths(tmp_path)).fixed_addresses == ("10.0.0.100",)


def test_dropins_are_merged_as_k3s_does(tmp_path: Path) -> None:
    write(tmp_path, "nodes: 3\nseeds: [a]\nk3s: {debug: true}\n")
    write(tmp_path, "seeds+: [c]\n", "config.yaml.d/20.yaml")
    write(tmp_path, "nodes: 5\nseeds+: [b]\n", "config.yaml.d/10.yml")
    write(tmp_path, "nodes: 9\n", "config.yaml.d/30.txt")
    config = load_config(Paths(tmp_path))
    assert config.nodes == 5
    assert config.seeds == ("a", "b", "c")


def test_an_error_in_a_dropin_names_the_dropin(tmp_path: Path) -> None:
    write(tmp_path, "nodes: 3\n")
    path = write(tmp_path, "servers: 4\n", "config.yaml.d/10.yaml")
    with pytest.raises(ConfigError, match=str(path)):
        load_config(Paths(tmp_path))


def test_what_k3s_takes_as_an_option_is_taken(tmp_path: Path) -> None:
    options = {"node-label": ["a=b", "c=d"], "disable": "traefik", "debug": True, "v": 3}
    options["kubelet-arg"] = [5, 0.5, False]
    options["node-taint"] = []
    write(tmp_path, yaml.safe_dump({"nodes": 5, "k3s": options}))
    assert load_config(Paths(tmp_path)).k3s == options


def test_an_option_in_a_drop_in_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "nodes: 5\n")
    dropin = write(tmp_path, "k3s: {node-label: {zone: a}}\n", "config.yaml.d/10-zone.yaml")
    with pytest.raises(ConfigError, match=re.escape(f"{dropin}: k3s.node-label is ")):
        load_config(Paths(tmp_path))

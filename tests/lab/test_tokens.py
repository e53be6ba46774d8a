# SPDX-License-Identifier: Apache-2.0
"""Tokens where they are used: what an agent's disk holds, and a site that gets a new token."""

import time

from k3sagentd.keys import derive
from k3sagentd.lab import site
from tests.lab.cluster import end, restart_daemon
from tests.lab.conftest import FAST, Bench, complete

TIMEOUT_S = 60.0


def restart_k3s(lab: Bench, name: str) -> None:
    """``systemctl restart k3s``, and wait until it is ready."""
    end(name, "-m", "k3sagentd.lab.standin", "server")
    deadline = time.monotonic() + TIMEOUT_S
    while "pong" not in lab.run("exec", name, "--", *PING, check=False):
        assert time.monotonic() < deadline, f"K3s is not back on {name}{lab.logs()}"
        time.sleep(0.5)


PING = (
    "/usr/bin/python3",
    "-c",
    "import ssl, urllib.request as u; "
    "print(u.urlopen('https://127.0.0.1:6443/ping', "
    "context=ssl._create_unverified_context()).read().decode())",
)


def holders(name: str, secret: str) -> list[str]:
    """Every file on a machine's disk that holds ``secret``."""
    disk = site.load().machine(name)
    found = []
    for path in disk.rglob("*"):
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
            found.append(str(path.relative_to(disk)))
    return sorted(found)


def given(lab: Bench, name: str, secret: str) -> None:
    """Wait until K3s on a machine is given ``secret``."""
    file = site.load().machine(name) / "etc/rancher/k3s/k3sagentd-token"
    deadline = time.monotonic() + TIMEOUT_S
    while secret not in file.read_text():
        assert time.monotonic() < deadline, f"{name} does not go over{lab.logs()}"
        time.sleep(0.1)


def roles(views: dict[str, dict]) -> tuple[list[str], list[str]]:
    servers = sorted(n for n, v in views.items() if v["node"]["role"] == "server")
    return servers, sorted(views.keys() - servers)


def test_a_stolen_agent_card_holds_no_server_token(lab: Bench) -> None:
    forget = ("--set", "forget-token=true")
    lab.run("up", "--nodes", "3", "--servers", "1", "--wait", "complete", *FAST, *forget)
    token = site.load().token
    # Who forgets starts once more, perhaps just now.
    (server,), agents = roles(lab.until(lambda v: len(v) == 3))

    def forgotten(views: dict[str, dict]) -> bool:
        notes = [views[each]["node"]["notes"] for each in agents]
        return complete(views) and all("forgot the site's token" in str(each) for each in notes)

    def as_before(views: dict[str, dict]) -> bool:
        """Forgotten, and all here again: who forgets starts once more."""
        return forgotten(views) and [v["site"]["seen"] for v in views.values()] == [3, 3, 3]

    views = lab.until(as_before)
    for agent in agents:
        assert holders(agent, token) == []
        assert holders(agent, derive(token.encode()).agent_token) == [
            "etc/rancher/k3s/k3sagentd-token"
        ]
        assert views[agent]["site"]["id"] == views[server]["site"]["id"]
    assert "etc/k3sagentd/token" in holders(server, token), "a server needs it"

    # It boots again without, and is a peer like any other: it tells a newcomer where to join.
    lab.run("kill", agents[0])
    lab.run("start", agents[0])
    lab.until(as_before)
    lab.run("kill", server)
    lab.run("add", "--role", "agent")
    lab.until(lambda v: v["node4"]["site"]["phase"] == "sealed" and v["node4"]["site"]["seen"] == 3)
    lab.run("start", server)
    lab.until(lambda v: len(v) == 4 and complete(v))


def test_a_site_gets_a_new_token(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", "--servers", "3", "--wait", "complete", *FAST)
    before = lab.views()
    servers, agents = roles(before)
    old = site.load().token
    files = {n: site.load().machine(n) / "etc/k3sagentd" for n in before}

    # 1. All take both.
    said = lab.inside(servers[0], "k3sagentd", "token", "create", "--next")
    assert "token.next: made" in said
    new = (files[servers[0]] / "token.next").read_text()
    for name in before:
        (files[name] / "token.next").write_text(new)
        (files[name] / "token.next").chmod(0o600)
        restart_daemon(lab, name)
    lab.until(
        lambda v: (
            len(v) == 4 and all(x["site"]["seen"] == 4 and x["site"]["also"] for x in v.values())
        )
    )

    # 2. The servers go over, one at a time.
    for name in servers:
        said = lab.inside(name, "k3sagentd", "token", "rotate")
        assert "k3s token rotate" in said
        if name == servers[0]:
            token = ("--token", old, "--new-token", new.strip())
            lab.inside(name, "k3s", "token", "rotate", *token)
        restart_daemon(lab, name)
        given(lab, name, new.strip())
        restart_k3s(lab, name)
        lab.until(lambda v, n=name: v[n]["node"]["phase"] == "ready" and len(v) == 4)
    views = lab.until(lambda v: all(x["site"]["seen"] == 4 for x in v.values()))
    assert views[servers[0]]["site"]["id"] == derive(new.strip().encode()).site_id
    assert views[agents[0]]["site"]["id"] == derive(old.encode()).site_id

    # 3. The agents; 4. the old token ends.
    for name in agents:
        lab.inside(name, "k3sagentd", "token", "rotate")
        restart_daemon(lab, name)
        given(lab, name, derive(new.strip().encode()).agent_token)
    for name in before:
        lab.inside(name, "k3sagentd", "token", "forget")
        restart_daemon(lab, name)
    views = lab.until(
        lambda v: len(v) == 4 and complete(v) and all(x["site"]["seen"] == 4 for x in v.values())
    )
    for name, view in views.items():
        assert view["node"]["id"] == before[name]["node"]["id"]
        assert view["site"]["also"] == []
        assert holders(name, old) == [], "the old token is on the disk"
    assert holders(agents[0], new.strip()) == ["etc/k3sagentd/token"]

    # Late machines join with the new one; with the old one they are strangers.
    machines = site.load()
    late, stranger = machines.add(token=new.strip()), machines.add(token=old)
    for name in (late, stranger):
        machines.start(name)
    views = lab.until(lambda v: v[late]["node"]["phase"] == "ready" and stranger in v)
    assert views[stranger]["site"]["phase"] == "discovering"
    assert views[stranger]["site"]["seen"] == 1


def test_a_machine_that_missed_a_step_says_whom_it_cannot_reach(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--servers", "1", "--wait", "complete", *FAST)
    (server,), agents = roles(lab.views())
    lab.inside(server, "k3sagentd", "token", "create", "--next")
    lab.inside(server, "k3sagentd", "token", "rotate")  # the others never got token.next
    restart_daemon(lab, server)

    def told(views: dict[str, dict]) -> bool:
        reasons = [str(views[each]["node"]["refused"]) for each in (server, *agents)]
        return all("another token" in each for each in reasons)

    lab.until(told)
    said = lab.inside(agents[0], "k3sagentd", "status")
    assert "Refuses: " in said
    assert "another token" in said
    refused = lab.run("exec", agents[0], "--", "k3sagentd", "token", "rotate", check=False)
    assert refused == ""

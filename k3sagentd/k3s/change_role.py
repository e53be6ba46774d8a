# SPDX-License-Identifier: Apache-2.0
"""A member that becomes the other kind of member: promotion of an agent, demotion of a server.

What the old role had on the disk is renamed, so whoever is killed here is, when the order comes
again, either still in the old role or a machine without data that joins like any other. The node's
password (/etc/rancher/node) stays, and with it the right to its name (K3S.md 7).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from k3sagentd.core.k3s import Action, Datastore, ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.k3s import spared
from k3sagentd.k3s.data import AGENT, MARKER, ca_hash, datastore, move, put_aside
from k3sagentd.k3s.mounts import mount_points
from k3sagentd.k3s.ownership import is_adopted
from k3sagentd.k3s.work import Work

DATA_OF = {Datastore.AGENT: ServerOrAgent.AGENT, Datastore.ETCD: ServerOrAgent.SERVER}
A = {ServerOrAgent.AGENT: "an agent", ServerOrAgent.SERVER: "a server"}
UNINSTALL = {
    ServerOrAgent.AGENT: "k3s-agent-uninstall.sh",
    ServerOrAgent.SERVER: "k3s-uninstall.sh",
}
IMAGES = "agent/images"
"""What an operator put there for machines without a network (K3S.md 6): both roles read it."""
KEPT_IMAGES = "agent-images"


def is_change(work: Work) -> bool:
    """Whether the data is of the other role than the order's."""
    if work.order.action not in (Action.PREPARE, Action.JOIN, Action.STEP_DOWN):
        return False
    return DATA_OF.get(datastore(work.paths.k3s_data), work.order.role) is not work.order.role


def check(work: Work) -> None:
    """Raise HopelessError where this member may not change its role by order, MachineError where
    it may not now."""
    paths, wanted = work.paths, work.order.role
    found = DATA_OF[datastore(paths.k3s_data)]
    if is_adopted(paths, work.config):
        raise HopelessError(
            f"K3s was {A[found]} here before k3sagentd, which does not make it {A[wanted]}; set "
            f"role: {found}, or run {UNINSTALL[found]} and delete its Node, and it joins anew"
        )
    if not paths.dropin.exists():
        raise HopelessError(
            f"{paths.k3s_data} has the data of {A[found]}, but there is no {paths.dropin}: it was "
            "not k3sagentd that started it; move the data aside"
        )
    if found is ServerOrAgent.SERVER:  # whatever the action: a JOIN as an agent stops K3s, too
        spared.check(paths, running=work.install.running())
    if ca_hash(paths.k3s_data) is None:
        raise HopelessError(
            f"{paths.k3s_data} has the data of {A[found]} of an unknown cluster; move it aside"
        )


def change(work: Work) -> Iterator[str]:
    """Stop K3s in its old role and put that role's data aside.

    Raises MachineError where a server must not stop now; then it runs.
    """
    if is_change(work):
        found = DATA_OF[datastore(work.paths.k3s_data)]
        yield f"stop K3s as {found}"
        spared.check(work.paths, running=work.install.running())  # again: to install takes its time
        work.install.owe_start(found)
        work.install.stop()
        if work.order.role is ServerOrAgent.SERVER:
            yield "move the agent's data aside"
            _put_agent_aside(work.paths.k3s_data)
        else:
            yield "move the server's data aside"
            _put_server_aside(work.paths.k3s_data)
    elif _is_entering(work):
        yield "stop K3s, which was about to join as a server"
        _stop_entering(work)
    _restore_images(work.paths.k3s_data)


def _is_entering(work: Work) -> bool:
    """Whether K3s runs as a server without data yet: the roster changed while it joined."""
    if work.order.role is ServerOrAgent.SERVER:
        return False
    blank = datastore(work.paths.k3s_data) is Datastore.NONE
    return blank and work.install.running(ServerOrAgent.SERVER)


def _stop_entering(work: Work) -> None:
    """Raise MachineError where it has become a member before it was gone: of two members neither
    may be off. It goes on as it was told before, and is asked for like any other server.

    Until that is sure it starts at a boot.
    """
    work.install.halt()
    if is_change(work):
        work.install.start(ServerOrAgent.SERVER)
        raise MachineError(
            "K3s has become a member of etcd here just now and goes on; it becomes an agent by "
            "itself once the other servers can do without it"
        )
    work.install.stop()


def _put_agent_aside(data: Path) -> None:
    """All of it but the images: a server's agent part is made anew, with the server's own CA."""
    if mount_points(data / "agent"):  # then all of it stays on that disk
        put_aside(data / "agent", "agent.before-server", keep=(Path(IMAGES).name,))
        return
    images, kept = data / IMAGES, data / KEPT_IMAGES
    if images.exists() and not kept.exists():
        move(images, kept)
    put_aside(data / "agent", "agent.before-server")


def _restore_images(data: Path) -> None:
    images, kept = data / IMAGES, data / KEPT_IMAGES
    if kept.exists() and not images.exists():
        images.parent.mkdir(mode=0o700, exist_ok=True)
        move(kept, images)


def _put_server_aside(data: Path) -> None:
    """With the word of whose data it is, which is the server's: a demoted init node is an agent
    like any other. Its agent part stays: same cluster, same CA, and the images need not come again.

    But the kubelet's certificate, which shows a machine that has joined: this one must ask where to
    join, and is told when its Node, and with it its member of etcd, is out of the way.
    """
    if (data / AGENT).exists():
        put_aside(data / AGENT, "client-kubelet.crt.before-agent")
    if (data / MARKER).exists():
        if mount_points(data / "server"):  # it may be another disk
            put_aside(data / MARKER, f"{MARKER}.before-agent")
        else:
            move(data / MARKER, data / "server" / MARKER)
    put_aside(data / "server", "server.before-agent")

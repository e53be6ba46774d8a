# SPDX-License-Identifier: Apache-2.0
"""``k3s kubectl``: the few commands that look after Nodes, with the administrator's certificate."""

from __future__ import annotations

import datetime
import http.client
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

from k3sagentd.lab.standin import nodes, pki

ADDRESS, PORT = "127.0.0.1", 6443
TIMEOUT_S = 30.0
DELETE_S = 60.0
"""kubectl waits without end by itself; a test must not."""
POLL_S = 0.3
USAGE = """\
usage: k3s kubectl get nodes|node [NAME] [-o wide|json|name]
       k3s kubectl get leases|lease [NAME] -n NAMESPACE -o json
       k3s kubectl get --raw PATH
       k3s kubectl delete node NAME [--wait=false] [--ignore-not-found]
       k3s kubectl cordon|uncordon|drain NAME [flags]"""
SWITCHES = frozenset(
    {
        "delete-emptydir-data",
        "disable-eviction",
        "force",
        "ignore-daemonsets",
        "ignore-not-found",
        "no-headers",
        "wait",
    }
)
"""Flags that take a value only after ``=``."""
SHORT = {"-o": "output", "-n": "namespace"}


class KubectlError(Exception):
    """What kubectl says on stderr, before it ends with 1."""


def main(arguments: list[str], tls: Path) -> int:
    """Do one command with the credentials in ``tls``."""
    words, flags = _parse(arguments)
    try:
        context = _context(tls)
        match words:
            case ["get"] if "raw" in flags:
                print(json.dumps(_ask(context, "GET", str(flags["raw"]))))
            case ["get", "nodes" | "node" | "no", *names]:
                _get(context, "/api/v1/nodes", names, flags)
            case ["get", "leases" | "lease", *names]:
                space = flags.get("namespace", "default")
                base = f"/apis/coordination.k8s.io/v1/namespaces/{space}/leases"
                _get(context, base, names, flags | {"output": "json"})
            case ["delete", "node" | "nodes" | "no", *names] if names:
                for name in names:
                    _delete(context, name, flags)
            case ["cordon" | "uncordon" as verb, name]:
                _cordon(context, name, verb)
            case ["drain", name]:
                _cordon(context, name, "cordon")
                _drain(name, flags)
            case _:
                print(USAGE, file=sys.stderr)
                return 1
    except KubectlError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    words: list[str] = []
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        key, equals, value = word.partition("=")
        name = SHORT.get(key, key.lstrip("-"))
        if equals:
            flags[name] = value
        elif name in SWITCHES:
            flags[name] = "true"
        else:
            flags[name] = rest.pop(0) if rest else ""
    return words, flags


def _context(tls: Path) -> ssl.SSLContext:
    """K3s's kubectl finds its configuration by itself on a server, and nowhere else."""
    try:
        return pki.client_context(
            tls / "server-ca.crt", tls / "client-admin.crt", tls / "client-admin.key"
        )
    except OSError as error:
        raise KubectlError(
            "The connection to the server localhost:8080 was refused - did you specify the right "
            "host or port?"
        ) from error


def _ask(
    context: ssl.SSLContext, method: str, path: str, body: object = None, kind: str = "json"
) -> Any:
    connection = http.client.HTTPSConnection(ADDRESS, PORT, timeout=TIMEOUT_S, context=context)
    try:
        headers = {"Content-Type": f"application/{kind}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise KubectlError(
            f"The connection to the server {ADDRESS}:{PORT} was refused - did you specify the "
            f"right host or port? ({error})"
        ) from error
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = {"message": text}
    if response.status >= 400:
        reason = answer.get("reason", "ServiceUnavailable")
        raise KubectlError(f"Error from server ({reason}): {answer['message']}")
    return answer


def _get(context: ssl.SSLContext, base: str, names: list[str], flags: dict[str, Any]) -> None:
    if names:
        found = [_ask(context, "GET", f"{base}/{name}") for name in names]
        whole: Any = found[0] if len(found) == 1 else {"kind": "List", "items": found}
    else:
        whole = _ask(context, "GET", base)
        found = whole["items"]
    match flags.get("output"):
        case "json":
            print(json.dumps(whole, indent=4))
        case "name":
            for each in found:
                print(f"node/{each['metadata']['name']}")
        case output:
            _table(found, wide=output == "wide", header="no-headers" not in flags)


def _table(found: list[Any], *, wide: bool, header: bool) -> None:
    rows = [["NAME", "STATUS", "ROLES", "AGE", "VERSION"]] if header else []
    if wide and header:
        rows[0].append("INTERNAL-IP")
    for node in found:
        meta, status = node["metadata"], node.get("status") or {}
        state = "Ready" if nodes.readiness(node) == "True" else "NotReady"
        if (node.get("spec") or {}).get("unschedulable"):
            state += ",SchedulingDisabled"
        prefix = "node-role.kubernetes.io/"
        roles = sorted(k.removeprefix(prefix) for k in meta.get("labels") or {} if prefix in k)
        version = (status.get("nodeInfo") or {}).get("kubeletVersion", "")
        age = _age(meta["creationTimestamp"])
        row = [meta["name"], state, ",".join(roles) or "<none>", age, version]
        if wide:
            addresses = status.get("addresses") or []
            ips = [each["address"] for each in addresses if each["type"] == "InternalIP"]
            row.append(ips[0] if ips else "<none>")
        rows.append(row)
    if not found:
        print("No resources found", file=sys.stderr)
        return
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    for row in rows:
        print("".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def _age(created: str) -> str:
    then = datetime.datetime.strptime(created, "%Y-%m-%dT%H:%M:%S%z")
    seconds = max(0, int((datetime.datetime.now(datetime.UTC) - then).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _delete(context: ssl.SSLContext, name: str, flags: dict[str, Any]) -> None:
    path = f"/api/v1/nodes/{name}"
    try:
        uid = _ask(context, "GET", path)["metadata"]["uid"]
        _ask(context, "DELETE", path, {"preconditions": {"uid": uid}})
    except KubectlError as error:
        if "(NotFound)" in str(error) and flags.get("ignore-not-found") == "true":
            return
        raise
    print(f'node "{name}" deleted', flush=True)
    deadline = time.monotonic() + DELETE_S
    while flags.get("wait", "true") == "true":
        try:
            if _ask(context, "GET", path)["metadata"]["uid"] != uid:
                return
        except KubectlError as error:
            if "(NotFound)" in str(error):
                return
        if time.monotonic() > deadline:
            raise KubectlError(f"error: timed out waiting for the condition on nodes/{name}")
        time.sleep(POLL_S)


def _cordon(context: ssl.SSLContext, name: str, verb: str) -> None:
    path = f"/api/v1/nodes/{name}"
    wanted = verb == "cordon"
    node = _ask(context, "GET", path)
    if bool((node.get("spec") or {}).get("unschedulable")) == wanted:
        print(f"node/{name} already {verb}ed")
        return
    patch = {"spec": {"unschedulable": True if wanted else None}}
    _ask(context, "PATCH", path, patch, "strategic-merge-patch+json")
    print(f"node/{name} {verb}ed", flush=True)


def _drain(name: str, flags: dict[str, Any]) -> None:
    """There are no pods here; but every K3s node has some that kubectl asks about."""
    for flag, why in (
        ("ignore-daemonsets", "cannot delete DaemonSet-managed Pods (use --ignore-daemonsets to "
                              "ignore): kube-system/svclb-traefik"),
        ("delete-emptydir-data", "cannot delete Pods with local storage (use "
                                 "--delete-emptydir-data to override): kube-system/metrics-server"),
    ):  # fmt: skip
        if flags.get(flag) != "true":
            raise KubectlError(f'error: unable to drain node "{name}" due to error: {why}')
    print(f"node/{name} drained")

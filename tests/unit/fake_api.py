# SPDX-License-Identifier: Apache-2.0
"""A Kubernetes API as far as root asks it: Nodes and Leases, over TLS with client certificates.

As strict as the real one where it matters: preconditions, resourceVersions, who may ask.
"""

import copy
import datetime
import ipaddress
import json
import ssl
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"


class Authority:
    """A CA and what it signs."""

    def __init__(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key.public_key(), ca=True)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def leaf(self, name: str, addresses: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
        """Certificate and key in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key.public_key(), addresses=addresses)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate.public_bytes(Encoding.PEM), pem

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        ca: bool = False,
        addresses: tuple[str, ...] = (),
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if addresses:
            names = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


class FakeApi:
    """The API of one server; ``before`` is called with method and path of each request."""

    def __init__(self, directory: Path, address: str = "127.0.0.1", port: int = 0) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.leases: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.page_limit = 1000
        self.lingers = 0
        """How often a Node that is deleted is seen after that: it has a finalizer."""
        self._version = 100
        self._authority, self._clients = Authority("server-ca"), Authority("client-ca")
        directory.mkdir(parents=True, exist_ok=True)
        serving = directory / "serving.pem"
        serving.write_bytes(b"".join(self._authority.leaf("k3s", (address,))))
        (directory / "client-ca.crt").write_bytes(self._clients.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(serving)
        context.load_verify_locations(directory / "client-ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer((address, port), handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://{address}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def give_certificates(self, tls: Path) -> None:
        """What K3s has on a server."""
        tls.mkdir(parents=True, exist_ok=True)
        certificate, key = self._clients.leaf("system:admin")
        (tls / "server-ca.crt").write_bytes(self._authority.pem)
        (tls / "client-admin.crt").write_bytes(certificate)
        (tls / "client-admin.key").write_bytes(key)

    # --- what is there ----------------------------------------------------------------------

    def add_node(
        self,
        name: str,
        *,
        server: bool = False,
        ready: bool = True,
        release: str = "v1.33.4+k3s1",
        **labels: str,
    ) -> str:
        """Add a Node; returns its uid."""
        given = {key.replace("_", "/", 1).replace("_", "-"): v for key, v in labels.items()}
        if server:
            given["node-role.kubernetes.io/etcd"] = "true"
        uid = str(uuid.uuid4())
        metadata = {"name": name, "uid": uid, "labels": given, "resourceVersion": self.version()}
        status: dict[str, Any] = {
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": "True" if ready else "Unknown"},
            ]
        }
        status["nodeInfo"] = {"kubeletVersion": release}
        self.nodes[name] = {"metadata": metadata, "status": status}
        return uid

    def version(self) -> str:
        self._version += 1
        return str(self._version)

    # --- requests ---------------------------------------------------------------------------

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        parts = urlsplit(target)
        self.requests.append(f"{method} {parts.path}")
        self.before(method, parts.path)
        if parts.path == "/api/v1/nodes" and method == "GET":
            return self._list(parse_qs(parts.query))
        if parts.path.startswith("/api/v1/nodes/"):
            name = parts.path.rpartition("/")[2]
            return self._delete(name, body) if method == "DELETE" else self._get(name)
        if parts.path == LEASES and method == "POST":
            return self._create(body)
        if parts.path.startswith(f"{LEASES}/"):
            return self._lease(method, parts.path.rpartition("/")[2], body)
        return 404, failure("not found")

    def _list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        first = int(query.get("continue", ["0"])[0])
        limit = min(int(query["limit"][0]), self.page_limit)
        names = sorted(self.nodes)[first:]
        metadata = {"resourceVersion": str(self._version)}
        if names[limit:]:
            metadata["continue"] = str(first + limit)
        return 200, {"metadata": metadata, "items": [self.nodes[name] for name in names[:limit]]}

    def _delete(self, name: str, body: Any) -> tuple[int, Any]:
        node = self.nodes.get(name)
        if node is None:
            return 404, failure(f'nodes "{name}" not found')
        for key, value in body["preconditions"].items():
            if node["metadata"][key] != value:
                return 409, failure(f"Precondition failed: {key}")
        if self.lingers:
            node["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return 200, node
        del self.nodes[name]
        return 200, {"kind": "Status", "status": "Success"}

    def _get(self, name: str) -> tuple[int, Any]:
        node = self.nodes.get(name)
        if node is None:
            return 404, failure(f'nodes "{name}" not found')
        if "deletionTimestamp" in node["metadata"]:
            self.lingers -= 1
            if self.lingers <= 0:
                del self.nodes[name]
        return 200, node

    def _create(self, body: Any) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if name in self.leases:
            return 409, failure(f'leases "{name}" already exists')
        if "resourceVersion" in body["metadata"]:
            return 500, failure("resourceVersion should not be set on objects to be created")
        return 201, self._store(name, body)

    def _lease(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        found = self.leases.get(name)
        if found is None:
            return 404, failure(f'leases "{name}" not found')
        if method == "GET":
            return 200, found
        if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            return 409, failure("the object has been modified")
        return 200, self._store(name, body)

    def _store(self, name: str, body: Any) -> Any:
        spec = body["spec"]
        datetime.datetime.strptime(spec["renewTime"], "%Y-%m-%dT%H:%M:%S.%fZ")
        assert type(spec["leaseTransitions"]) is int
        assert spec["leaseDurationSeconds"] > 0
        stored = copy.deepcopy(body)
        stored["metadata"]["resourceVersion"] = self.version()
        self.leases[name] = stored
        return stored


def failure(message: str) -> Any:
    return {"kind": "Status", "status": "Failure", "message": message}


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        status, answer = self.api.answer(self.command, self.path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

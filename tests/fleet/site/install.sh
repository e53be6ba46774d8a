#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Keeps the documented contract of K3s's install script (get.k3s.io) for the stand-in: its
# environment, the files and units that it makes, and what it says when it fails.
set -eu

fatal() {
    echo "[ERROR]  $*" >&2
    exit 1
}

site=$(dirname "${INSTALL_K3S_STANDIN_URL:-https://site.fleet/k3s}")
bin=${INSTALL_K3S_BIN_DIR:-/usr/local/bin}
units=${INSTALL_K3S_SYSTEMD_DIR:-/etc/systemd/system}

case "${1:-}" in
'' | -*) if [ -n "${K3S_URL:-}" ]; then role=agent; else role=server; fi ;;
*) role=$1; shift ;;
esac
if [ "$role" = agent ]; then name=k3s-agent type=exec; else name=k3s type=notify; fi
[ -z "${INSTALL_K3S_NAME:-}" ] || name=k3s-$INSTALL_K3S_NAME
if [ "$role" = agent ] && [ -n "${K3S_URL:-}" ] && [ -z "${K3S_TOKEN:-}${K3S_TOKEN_FILE:-}" ]; then
    fatal "Defaulted k3s exec command to 'agent' because K3S_URL is defined, but K3S_TOKEN is not"
fi
[ -n "${INSTALL_K3S_VERSION:-}${INSTALL_K3S_CHANNEL:-}" ] || INSTALL_K3S_CHANNEL=stable

if [ "${INSTALL_K3S_SKIP_DOWNLOAD:-}" = true ]; then
    [ -x "$bin/k3s" ] || fatal "Executable k3s binary not found at $bin/k3s"
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    fetch() {
        python3 -c 'import shutil, sys, urllib.request as u
with u.urlopen(sys.argv[1], timeout=30) as r, open(sys.argv[2], "wb") as f: shutil.copyfileobj(r, f)' \
            "$site/$1" "$work/$1" || fatal "Download failed"
    }
    fetch sha256sum.txt
    fetch k3s
    (cd "$work" && sha256sum --quiet --check sha256sum.txt) || fatal "Download sha256 does not match"
    chmod 755 "$work/k3s"
    mv -f "$work/k3s" "$bin/k3s"
fi
for tool in kubectl crictl ctr; do ln -sf k3s "$bin/$tool"; done

cat >"$bin/k3s-killall.sh" <<'END'
#!/bin/sh
for unit in /etc/systemd/system/k3s*.service; do
    [ -s "$unit" ] && systemctl stop "$(basename "$unit")"
done
exit 0
END
uninstall=$bin/$name-uninstall.sh
cat >"$uninstall" <<END
#!/bin/sh
$bin/k3s-killall.sh
systemctl disable $name
rm -f $units/$name.service $units/$name.service.env $uninstall
systemctl daemon-reload
ls $units/k3s*.service >/dev/null 2>&1 && exit
rm -f $bin/k3s $bin/kubectl $bin/crictl $bin/ctr $bin/k3s-killall.sh
rm -rf /etc/rancher/k3s /var/lib/rancher/k3s
END
chmod 755 "$bin/k3s-killall.sh" "$uninstall"

# Whatever comes of this run, from here on the unit does not start at boot before it is enabled anew.
systemctl disable "$name" >/dev/null 2>&1 || true
rm -f "$units/$name.service" "$units/$name.service.env"
umask 077
env | grep '^K3S_' | sort >"$units/$name.service.env" || true
umask 022
cat >"$units/$name.service" <<END
[Unit]
Description=Lightweight Kubernetes
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type=$type
EnvironmentFile=-/etc/default/%N
EnvironmentFile=-$units/$name.service.env
KillMode=process
Delegate=yes
LimitNOFILE=1048576
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStart=$bin/k3s $role $*
END

if [ "${INSTALL_K3S_SKIP_ENABLE:-}" = true ]; then exit 0; fi
systemctl daemon-reload
systemctl enable "$name"
if [ "${INSTALL_K3S_SKIP_START:-}" = true ]; then exit 0; fi
systemctl restart "$name"

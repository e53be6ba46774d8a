#!/bin/bash -e
install -m 644 files/k3sagentd_*_all.deb "${ROOTFS_DIR}/root/"
install -d "${ROOTFS_DIR}/etc/k3sagentd"
install -m 644 files/config.yaml "${ROOTFS_DIR}/etc/k3sagentd/config.yaml"
on_chroot << EOF
apt-get install -y /root/k3sagentd_*_all.deb
rm /root/k3sagentd_*_all.deb
EOF
# K3s needs the memory cgroup, which the firmware turns off. Once, also where the stage runs again.
grep -q cgroup_enable=memory "${ROOTFS_DIR}/boot/firmware/cmdline.txt" ||
	sed -i '1s/$/ cgroup_enable=memory/' "${ROOTFS_DIR}/boot/firmware/cmdline.txt"

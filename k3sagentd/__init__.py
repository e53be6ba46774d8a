# SPDX-License-Identifier: Apache-2.0
"""Starts one highly available K3s cluster from equal machines, without a first one."""

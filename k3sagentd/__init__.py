# SPDX-License-Identifier: Apache-2.0
"""k3sagentd starts one K3s cluster from a set of equal machines, without a first one."""

__version__ = "0.1.0"

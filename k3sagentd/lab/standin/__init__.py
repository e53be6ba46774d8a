# SPDX-License-Identifier: Apache-2.0
"""The stand-in: behaves towards k3sagentd as K3s does (K3S.md), over a real etcd.

Test equipment. The daemon does not know that it exists, and it is never more forgiving than K3s.
"""

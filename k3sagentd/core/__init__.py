# SPDX-License-Identifier: Apache-2.0
"""The bootstrap of a site as a pure state machine: ``step(node, event) -> (node, effects)``.

No I/O, no clock, no randomness; time arrives inside events. Read in this order: ``words`` (the
vocabulary), ``log`` (what is decided), ``paxos`` (one decree), ``state`` (all that a node knows),
``guards`` (when a node may not vote), ``election`` (votes and proposals), ``lifecycle`` (the table
of phases), ``machine`` (the one door).
"""

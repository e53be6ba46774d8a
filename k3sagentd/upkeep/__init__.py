# SPDX-License-Identifier: Apache-2.0
"""What an operator does to a machine of a site that lives: leave, reset, repair.

As root, step by step; each can be killed anywhere and run again.
"""

# SPDX-License-Identifier: Apache-2.0
"""The shell around the core: I/O becomes events, effects become I/O. It decides nothing."""

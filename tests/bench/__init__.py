# SPDX-License-Identifier: Apache-2.0
"""Figures, each beside a reference measured in the same run. Benchmarks, not tests."""

# SPDX-License-Identifier: Apache-2.0
"""``python3 -m k3sagentd``."""

from k3sagentd.cli.main import console

if __name__ == "__main__":
    console()

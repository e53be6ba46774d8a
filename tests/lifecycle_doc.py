# SPDX-License-Identifier: Apache-2.0
"""Renders the table of phases for the docs: ``make docs``."""

from k3sagentd.core.lifecycle import TABLE, Rule
from k3sagentd.core.words import NodePhase

HEAD = """\
# The life of a node

Made from the table in `k3sagentd/core/lifecycle.py` by `make docs`. The first rule that holds is
applied, until none does.

| in | when | then | why |
| --- | --- | --- | --- |
"""


def _line(rule: Rule) -> str:
    phases = ", ".join(phase for phase in NodePhase if phase in rule.phases)
    when = (rule.when.__doc__ or "").strip().rstrip(".").replace("\n", " ")
    return f"| {phases} | {when} | **{rule.next}** | {rule.why} |\n"


def render() -> str:
    """The whole page, with a diagram of the same rules."""
    arrows = sorted({(p, str(rule.next)) for rule in TABLE for p in rule.phases})
    ids = [(a.replace("-", "_"), b.replace("-", "_")) for a, b in arrows]
    diagram = "".join(f"    {a} --> {b}\n" for a, b in ids)
    return (
        HEAD
        + "".join(_line(rule) for rule in TABLE)
        + f"\n```mermaid\nstateDiagram-v2\n    [*] --> discovering\n{diagram}```\n"
    )


if __name__ == "__main__":
    print(render(), end="")

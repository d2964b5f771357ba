"""Step costs of a machine that was not measured, from its row of peaks: an estimate, and labelled as one."""

from __future__ import annotations

import numpy as np

from deepspec.cost.formulas import Names, figure, forward_flops
from deepspec.cost.machines import Machine
from deepspec.cost.step_time import FromRow
from deepspec.schedule.costs import Identity, StepCosts

ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (512, 2048, 8192)


def estimated(
    machine: Machine, names: Names, *, target: str, draft: str, block: int, passes: int
) -> StepCosts:
    """Step costs of an inference engine on a machine, without what its scheduler adds to a step.

    names: the numbers of target and draft (`dimensions`). passes: of the draft for one block of γ = `block`.
    A pass takes the larger of reading weights and keys and of computing, at the assumed shares of the peaks.
    """
    source = FromRow(machine)
    widths = (*(w for w in (1, 2, 4, 8, 16) if w <= block), block + 1)

    def pass_(rows: int, width: int, context: int) -> float:
        return float(source.decoding_step(names, rows, width, context, eager=False))

    def proposals(rows: int) -> float:
        return float(
            figure(
                "s",
                "max(passes * width * own / (bandwidth * bandwidth_share),"
                " rows * block * 2 * own / (peak * share))",
                names | machine.numbers(names["width"]),
                passes=passes,
                rows=rows,
                block=block,
            )
        )

    def reading(length: int) -> float:
        return float(source.pass_seconds(forward_flops(names, length, length / 2, logits=1), names["width"]))

    return StepCosts(
        np.array(ROWS),
        np.array(widths),
        np.array(CONTEXTS),
        np.array([[[pass_(r, w, c) for c in CONTEXTS] for w in widths] for r in ROWS]),
        np.array([[proposals(r)] * len(CONTEXTS) for r in ROWS]),
        np.array((1, *CONTEXTS)),
        np.array([max(reading(length), pass_(1, 1, 1)) for length in (1, *CONTEXTS)]),
        np.zeros(len(ROWS)),
        Identity(machine.name, "estimate", target=target, draft=draft, block=block),
        machine.watts,
        (
            f"step costs are estimated, not measured: {machine.name} is assumed to reach {machine.share:.0%} "
            f"of its peak operations and {machine.bandwidth_share:.0%} of its bandwidth",
            "what an engine's scheduler adds to a step, and whether the keys and values of all rows fit the "
            "memory, are left out",
        ),
    )

"""Step costs as the tables that SGLang's DSpark scheduler reads (--speculative-dspark-sps-table-path)."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepspec.schedule.costs import StepCosts, monotone


def sps_tables(costs: StepCosts, context: float) -> dict[str, dict[str, Any]]:
    """Both forms of SGLang's table, at one context, for whole rounds: `flat`, steps per second by the tokens
    that a pass verifies, anchors included; `additive`, seconds as a part of the rows and one of the tokens.

    SGLang reads the flat form as a staircase, and the additive one as lines between points.
    """
    rows, widths = np.meshgrid(costs.rows, costs.widths, indexing="ij")
    tokens = (rows * widths).ravel()
    seconds = costs.round_seconds(rows, rows * widths, context).ravel()
    points, place = np.unique(tokens, return_inverse=True)
    # The same number of tokens in more rows takes a little longer.
    by_tokens = monotone(np.array([float(np.median(seconds[place == i])) for i in range(len(points))]))
    row_place = np.repeat(np.arange(len(costs.rows)), len(costs.widths))
    # The first point of both parts is zero, and the bias is the step there; relative errors count.
    columns = np.zeros((len(seconds), 1 + len(costs.rows) + len(points)))
    each = np.arange(len(seconds))
    columns[:, 0] = 1.0
    columns[each, 1 + row_place] = columns[each, 1 + len(costs.rows) + place] = 1.0
    columns[:, [1, 1 + len(costs.rows)]] = 0.0
    found: Any = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    alpha, theta = monotone(found[1 : 1 + len(costs.rows)]), monotone(found[1 + len(costs.rows) :])
    return {
        "flat": {
            "sample_batch_tokens": points.tolist(),
            "sample_steps_per_sec": (1.0 / by_tokens).tolist(),
            "max_batch_tokens": int(points[-1]),
        },
        "additive": {
            "bias_seconds": float(max(found[0], 0.1 * seconds.min())),
            "bs_probes": costs.rows.tolist(),
            "alpha_seconds": alpha.tolist(),
            "m_probes": points.tolist(),
            "theta_seconds": theta.tolist(),
        },
    }

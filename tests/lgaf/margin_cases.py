"""Margins to test: each at its defaults, and the variants whose formulas differ."""

from __future__ import annotations

import pytest

from lgaf.heads.margins import MARGINS, create_margin

_VARIANTS = [
    ("arcface", {"gradient": "straight_through"}),
    ("combined", {"m1": 1.35, "m2": 0.2, "m3": 0.1, "scale": 16.0}),
    ("combined", {"m2": 0.3, "m3": 0.2, "scale": 16.0, "gradient": "straight_through"}),
    ("combined", {"scale": 16.0, "interclass_filtering_threshold": 0.2}),
    ("adaface", {"scale": 16.0, "t_alpha": 1.0}),
    ("adaface", {"scale": 16.0, "h": 2.0, "t_alpha": 0.9}),
    ("magface", {"scale": 16.0, "lambda_g": 20.0, "easy_margin": False}),
    ("mv_softmax", {"t": 1.2, "variant": "arc"}),
    ("curricularface", {"scale": 16.0, "alpha": 0.5}),
    ("uniface", {"margin": 0.2, "scale": 16.0, "l": 0.5, "r": 0.5}),
]

MARGIN_CASES = [
    *(pytest.param(create_margin(name), id=name) for name in MARGINS),
    *(
        pytest.param(create_margin(name, **fields), id="-".join([name, *map(str, fields.values())]))
        for name, fields in _VARIANTS
    ),
]

"""How few tokens an operator's own requests allow: the calibration behind `ratio: "auto"`."""

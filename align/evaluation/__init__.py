"""How good models are: what they answer to held-out records, measured and judged, with intervals."""

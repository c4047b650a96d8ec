"""Attention over paged KV: one protocol (`base`), several backends, chosen by `choose`."""

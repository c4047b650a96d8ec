"""From logits to tokens, and from tokens to the text of a completion.

`sampler` samples the next token of each sequence (`greedy`, `penalties`, `draw` for temperature and truncation, `rng`,
`logprobs`); `stop` finds stop strings; `detokenize` turns finished requests into outcomes.
"""

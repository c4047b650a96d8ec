"""Completions in the forms that other programs read, made from an output folder; the folder's parts stay as they are.

`parts` gives the completions in the order of the input, in bounded memory; `openai_lines` (with `openai_logprobs`) and
`plain_lines` make lines of them, and `files` writes what succeeded and what did not into a file each.
"""
